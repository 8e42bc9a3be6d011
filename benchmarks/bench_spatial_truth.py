"""What the spatial wing finds in tissues whose regulation is known: planted edges, knock-outs, and false positives.

python -m benchmarks.bench_spatial_truth --seeds 0 1 2 3 --confound 0
python -m benchmarks.bench_spatial_truth --seeds 0 1 2 3 --confound 1 --untouched

Every tissue is fitted as a user would, with penalties from cross-validation. Edges are counted over (target, cluster,
modulator); true edges lie among the decoys of the network, and every ligand-receptor pair is a candidate for every
target. Knock-outs are of a gene in a disc: the predicted mean change of every target and cluster is compared with the
true one, near the disc (up to twice the radius from it) and further out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.spatial._run import Run

RADIUS, LEVEL = 100.0, 0.05
KINDS = ("tf", "ligand-receptor")
SCORES = ("r2_in", "r2_out", "r2_tf", "r2_own", "gain", "ceiling")
MATTERS = 0.1  # of a knock-out's largest true change: the sign of smaller ones is not asked for


def make_tissue(folder: Path, **options: Any) -> pd.DataFrame:
    """Simulate a tissue in a folder; return its planted coefficients."""
    import pandas as pd

    from vcelltools.spatial.simulate import simulate_tissue

    folder.mkdir(parents=True, exist_ok=True)
    simulate_tissue(folder / "sim.h5ad", radius=RADIUS, force=True, **options)
    return pd.read_parquet(folder / "sim.truth.parquet")


def fit_tissue(
    folder: Path, truth: pd.DataFrame, *, untouched: bool = False, **options: Any
) -> tuple[Run, pd.DataFrame]:
    """Fit every target of the truth, or those that no ligand touches; return the run and its summary with classes."""
    import pandas as pd

    from vcelltools import spatial

    touched = set(truth.target[truth.kind == "ligand-receptor"])
    hidden = set(truth.target[truth.kind == "none"])
    targets = sorted(set(truth.target) - (touched if untouched else set()))
    run = folder / "run"
    spatial.fit(
        folder / "sim.h5ad", run, network=folder / "mouse_network.parquet", radius=RADIUS, genes=targets, threads=1,
        force=True, **options,
    )  # fmt: skip
    summary = pd.read_parquet(run / "summary.parquet")
    summary["class"] = ["touched" if g in touched else "hidden" if g in hidden else "null" for g in summary.gene]
    return spatial.open_run(run, folder / "sim.h5ad"), summary


class Terms:
    """The columns of a tissue's models: the expression of a TF, or a received ligand times its receptor."""

    def __init__(self, run: Run, modulators: Iterable[str]) -> None:
        names = [m.partition("$") for m in modulators]
        genes, ligands = sorted({b or a for a, _, b in names}), sorted({a for a, _, b in names if b})
        self._x = dict(zip(genes, run.tissue.expression(genes).T, strict=True))
        W = run.receiver.receive(run.tissue.expression(ligands), ligands)
        self._W = dict(zip(ligands, W.T, strict=True))

    def __getitem__(self, modulator: str) -> np.ndarray:
        a, _, b = modulator.partition("$")
        return self._W[a] * self._x[b] if b else self._x[a]


