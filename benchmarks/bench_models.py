"""All models on held-out groups: the THP-1 screen (a replicate with a third of its perturbations seen) and a
simulated atlas with known truth (held-out cell line; unseen perturbations with features).

    python -m benchmarks.bench_models thp1 --data ../shared/data
    python -m benchmarks.bench_models simulated
    python -m benchmarks.bench_models emission --seeds 3
    python -m benchmarks.bench_models context [--without-context]

``emission`` counts the significant genes of predicted cells in a line without perturbed training cells, beside those of
the true cells. ``context`` scores models on left-out lines of simulated lineages, with or without the step that reads
the control cells. Both print their rows.

Every round is a training with a held-out part that neither training nor the choice of the best step has seen. The
ceiling is one random half of the held-out cells against the other half: two measurements of the same truth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from vcelltools.stores.building.make import build_store
from vcelltools.stores.store import open_store
from vcelltools.training.settings import make_settings
from vcelltools.training.train import train

METRICS = ("pds", "pearson_delta", "mae")
CEILING = "one half against the other"
SCREEN = "papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad"


def run(work: Path, name: str, stores: list, split: str, **options: Any) -> dict[str, Any]:
    """Train on one split; return the scores of all models."""
    split_fpath = work / f"{name}.toml"
    split_fpath.write_text(split, encoding="utf-8")
    settings = make_settings({}, {"out": str(work / name), "split": str(split_fpath), **options})
    summary = train(settings, stores=stores).summary
    final = summary["final"]
    return {**summary["baselines"], "transformer, untrained": final["untrained"], "transformer": final}


def pool(case: str, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each model: means over the rounds, with t intervals, and its gains over perturbation-mean."""
    rows = []
    for model in rounds[0]:
        row: dict[str, Any] = {"case": f"{case}: {model}", "table": case, "model": model, "rounds": len(rounds)}
        for metric in METRICS:
            v = np.array([r[model].get(metric, np.nan) for r in rounds])
            row[metric], row[f"{metric}_half"] = _interval(v)
            if model not in ("perturbation-mean", CEILING):
                gain = v - np.array([r["perturbation-mean"][metric] for r in rounds])
                row[f"{metric}_gain"], row[f"{metric}_gain_half"] = _interval(gain)
        rows.append(row)
    return rows


