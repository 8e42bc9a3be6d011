# %% [markdown]
# # A public atlas, from a bucket to training data
#
# `vcelltools atlas` reads scBaseCount, Tahoe-100M and others from their buckets. This notebook makes a folder with the
# layout of scBaseCount, so that it runs without a network; for the atlas itself, replace `"bucket"` with
# `"scbasecount"`.

# %%
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import sparse

import vcelltools as vc
from vcelltools.atlas import Choice, Transfer, fetch, list_experiments, make_plan, merge, open_source

warnings.simplefilter("ignore")


def make_axes():
    """Return the axes of a new figure."""
    return plt.subplots(figsize=(5.5, 3.8), layout="constrained")[1]


rng = np.random.default_rng(0)
GENES = [f"ENSG{i:011d}" for i in range(2000)]
mean = rng.gamma(0.4, 2.0, len(GENES))
folder = Path("bucket/h5ad/GeneFull_Ex50pAS/Homo_sapiens")
table = Path("bucket/metadata/GeneFull_Ex50pAS/Homo_sapiens")
folder.mkdir(parents=True)
table.mkdir(parents=True)
rows = []
for k in range(6):
    tissue = ["lung", "blood", "liver"][k % 3]
    n, here = 150 + 20 * k, len(GENES) - 60 * (k % 2)  # some experiments lack genes
    own = mean * np.exp(0.8 * np.random.default_rng(k % 3).normal(size=len(GENES)))
    counts = rng.poisson(rng.lognormal(0, 0.4, (n, 1)) * own[:here])
    if k == 4:
        counts[:20, 5:] = 0  # damaged cells
    var = pd.DataFrame(
        {"gene_symbols": [f"GENE{i}" if i >= 12 else f"MT-{i}" for i in range(here)]}, index=GENES[:here]
    )
    obs = pd.DataFrame({"umi_count": counts.sum(axis=1)}, index=[f"AAAC{i:04d}" for i in range(n)])
    ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs, var).write_h5ad(folder / f"SRX{k}.h5ad")
    rows.append({"srx_accession": f"SRX{k}", "file_path": f"gs://bucket/h5ad/{folder.parts[-2]}/Homo_sapiens/SRX{k}.h5ad",
                 "obs_count": n, "tissue": tissue, "perturbation": "not applicable"})  # fmt: skip
pd.DataFrame(rows).to_parquet(table / "sample_metadata.parquet")

# %% [markdown]
# ## What is there
#
# The table of the source is read, and no cell.

# %%
source = open_source("bucket")
listing = list_experiments(source, values="tissue")
pd.DataFrame(listing.to_json()["values"])

# %% [markdown]
# ## Fetch whole experiments
#
# A plan says what would be fetched and how large it is. `fetch` verifies every file, and the same call resumes a
# download that was interrupted.

# %%
choice = Choice(where=("tissue=lung|blood",), cells=700)
plan = make_plan(source, choice, Path("atlas"), Transfer())
pd.DataFrame(plan.selected)[["id", "cells", "bytes"]]

# %%
fetched = fetch(source, choice, "atlas")
print(f"{fetched.experiments} experiments, {fetched.cells} cells, {len(fetched.failed)} failed")

# %% [markdown]
# ## Merge them over the union of their genes

# %%
merged = merge("atlas", qc=True)
cells = ad.read_h5ad("atlas/merged.h5ad")
print(cells)

# %% [markdown]
# A gene that an experiment lacks is 0 there; `genes.parquet` says where. The flags of `qc` are columns of obs.

# %%
quality = vc.qc("atlas/merged.h5ad", batch_key="experiment")
vc.pl.qc(quality, ax=make_axes())
pd.DataFrame(quality.report)[["batch", "cells", "pass", "median_total_counts", "sparsity", "odd"]]

# %% [markdown]
# ## Genes that vary, whatever the experiment
#
# Experiments differ in depth and tissue. Ranked within experiments, a gene must vary among the cells of one.

# %%
within = vc.hvg("atlas/merged.h5ad", top=60, batch_key="experiment")
pooled = vc.hvg("atlas/merged.h5ad", top=60)
shared = len(set(within.attrs["genes"]) & set(pooled.attrs["genes"]))
vc.pl.hvg(within, ax=make_axes())
print(f"{shared} of 60 genes are chosen either way")

# %% [markdown]
# ## Ready to train
#
# A store without perturbations feeds the diffusion model, and `CellDataset` any other program.

# %%
store = vc.build_store(
    "atlas/merged.h5ad", basis=within.attrs["genes"], out="stores", name="atlas", unperturbed=True,
    group_by=["experiment"], keep=["qc_pass"],
)  # fmt: skip
print(f"{store.n_cells:,} cells in {store.n_runs} experiments; dropped: {dict(store.dropped)}")

# %%
values = np.stack([vc.CellDataset("atlas/merged.h5ad", genes=within.attrs["genes"], values="log1p-cp10k")[i][0]
                   for i in range(0, 600, 3)])  # fmt: skip
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.imshow(values, aspect="auto", cmap="magma", interpolation="nearest")
said = axes.set(xlabel="gene", ylabel="cell", title="log1p CP10K of the chosen genes")
