"""Classify cells by pertpy's Mixscape, with its defaults and neighbours within replicates. Arguments: in.h5ad out.csv
pert_col control split_by."""

import sys
import warnings

warnings.simplefilter("ignore")

import anndata as ad  # noqa: E402
import pertpy as pt  # noqa: E402

path, out, pert_col, control, split_by = sys.argv[1:]
adata = ad.read_h5ad(path)
adata.obs[pert_col] = adata.obs[pert_col].astype(str)
mixscape = pt.tl.Mixscape()
mixscape.perturbation_signature(adata, pert_col, control, split_by=split_by)
mixscape.mixscape(adata, pert_col, control, layer="X_pert")
found = adata.obs[["mixscape_class_global", "mixscape_class_p_ko"]]
found.columns = ["class", "posterior"]
found.to_csv(out, index_label="cell")
