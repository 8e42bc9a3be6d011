"""Small tissues, networks and betadata for the tests of the spatial room."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GENES = [f"Tf{i}" for i in range(4)] + [f"Lig{i}" for i in range(4)] + [f"Rec{i}" for i in range(4)] + [
    f"Gene{i}" for i in range(6)
]  # fmt: skip


def make_tissue_adata(n: int = 120, seed: int = 0, genes: list[str] = GENES, clusters: int = 3):
    """Return an AnnData with clusters 0…, a layer ``imputed_count`` and coordinates of some hundred units."""
    import anndata as ad
    import pandas as pd

    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, 1.0, (n, len(genes))) * (rng.random((n, len(genes))) < 0.8)
    at = {g: i for i, g in enumerate(genes)}
    xy = rng.random((n, 2)) * 600
    if "Gene0" in at:
        x[:, at["Gene0"]] = 0.5 + 0.8 * x[:, at["Tf0"]] + 0.3 * x[:, at["Lig0"]] * x[:, at["Rec0"]]
    c = rng.integers(0, clusters, n)
    obs = pd.DataFrame(
        {"cell_type_int": c, "cell_type": pd.Categorical([f"type {'abcdefgh'[k]}" for k in c]), "half": xy[:, 0] > 300},
        index=[f"cell{i}" for i in range(n)],
    )
    obs["half"] = obs["half"].map({True: "right", False: "left"})
    adata = ad.AnnData(np.zeros((n, len(genes)), np.float32), obs=obs, var=pd.DataFrame(index=genes))
    adata.layers["imputed_count"] = x
    adata.obsm["spatial"] = xy
    return adata


def write_network(folder: Path, rows: list[tuple] | None = None, name: str = "mouse_network.parquet") -> Path:
    """Write a network from rows of (source, target, edge_type, weight, signaling)."""
    import pandas as pd

    default = [(f"Tf{i}", f"Gene{j}", "grn", 1.0, None) for i in range(4) for j in range(6) if (i + j) % 2 == 0]
    default += [
        (f"Lig{i}", f"Rec{i}", "lr", 1.0, "Secreted Signaling" if i % 2 else "Cell-Cell Contact") for i in range(4)
    ]
    default += [("Lig0", "Rec1_Rec2", "lr", 1.0, "ECM-Receptor")]
    default += [(f"Lig{i}", f"Tf{j}", "nichenet", 0.1 * (i + j), None) for i in range(4) for j in range(4)]
    frame = pd.DataFrame(rows or default, columns=["source", "target", "edge_type", "weight", "signaling"])
    frame.to_parquet(folder / name)
    return folder / name


def receive(xy: np.ndarray, x: np.ndarray, radius: float, scale: float = 1.0) -> np.ndarray:
    """Return received ligands by the definition, one pair of cells at a time."""
    n = len(xy)
    out = np.zeros(x.shape)
    for i in range(n):
        for j in range(n):
            w = np.exp(-((xy[i] - xy[j]) ** 2).sum() / (2 * radius**2))
            out[i] += w * np.where(x[j] > 1e-9, x[j], 0.0)
    return out * scale / n