def _interval(v: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and half of its 95 % t interval."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else None
    return round(float(v.mean()), 4), None if half is None else round(half, 4)


def run_thp1(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Each replicate held out in turn, a seeded third of its perturbations seen."""
    import anndata as ad

    source = args.data / SCREEN
    genes = ad.read_h5ad(source, backed="r").var_names.tolist()
    build_store(
        source, basis=genes, out=work / "stores", name="thp1", pert_col="perturbation", control=["non-targeting"],
        cell_line_col="bio_rep", keep=["confident_guide"], gene_name_col="index",
    )  # fmt: skip
    store = open_store(work / "stores" / "thp1")
    perts = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())
    rounds = []
    for seed in range(args.seeds):
        for line in sorted(store.runs["cell_line"].unique()):
            seen = set(np.random.default_rng([seed, len(rounds)]).permutation(perts)[: len(perts) // 3])
            test = [p for p in perts if p not in seen]
            split = f'[training]\nthp1 = "train"\n[fewshot."thp1.{line}"]\ntest = {json.dumps(test)}\n'
            rounds.append(run(work, f"{line}-{seed}", [store], split, seed=seed, **args.options))
            rounds[-1][CEILING] = get_ceiling(store, line, test)
            print(line, seed, {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in rounds[-1].items()})
    return pool("THP-1, a replicate with a third of its perturbations seen", rounds)


def run_simulated(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A cell line with few perturbations seen; and perturbations seen nowhere, with features."""
    from vcelltools.simulation.simulate import simulate

    made = simulate(
        out=work / "sim.h5ad",
        cells=args.cells,
        genes=args.genes,
        perturbations=args.perturbations,
        cell_lines=4,
        seed=5,
    )
    import anndata as ad

    adata = ad.read_h5ad(work / "sim.h5ad", backed="r")
    line_col = next(c for c in adata.obs.columns if "line" in c)
    targets = [p for p in adata.obs[made.pert_col].unique() if p != made.control]
    mean = np.asarray(adata[:: max(1, adata.n_obs // 4000)].to_memory().X.mean(axis=0)).ravel()
    top = adata.var_names[np.argsort(-mean)[: args.basis]].tolist()
    basis = list(dict.fromkeys([*top, *[t for t in targets if t in set(adata.var_names)]]))
    build_store(
        work / "sim.h5ad", basis=basis, out=work / "stores", name="sim", pert_col=made.pert_col,
        control=[made.control], cell_line_col=line_col, gene_name_col="index",
    )  # fmt: skip
    store = open_store(work / "stores" / "sim")
    lines = sorted(store.runs["cell_line"].unique())
    perts = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())
    few, unseen = [], []
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(perts).tolist()
        held = lines[seed % len(lines)]
        split = f'[training]\nsim = "train"\n[fewshot."sim.{held}"]\ntest = {json.dumps(order[len(perts) // 5 :])}\n'
        few.append(run(work, f"few-{seed}", [store], split, seed=seed, **args.options))
        few[-1][CEILING] = get_ceiling(store, held, order[len(perts) // 5 :])
        print("few-shot", held, {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in few[-1].items()})
        n = len(perts) // 5
        test, val = json.dumps(order[:n]), json.dumps(order[n : n + n // 2])
        split = f'[training]\nsim = "train"\n[heldout]\ntest = {test}\nval = {val}\n'
        options = {**args.options, "features": str(made.features)}
        unseen.append(run(work, f"unseen-{seed}", [store], split, seed=seed, **options))
        unseen[-1][CEILING] = average([get_ceiling(store, line, order[:n]) for line in lines])
        print("unseen", {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in unseen[-1].items()})
    return [
        *pool("simulated, a cell line with a fifth of its perturbations seen", few),
        *pool("simulated, perturbations seen nowhere, with features", unseen),
    ]


def run_emission(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Significant genes of predicted and of true cells, over all genes, in a line of which only controls are known."""
    import anndata as ad

    import vcelltools as vc

    rows = []
    for seed in range(args.seeds):
        name = f"screen{seed}"
        vc.simulate(
            work / f"{name}.h5ad", cells=args.cells, genes=args.genes, perturbations=args.perturbations, cell_lines=4,
            inert=0.0, seed=seed,
        )  # fmt: skip
        vc.normalize(work / f"{name}.h5ad", out=work / "truth.h5ad", force=True)
        truth = ad.read_h5ad(work / "truth.h5ad")
        order = np.argsort(-np.asarray(truth.X.mean(axis=0)).ravel())
        store = build_store(
            work / f"{name}.h5ad", basis=truth.var_names[order[: args.basis]].tolist(), out=work / "stores", name=name,
            pert_col="target_gene", control=["non-targeting"], cell_line_col="cell_line", gene_name_col="index",
        ).path  # fmt: skip
        line = sorted(truth.obs["cell_line"].unique())[-1]
        true = count_genes(truth[truth.obs["cell_line"] == line])
        split = work / f"{name}.toml"
        split.write_text(f'[training]\n{name} = "train"\n[zeroshot]\n"{name}.{line}" = "test"\n', encoding="utf-8")
        for model in ("perturbation-mean", "ridge:balanced", "transformer"):
            kind, _, objective = model.partition(":")
            options = {**(args.options if kind == "transformer" else {}), "objective": objective or None}
            out = work / f"{name}-{kind}"
            train(
                make_settings({}, {"out": str(out), "split": str(split), "model": kind, **options}),
                stores=[open_store(store)],
            )
            for fitted in (True, False):
                vc.predict(out, work / "pred.h5ad", fit_emission=fitted, stores=[open_store(store)], force=True)
                made = count_genes(ad.read_h5ad(work / "pred.h5ad"))
                row = {"seed": seed, "model": model, "fitted": fitted, "true": true, "made": made}
                rows.append({**row, "ratio": round(made / true, 2)})
    return rows


def count_genes(adata: Any) -> int:
    """Return the number of significant genes of all perturbations against the controls."""
    from vcelltools.prediction.emitter import count_significant

    label, X = adata.obs["target_gene"].astype(str).to_numpy(), adata.X.tocsr()
    control = X[label == "non-targeting"].toarray()
    return sum(count_significant(X[label == n].toarray(), control) for n in sorted(set(label) - {"non-targeting"}))


def run_context(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Lines of simulated lineages left out in turn, predicted with or without what the controls say of them."""
    from unittest.mock import patch

    import anndata as ad

    import vcelltools as vc

    rows = []
    for lineages, seed in ((2, 1), (3, 2)):
        name = f"lineages{lineages}"
        made = vc.simulate(
            work / f"{name}.h5ad", cells=18_000, genes=300, perturbations=40, cell_lines=6, lineages=lineages,
            inert=0.1, depth=3000, shared=0.5, seed=seed,
        )  # fmt: skip
        genes = ad.read_h5ad(work / f"{name}.h5ad", backed="r").var_names.tolist()
        store = build_store(
            work / f"{name}.h5ad", basis=genes, out=work / "stores", name=name, pert_col="target_gene",
            control=["non-targeting"], cell_line_col="cell_line", gene_name_col="index",
        ).path  # fmt: skip
        nothing = patch("vcelltools.model.registry.choose", lambda *_, **__: (None, None))
        with nothing if args.without_context else contextlib.nullcontext():
            splits, out = ["leave-one-context-out"], work / f"{name}-compared"
            found = vc.evaluate(args.models, splits, out, stores=[store], features=made.features)
        for model, part in found.table.groupby("model", sort=False):
            value = part.set_index("metric")["value"].round(3)
            rows.append({"lineages": lineages, "seed": seed, "model": model, **value.to_dict()})
    return rows


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of the metrics."""
    return {m: float(np.mean([s[m] for s in scores])) for m in METRICS}


def get_ceiling(store: Any, line: str, perts: list[str], repeats: int = 5) -> dict[str, float]:
    """Score random halves of the cells of a line's groups against the other halves, each with controls of its own."""
    from vcelltools.model.metrics import evaluate_effects

    runs = store.runs[store.runs["cell_line"] == line]
    rows_of: dict[str, np.ndarray] = {}
    for pert, g in runs.groupby(runs["perturbation"].where(~runs["is_control"], "")):
        rows_of[str(pert)] = np.concatenate([np.arange(a, a + n) for a, n in zip(g["start"], g["length"], strict=True)])
    rng, out = np.random.default_rng(0), []
    column = {g: i for i, g in enumerate(store.gene_table["symbol"].tolist())}
    for _ in range(repeats):

        def halve(name: str) -> list[np.ndarray]:
            parts = np.array_split(rng.permutation(rows_of[name]), 2)
            return [store.X[np.sort(p)].astype(np.float32).mean(axis=0, dtype=np.float64) for p in parts]

        zero, names = halve(""), [p for p in perts if len(rows_of.get(p, ())) >= 4]
        halves = [[m - z for m, z in zip(halve(p), zero, strict=True)] for p in names]
        a, b = (np.stack([h[i] for h in halves]) for i in range(2))
        own = np.array([column.get(p, -1) for p in names])
        s = evaluate_effects(a, b, np.zeros(len(names), int), own)
        out.append({"pds": s.pds, "pearson_delta": s.pearson_delta, "mae": s.mae})
    return average(out)


RUNS = {"thp1": run_thp1, "simulated": run_simulated, "emission": run_emission, "context": run_context}
SAVED = ("thp1", "simulated")


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=[*RUNS])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--genes", type=int, default=4_000)
    parser.add_argument("--perturbations", type=int, default=80)
    parser.add_argument("--basis", type=int, default=500)
    parser.add_argument("--option", action="append", default=[], help="a training setting, as KEY=JSON")
    parser.add_argument("--without-context", action="store_true", help="context: leave out the step")
    parser.add_argument("--models", nargs="+", default=["ridge:balanced", "neighbours", "kernel-ridge"], help="context")
    args = parser.parse_args()
    defaults = {"size": "tiny", "sets": 16, "set_size": 32, "steps": 400, "eval_every": 50}
    given = dict(o.split("=", 1) for o in args.option)
    args.options = defaults | {k: json.loads(v) if v[0] in '"[0123456789tf' else v for k, v in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        result = RUNS[args.which](args, Path(folder))
    for row in result:
        sys.stdout.write(f"{row}\n")
    if args.which in SAVED:
        sys.stdout.write(f"{save('models', result, options=args.options)}\n")


if __name__ == "__main__":
    main()
