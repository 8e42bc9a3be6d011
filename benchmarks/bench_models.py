"""All models on held-out groups: the THP-1 screen (a replicate with a third of its perturbations seen) and a
simulated atlas with known truth (held-out cell line; unseen perturbations with features).

    python benchmarks/bench_models.py thp1 --data ../shared/data --out benchmarks/results/models_thp1.json
    python benchmarks/bench_models.py simulated --out benchmarks/results/models_simulated.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.pipelines.evaluate import describe
from vcelltools.pipelines.store import open_store
from vcelltools.pipelines.store_make import build_store
from vcelltools.pipelines.train import train
from vcelltools.pipelines.train_settings import make_settings

SCREEN = "papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad"


def run(work: Path, name: str, stores: list, split: str, **options: Any) -> dict[str, Any]:
    """Train on one split; return the scores of all models."""
    split_fpath = work / f"{name}.toml"
    split_fpath.write_text(split, encoding="utf-8")
    settings = make_settings({}, {"out": str(work / name), "split": str(split_fpath), **options})
    summary = train(settings, stores=stores).summary
    final = summary["final"]
    return {**summary["baselines"], "transformer, untrained": final["untrained"], "transformer": final}


def pool(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each model's mean over the rounds, with the rounds' own values and a t interval over them."""
    from scipy.stats import t

    out: dict[str, Any] = {}
    for model in rounds[0]:
        out[model] = {}
        for metric in ("pds", "pearson_delta", "mae"):
            v = np.array([r[model][metric] for r in rounds])
            half = float(t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else None
            out[model][metric] = {"mean": float(v.mean()), "ci95_half": half, "rounds": v.round(5).tolist()}
    gain = [r["transformer"]["pds"] - r["perturbation-mean"]["pds"] for r in rounds]
    out["pds_gain_over_perturbation_mean"] = {"mean": float(np.mean(gain)), "rounds": np.round(gain, 5).tolist()}
    return out


def run_thp1(args: argparse.Namespace, work: Path) -> dict[str, Any]:
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
            print(line, seed, {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in rounds[-1].items()})
    return pool(rounds)


def run_simulated(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A cell line with few perturbations seen; and perturbations seen nowhere, with features."""
    from vcelltools.pipelines.simulate import simulate

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
    out = {}
    few, unseen = [], []
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(perts).tolist()
        held = lines[seed % len(lines)]
        split = f'[training]\nsim = "train"\n[fewshot."sim.{held}"]\ntest = {json.dumps(order[len(perts) // 5 :])}\n'
        few.append(run(work, f"few-{seed}", [store], split, seed=seed, **args.options))
        print("few-shot", held, {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in few[-1].items()})
        n = len(perts) // 5
        test, val = json.dumps(order[:n]), json.dumps(order[n : n + n // 2])
        split = f'[training]\nsim = "train"\n[heldout]\ntest = {test}\nval = {val}\n'
        options = {**args.options, "features": str(made.features)}
        unseen.append(run(work, f"unseen-{seed}", [store], split, seed=seed, **options))
        print("unseen", {m: (round(v["pds"], 3), round(v["pearson_delta"], 3)) for m, v in unseen[-1].items()})
    out["held_out_context"] = pool(few)
    out["unseen_perturbations"] = pool(unseen)
    out["split_half_ceiling"] = ceiling(store, lines)
    return out


def ceiling(store: Any, lines: list[str]) -> dict[str, Any]:
    """Score one random half of every group's cells against the other: what noise allows."""
    from vcelltools.model.metrics import evaluate_effects

    runs, halves, ids = store.runs, ([], []), []
    rng = np.random.default_rng(0)
    for line in lines:
        members = runs[runs["cell_line"] == line]

        def split(rows: np.ndarray) -> list[np.ndarray]:
            rows = rng.permutation(rows)
            return [store.X[np.sort(r)].astype(np.float32).mean(axis=0) for r in np.array_split(rows, 2)]

        spans = dict(list(members.groupby("perturbation")))
        rows_of = {
            k: np.concatenate([np.arange(a, a + n) for a, n in zip(g["start"], g["length"], strict=True)])
            for k, g in spans.items()
        }
        control = next(p for p in rows_of if spans[p]["is_control"].iloc[0])
        base = split(rows_of.pop(control))
        for rows in rows_of.values():
            if len(rows) >= 4:
                for half, mean, zero in zip(halves, split(rows), base, strict=True):
                    half.append(mean - zero)
                ids.append(lines.index(line))
    return describe(evaluate_effects(np.stack(halves[0]), np.stack(halves[1]), np.array(ids)))


def main() -> None:
    """Run one of the two comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["thp1", "simulated"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--genes", type=int, default=4_000)
    parser.add_argument("--perturbations", type=int, default=80)
    parser.add_argument("--basis", type=int, default=500)
    parser.add_argument("--option", action="append", default=[], help="a training setting, as KEY=JSON")
    args = parser.parse_args()
    defaults = {"size": "tiny", "sets": 16, "set_size": 32, "steps": 600, "eval_every": 100}
    given = dict(o.split("=", 1) for o in args.option)
    args.options = defaults | {k: json.loads(v) if v[0] in '"[0123456789tf' else v for k, v in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        result = {"thp1": run_thp1, "simulated": run_simulated}[args.which](args, Path(folder))
    report = {"which": args.which, "settings": {**vars(args), "data": None, "out": None}, "result": result}
    text = json.dumps(report, indent=1, default=str)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
