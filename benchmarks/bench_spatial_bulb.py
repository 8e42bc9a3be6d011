"""Held-out R² in a real slice of 262 spots, for 15 targets, with the blocks cut in twelve directions.

python -m benchmarks.bench_spatial_bulb ../shared/data

The folder holds ``mouse_olfactory_bulb_spatial`` and ``spatial_network``. Every line gives the median over the targets,
and for some of them R² of all columns, of TFs alone and of the cell's own ligands: the lowest, the median and the
highest over the directions. The first direction is the one that ``spatial fit`` uses.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from vcelltools.files.normalize import normalize
from vcelltools.spatial._fit import make_plan
from vcelltools.spatial.blocks import make_folds
from vcelltools.spatial.design import Features, join_columns, measure
from vcelltools.spatial.modulators import KINDS, TF
from vcelltools.spatial.regress import Penalty, Problem, get_path, hold_out
from vcelltools.spatial.settings import make_settings
from vcelltools.spatial.tissue import open_tissue

SHOWN = ("Ccnd1", "Mbp", "Vim")
TARGETS = (*SHOWN, "Penk", "Nrgn", "Egr1", "Sox2", "Fabp7", "Apoe", "Plp1", "Fos", "Gfap", "Cdk4", "Th", "Myc")
RADIUS = 2.0
# name, penalties (l1 and group; in units of the standard deviation of the target if not chosen), and margin
SETTINGS = (
    ("least squares", (1e-9, 1e-9), RADIUS),
    ("chosen by cross-validation", None, RADIUS),
    ("l1 0.05 sd", (0.05, 0.0), RADIUS),
    ("l1 0.1 sd", (0.1, 0.0), RADIUS),
    ("l1 0.05 sd and group 0.01 sd", (0.05, 0.01), RADIUS),
    ("l1 0.05 sd and group 0.01 sd, no margin", (0.05, 0.01), 0.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--directions", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "bulb.h5ad"
        normalize(args.data / "mouse_olfactory_bulb_spatial" / "mOB_262x15928.h5ad", path)
        options = {"network": args.data / "spatial_network" / "mouse_network.parquet", "radius": RADIUS, "layer": "X"}
        chosen = make_settings({**options, "cluster_annot": "none"})
        tissue = open_tissue(path, **chosen.tissue)
        plan = make_plan(tissue, chosen, TARGETS, None, 1)
        columns = join_columns(plan.modulators)
        features, Y = Features(tissue, columns, plan.receiver), tissue.expression(TARGETS)
    rows = np.arange(tissue.n_cells)
    X, own = features.build(rows), features.build(rows, own=True)
    total, sd = ((Y - Y.mean(0)) ** 2).sum(0), Y.std(0)
    for name, penalty, margin in SETTINGS:
        fixed = {} if penalty is None else {"l1_reg": penalty[0], "group_reg": penalty[1], "standardize": True}
        settings = make_settings({**options, "cluster_annot": "none", **fixed})
        m = measure(X, Y, min_nonzero=settings.min_nonzero, standardize=True)
        if penalty is None:
            paths = [get_path(m, columns, g, t, settings) for t, g in enumerate(TARGETS)]
        else:
            paths = [[Penalty(penalty[0] * s, penalty[1] * s)] for s in sd]
        fits = [Problem(m, columns, g, t, settings).fit(paths[t][-1]) for t, g in enumerate(TARGETS)]
        inside = [1 - ((Y[:, t] - f.predict(X)) ** 2).sum() / total[t] for t, f in enumerate(fits)]
        r2 = []
        for angle in np.linspace(0, np.pi, args.directions, endpoint=False):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            folds = make_folds(tissue.xy @ turn, margin)
            models = ((X, KINDS), (X, (TF,)), (own, KINDS))
            held = [hold_out(x, Y, folds, columns, TARGETS, paths, settings, kinds=k) for x, k in models]
            r2.append([[h.r2(total[t]) for t, h in enumerate(one)] for one in held])
        out = np.array(r2)  # direction, model, target
        middle = np.median(out[:, 0], axis=1)
        text = f"medians: {np.median(inside):.2f} in the sample, " if penalty else "medians: "
        print(f"{name}\n  {text}{middle[0]:.2f} held out ({middle.min():.2f} to {middle.max():.2f})")
        for t, g in enumerate(SHOWN):
            said = [f"{v[0]:.2f} ({v.min():.2f}, {np.median(v):.2f}, {v.max():.2f})" for v in out[:, :, t].T]
            print(f"  {g}: all {said[0]}, TFs {said[1]}, own {said[2]}", flush=True)


if __name__ == "__main__":
    main()