def measure_edges(folder: Path, run: Run, truth: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return what was planted, chosen and hit by kind and rule of selection, and the size of what was chosen."""
    import pandas as pd

    planted = {(r.target, r.cluster, r.modulator): r.beta for r in truth.itertuples() if r.kind != "none"}
    found = {}
    for gene in run.genes:
        b = run.betas(gene)
        for i, j in zip(*np.nonzero(b.values), strict=True):
            found[gene, int(b.keys[i]), b.names[j]] = b.values[i, j]
    rules = {"selected": set(found)}
    if (folder / "run" / "stability.parquet").exists():
        s = pd.read_parquet(folder / "run" / "stability.parquet").query("frequency >= 0.9")
        rules["stable"] = set(zip(s.gene, s.cluster, s.modulator, strict=True)) & set(found)
    out = {}
    terms = Terms(run, {k[2] for k in found})
    for kind in KINDS:
        true = {k: v for k, v in planted.items() if ("$" in k[2]) == (kind == "ligand-receptor")}
        for rule, chosen in rules.items():
            mine = {k for k in chosen if ("$" in k[2]) == (kind == "ligand-receptor")}
            hits = mine & true.keys()
            out[f"{kind}, {rule}"] = {
                "planted": len(true), "chosen": len(mine), "hits": len(hits),
                "same_sign": sum(bool(np.sign(found[k]) == np.sign(true[k])) for k in hits),
                "sizes": [(abs(found[k]) * float(terms[k[2]][run.tissue.clusters == k[1]].std()), k in true)
                          for k in mine],
            }  # fmt: skip
    return out


def measure_ceiling(run: Run, truth: pd.DataFrame, summary: pd.DataFrame) -> np.ndarray:
    """Return (k,) for every row of the summary the R² of the planted model itself."""
    tissue, out, terms = run.tissue, [], Terms(run, set(truth.modulator[truth.kind != "none"]))
    planted = dict(iter(truth[truth.kind != "none"].groupby(["target", "cluster"])))
    for row in summary.itertuples():
        cells = tissue.clusters == row.cluster
        y = tissue.expression([row.gene])[cells, 0]
        mine = planted.get((row.gene, row.cluster))
        value = sum(t.beta * terms[t.modulator][cells] for t in mine.itertuples()) if mine is not None else 0.0
        base = np.median((y - value)[y > 0])
        out.append(1.0 - float(((y - np.maximum(base + value, 0.0)) ** 2).mean() / np.var(y)))
    return np.array(out)


def measure_knockouts(folder: Path, run: Run, response: str, hops: int) -> list[dict[str, Any]]:
    """Return one row a knock-out and place: how the predicted changes of the targets agree with the true ones.

    Those that matter are counted: of the same sign, predicted as no change (``silent``), their rank correlation, the
    share of the truth that is predicted (``size``), and how often they are larger than a predicted change of a target
    that truly stays as it is (``found``; 0.5 is chance).
    """
    import anndata as ad
    from scipy.stats import spearmanr

    true = ad.read_h5ad(folder / "sim.knockouts.h5ad")
    inside, near = true.obs["in_scope"].to_numpy(), true.obs["near"].to_numpy()
    rows = []
    for gene in true.uns["knockouts"]:
        p = run.perturb({gene: 0.0}, cells=inside, hops=hops, response=response)
        targets = [g for g in run.genes if g != gene]
        mine = p.delta[:, [p.genes.index(g) for g in targets]]
        theirs = np.asarray(true[:, targets].layers[f"delta_{gene}"])
        for place, cells in (("near", near), ("far", ~near)):
            parts = [np.flatnonzero(cells & (run.tissue.clusters == c)) for c in run.tissue.labels]
            if not any(map(len, parts)):  # the tissue is no wider
                continue
            a, b = (np.concatenate([v[part].mean(0) for part in parts if len(part)]) for v in (mine, theirs))
            if np.abs(b).max() < 1e-6:  # nothing happens there
                continue
            at, rest = np.abs(b) > MATTERS * np.abs(b).max(), np.abs(b) < 1e-6
            rows.append({
                "kind": "ligand" if gene.startswith("Lig") else "TF", "place": place, "response": response,
                "n": int(at.sum()), "same_sign": int((np.sign(a[at]) == np.sign(b[at])).sum()),
                "silent": int((a[at] == 0).sum()), "rank": float(spearmanr(a[at], b[at]).statistic),
                "found": float((np.abs(a[at])[:, None] > np.abs(a[rest])).mean()),
                "size": float(a[at] @ b[at] / (b[at] @ b[at])),
            })  # fmt: skip
    return rows


def measure_tissue(folder: Path, *, layer: str = "imputed_count", hops: int = 4, fit: dict[str, Any],
                   untouched: bool = False, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Simulate, fit and compare one tissue; return what was found."""
    truth = make_tissue(folder, **options)
    run, summary = fit_tissue(folder, truth, untouched=untouched, layer=layer, **fit)
    if untouched:
        return {"edges": {}, "knockouts": [], "summary": summary.assign(ceiling=np.nan)}
    knocks = [r for response in ("derivative", "exact") for r in measure_knockouts(folder, run, response, hops)]
    ceiling = measure_ceiling(run, truth, summary) if layer == "imputed_count" else np.nan  # in the truth's own units
    return {"edges": measure_edges(folder, run, truth), "knockouts": knocks, "summary": summary.assign(ceiling=ceiling)}


def summarize_edges(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return precision, recall, sign agreement and average precision (by β × sd of its column) over some tissues."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for key, counts in one["edges"].items():
            groups.setdefault(key, []).append(counts)
    out = []
    for key, many in groups.items():
        n = {k: sum(one[k] for one in many) for k in ("planted", "chosen", "hits", "same_sign")}
        ranked = np.array([hit for _, hit in sorted((s for one in many for s in one["sizes"]), reverse=True)], float)
        precision = ranked.cumsum() / np.arange(1, len(ranked) + 1)
        out.append({
            "edges": key, "planted": n["planted"], "chosen": n["chosen"], "precision": n["hits"] / max(n["chosen"], 1),
            "recall": n["hits"] / n["planted"], "same sign": n["same_sign"] / max(n["hits"], 1),
            "average precision": float((precision * ranked).sum() / n["planted"]),
        })  # fmt: skip
    return out


def summarize_knockouts(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the agreement of all knock-outs of some tissues by kind, place and response."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in found:
        for r in one["knockouts"]:
            groups.setdefault((r["kind"], r["place"], r["response"]), []).append(r)
    out = []
    for (kind, place, response), rows in sorted(groups.items()):
        n = sum(r["n"] for r in rows)
        out.append({
            "knock-out": kind, "place": place, "response": response, "knock-outs": len(rows), "effects": n,
            **{k.replace("_", " "): sum(r[k] for r in rows) / n for k in ("same_sign", "silent")},
            **{k: float(np.nanmedian([r[k] for r in rows])) for k in ("rank", "found", "size")},
        })  # fmt: skip
    return out


def summarize_null(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by class of target how many tests pass, and R² beside its ceiling."""
    import pandas as pd

    rows = pd.concat([one["summary"] for one in found])
    rows = rows[rows.gene.str.startswith("Gene")]
    out = []
    for name, part in rows.groupby("class"):
        tested = part[part.p.notna()]
        out.append({
            "targets": name, "tests": len(tested), "p <= 0.05": float((tested.p <= LEVEL).mean()),
            "p <= 0.05, gain > 0": float(((tested.p <= LEVEL) & (tested.gain > 0)).mean()),
            "q <= 0.05": float((tested.q <= LEVEL).mean()),
            **{k: float(part[k].median()) if part[k].notna().any() else np.nan for k in SCORES},
        })  # fmt: skip
    return out


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for r in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()) + " |")
    sys.stdout.flush()


def main() -> None:
    from benchmarks.harness import save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1200)
    parser.add_argument("--genes", type=int, default=156)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--null", type=int, default=19)
    parser.add_argument("--stability", type=int, default=20)
    parser.add_argument("--confound", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--layers", nargs="*", default=["imputed_count"])
    parser.add_argument("--untouched", action="store_true", help="fit only targets without ligands, for the null")
    args = parser.parse_args()
    results = []
    for layer in args.layers:
        for confound in args.confound:
            found = []
            for seed in args.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    found.append(measure_tissue(
                        Path(folder), layer=layer, untouched=args.untouched,
                        fit={"null": args.null, "stability": 0 if args.untouched else args.stability},
                        cells=args.cells, genes=args.genes, confound=confound, seed=seed,
                    ))  # fmt: skip
            what = f"{layer}, confound {confound:g}, {len(found)} tissues of {args.cells:,} cells"
            tables = {
                "edges": summarize_edges(found), "knockouts": summarize_knockouts(found), "null": summarize_null(found)
            }  # fmt: skip
            tables = {k: v for k, v in tables.items() if v}
            for name, rows in tables.items():
                show(f"{name}: {what}", rows)
            results.append({"case": what, **tables})
    save("spatial_truth", results)


if __name__ == "__main__":
    main()
