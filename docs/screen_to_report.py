# %% [markdown]
# # A screen, from raw counts to a report
#
# The screen is simulated: counts of genes and of guides, as a sequencing run delivers them, without any label. Every
# step below takes real files in the same way.

# %%
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt

import vcelltools as vc
from vcelltools.scoring.report.data import write_report

warnings.simplefilter("ignore")


def make_axes():
    """Return the axes of a new figure."""
    return plt.subplots(figsize=(5.5, 3.8), layout="constrained")[1]


made = vc.simulate("screen.h5mu", cells=4000, genes=1200, perturbations=24, depth=3000, guides=True, multiplets=0.05,
                   unassigned=0.05, seed=3)  # fmt: skip
print(made.n_cells, "cells")

# %% [markdown]
# ## Which guide is in which cell
#
# A mixture is fitted to the counts of each guide. Cells of exactly one target are kept, and their labels are written
# beside the counts of the genes.

# %%
assigned = vc.guides("screen.h5mu")
assigned.write_labelled("screen.h5mu", "labelled.h5ad", single=True)
assigned.to_frame().guide_status.value_counts()

# %% [markdown]
# ## Which cells are of good quality

# %%
quality = vc.qc("labelled.h5ad")
vc.pl.qc(quality, ax=make_axes())
print(f"{quality.n_pass:,} of {len(quality.batch):,} cells have no flag")

# %% [markdown]
# ## Which perturbations act
#
# `responders` reports the knock-down of each target and tests the distance of its cells to the controls. `de` tests
# every gene.

# %%
found = vc.responders("labelled.h5ad", permutations=199)
found.to_frame().head(8)

# %%
tested = vc.de("labelled.h5ad")
strongest = tested.count_significant()[0][0]
vc.pl.volcano(tested, strongest, ax=make_axes())
print(f"{strongest}: {tested.significant()[strongest]} genes with FDR < 0.05")

# %% [markdown]
# ## Genes and a store to train on

# %%
genes = vc.hvg("labelled.h5ad", top=300)
vc.pl.hvg(genes, ax=make_axes())
Path("basis.txt").write_text("\n".join(genes.attrs["genes"]) + "\n")
store = vc.build_store(
    "labelled.h5ad", basis="basis.txt", out="stores", name="screen", pert_col="target_gene",
    control="non-targeting", group_by=["batch"], cell_line="line1",
)  # fmt: skip
print(f"{store.n_cells:,} cells, {store.n_perturbations} perturbations, {store.n_genes} genes")

# %% [markdown]
# ## Predict perturbations that the model has not seen
#
# Six perturbations are held out: their cells take no part in the training. The model is a ridge regression from the
# features of genes to effects; `model="transformer"` trains a network with the same call.

# %%
held = sorted(p for p in tested.perturbations)[::4]
Path("split.toml").write_text(
    f'[training]\nscreen = "train"\n\n[fewshot."screen.line1"]\nval = {held[:1]}\ntest = {held[1:]}\n'.replace("'", '"')
)
vc.train("run", stores=["stores/screen"], split="split.toml", features=made.features, model="ridge")
vc.predict("run", "pred.h5ad", source="labelled.h5ad")
cells = ad.read_h5ad("labelled.h5ad")
cells[cells.obs.target_gene.isin([*held[1:], "non-targeting"])].copy().write_h5ad("truth.h5ad")

# %% [markdown]
# ## Score the prediction
#
# 0 is the mean of all perturbations, and 1 the best possible value.

# %%
result = vc.score("pred.h5ad", "truth.h5ad", to_cp10k=True)
write_report(result, "report.html")
for warning in result.warnings:
    print(warning)
result.to_frame()

# %% [markdown]
# Each row of the figure is a prediction, and each column a true effect; a good prediction is closest to its own truth.
# `report.html` holds this figure and others, with the signs that a score was gamed.

# %%
axes = vc.pl.discrimination(result, ax=make_axes())
