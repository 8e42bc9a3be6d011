"""A whole scanpy script: read, rank, write the result. Run by the peer's own Python.

python scanpy_hvg.py FILE OUT.npz TOP [--modality M] [--batch-key C]
"""

import argparse
import warnings

import anndata as ad
import numpy as np
import scanpy as sc

warnings.simplefilter("ignore")
parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("out")
parser.add_argument("top", type=int)
parser.add_argument("--modality")
parser.add_argument("--batch-key")
args = parser.parse_args()
if args.modality:
    import mudata

    adata = mudata.read_h5mu(args.file).mod[args.modality]
else:
    adata = ad.read_h5ad(args.file)
frame = sc.pp.highly_variable_genes(
    adata, n_top_genes=args.top, flavor="seurat_v3", batch_key=args.batch_key, inplace=False
)
np.savez(
    args.out,
    genes=frame.index.to_numpy(str),
    chosen=frame["highly_variable"].to_numpy(),
    **{k: frame[k].to_numpy(float) for k in ("means", "variances", "variances_norm")},
)
