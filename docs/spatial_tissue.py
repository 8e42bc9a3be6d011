# %% [markdown]
# # Gene regulation across a tissue: one whose truth is known, and a real slice
#
# The first part simulates a tissue, fits it, and compares what was found with what was planted. The second part fits a
# slice of the mouse olfactory bulb, whose truth nobody knows, and reads the scores that say what its data support.

# %%
import os
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import vcelltools as vc
from vcelltools.files.normalize import normalize
from vcelltools.spatial.simulate import simulate_tissue

warnings.simplefilter("ignore")
COLUMNS = ["gene", "cluster", "n_columns", "n_nonzero", "r2_in", "r2_out", "r2_tf", "r2_own", "gain", "p"]


def show_maps(xy, panels, size=6):
    """Draw one value a cell for every title."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), layout="constrained")
    for a, (title, (values, signed)) in zip(axes, panels.items(), strict=True):
        top = np.abs(values).max() or 1.0
        colours = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if signed else {"cmap": "viridis"}
        figure.colorbar(a.scatter(*xy.T, c=values, s=size, linewidths=0, **colours), ax=a, shrink=0.7)
        a.set(title=title, aspect="equal")
        a.set_axis_off()


# %% [markdown]
# ## A tissue whose truth is known
#
# Three cell types lie in layers. Half of the targets receive ligands; the network lists true edges among decoys.

# %%
made = simulate_tissue("sim.h5ad", cells=900, genes=80, radius=100.0, seed=1)
truth = pd.read_parquet(made.truth)
targets = [f"Gene{i + 1}" for i in range(24)]
vc.spatial.fit("sim.h5ad", "run", network=made.network, radius=100.0, genes=targets, null=19, threads=1)
summary = pd.read_parquet("run/summary.parquet")
touched = summary.gene.isin(truth.target[truth.kind == "ligand-receptor"])
summary.groupby(np.where(touched, "receives ligands", "receives none"))[COLUMNS[4:9]].median().round(3)

# %% [markdown]
# `r2_out` is R² on blocks of tissue that did not train. `gain` is how much neighbours add to it: it is large where
# ligands were planted, and near 0 elsewhere. The p-values come from permutations of the sending cells.

# %%
print(f"p ≤ 0.05 with ligands:    {(summary.p[touched] <= 0.05).mean():.0%} of {touched.sum()} models")
print(f"p ≤ 0.05 without ligands: {(summary.p[~touched] <= 0.05).mean():.0%} of {(~touched).sum()} models")

# %% [markdown]
# Which edges come back? The largest coefficients of one target beside what was planted:

# %%
best = summary[touched].sort_values("gain").iloc[-1]
run = vc.spatial.open_run("run")
betas = run.betas(best.gene)
row = betas.values[betas.keys.tolist().index(best.cluster)]
planted = truth[(truth.target == best.gene) & (truth.cluster == best.cluster)].set_index("modulator").beta
found = pd.DataFrame({"fitted": pd.Series(row, betas.names), "planted": planted}).fillna(0)
found[(found != 0).any(axis=1)].sort_values("planted", key=abs, ascending=False).head(8).round(2)

# %% [markdown]
# ### A knockout in a disc
#
# The simulation also gives the true change at rest after a ligand is removed in the middle of the tissue.

# %%
true = ad.read_h5ad(made.knockouts)
ligand = next(g for g in true.uns["knockouts"] if any(g in run.betas(t).modulators.ligands for t in run.genes))
inside = true.obs["in_scope"].to_numpy()
after = run.perturb({ligand: 0.0}, cells=inside, response="exact")
changes = pd.DataFrame(true[:, run.genes].layers[f"delta_{ligand}"], columns=run.genes)
gene = changes.abs().mean().idxmax()
mine = after.delta[:, after.genes.index(gene)]
show_maps(
    run.tissue.xy,
    {
        f"{ligand} is removed here": (inside.astype(float), False),
        f"{gene}: true change": (changes[gene].to_numpy(), True),
        f"{gene}: predicted change": (mine, True),
    },
)

# %%
print(f"correlation over the cells: {np.corrcoef(mine, changes[gene])[0, 1]:.2f}")
print(f"share of the size that is predicted: {mine @ changes[gene] / (changes[gene] @ changes[gene]):.2f}")

# %% [markdown]
# ## A slice of the mouse olfactory bulb
#
# 262 spots with counts. Spots are 0.94 apart, so the radius is 2. There are no cell types: all spots are one cluster.

# %%
data = Path(os.environ["VCELLTOOLS_TEST_DATA"])
normalize(data / "mouse_olfactory_bulb_spatial" / "mOB_262x15928.h5ad", "bulb.h5ad")
genes = ["Mbp", "Penk", "Nrgn", "Egr1", "Sox2", "Vim", "Fabp7", "Apoe", "Plp1", "Ccnd1"]
network = data / "spatial_network" / "mouse_network.parquet"
options = {"layer": "X", "cluster_annot": "none", "radius": 2.0, "network": network, "threads": 1}
vc.spatial.fit("bulb.h5ad", "bulb", genes=genes, **options)
bulb = pd.read_parquet("bulb/summary.parquet")[["gene", *COLUMNS[2:9]]]
bulb.sort_values("gain", ascending=False).round(2)

# %% [markdown]
# Neighbours add something to Mbp and Penk. For Vim, Fabp7 and Apoe the model in which every spot receives only its own
# ligand (`r2_own`) is better than the spatial one: their negative gain says so. The same slice fitted by least squares,
# which penalties of 1e-9 amount to, looks perfect in the sample:

# %%
vc.spatial.fit("bulb.h5ad", "least", genes=genes[:3], l1_reg=1e-9, group_reg=1e-9, score_threshold=-1e9, **options)
pd.read_parquet("least/summary.parquet")[["gene", "r2_in", "r2_out"]].round(2)

# %%
slice_ = vc.spatial.open_run("bulb")
effects = slice_.splash("Mbp").to_frame()
strongest = max(slice_.betas("Mbp").modulators.ligands, key=lambda g: effects[f"beta_{g}"].abs().mean())
expression = slice_.tissue.expression(["Mbp", strongest])
received = slice_.receiver.receive(expression[:, 1:], [strongest])[:, 0]
show_maps(
    slice_.tissue.xy,
    {
        "Mbp: expression": (expression[:, 0], False),
        f"{strongest}: received": (received, False),
        f"{strongest} on Mbp: effect": (effects[f"beta_{strongest}"].to_numpy(), True),
    },
    size=30,
)
