# %% [markdown]
# # PyTorch on a store
#
# A store keeps cells in an order that can be read fast. Two ways lead from it to PyTorch: single cells through a
# `DataLoader`, and sets of perturbed cells with matched controls through `vc.Sampler`. Both need
# `pip install "vcelltools[torch]"`.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import vcelltools as vc
from vcelltools.torch import create_dataloader

warnings.simplefilter("ignore")
torch.manual_seed(0)
torch.set_num_threads(1)
vc.simulate("screen.h5ad", cells=3000, genes=1000, perturbations=12, inert=0.0, depth=4000, seed=1)
genes = vc.hvg("screen.h5ad", top=200).attrs["genes"]
vc.build_store(
    "screen.h5ad", basis=genes, out="stores", name="screen", pert_col="target_gene", control="non-targeting",
    group_by=["batch"], cell_line_col="cell_line",
)  # fmt: skip
store = vc.open_store("stores/screen")
print(f"{store.n_cells:,} cells × {store.n_genes} genes")

# %% [markdown]
# ## Single cells
#
# `create_dataloader` returns PyTorch's own `DataLoader`. An item is the values of a cell and where it comes from;
# `values` chooses counts, CP10K or log1p of them. Here an autoencoder learns two coordinates of each cell.

# %%
cells = vc.CellDataset("stores/screen", values="log1p-cp10k")
loader = create_dataloader(cells, batch_size=256, seed=0)
width = len(cells.genes)
encoder = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 2))
decoder = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, width))
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
losses = []
for _ in range(15):
    for x, _about in loader:
        loss = nn.functional.mse_loss(decoder(encoder(x.float())), x.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

# %% [markdown]
# ## Sets of cells with their controls
#
# `vc.Sampler` draws sets: cells of one perturbation, each with a control of its own batch. A batch follows from the
# seed and the step alone, so a run that was interrupted continues with the same cells.

# %%
sampler = vc.Sampler(store, set_size=32, sets_per_batch=8, seed=0)
batch = sampler.batch(0)
loaded = batch.load()
perturbed, control = (torch.from_numpy(np.ascontiguousarray(x)).float() for x in (loaded.perturbed, loaded.control))
print(tuple(perturbed.shape), tuple(control.shape))

# %% [markdown]
# The difference of their means is the effect of a perturbation; the first sets of the batch:

# %%
effects = (perturbed.mean(1) - control.mean(1)).numpy()
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="loss", title="autoencoder of single cells")
shown = axes[1].imshow(effects[:, :60], aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
axes[1].set(xlabel="gene", ylabel="set", title="perturbed − control")
bar = figure.colorbar(shown, ax=axes[1])
