"""Every number of a scoring against cell-eval's own, over generated pairs full of edge cases.

The peer scores all pairs in one process of its own environment; our side runs here.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
from pathlib import Path

import pytest

import vcelltools as vc
from tests.oracle.pairs import PAIRS, write_pairs
from tests.peers import peer_python

HERE = Path(__file__).parent
FINAL = ("csr", "dense", "float64", "one_sided", "one_cell", "control_mean", "equal_to_truth", "no_de")
STRINGS = ("target", "feature", "reference", "perturbation")
CEILINGS = ("csr", "category_order", "counts_csr", "one_cell")
# name -> (pair, options of the peer, options of ours)
OPTIONS = {
    "cpm_filter": ("one_sided", ["--cpm-filter", "8000"], {"cpm_filter": 8000.0}),
    "cpm_filter_counts": ("counts_csr", ["--cpm-filter", "3000"], {"cpm_filter": 3000.0}),
    "epsilon": ("one_sided", ["--epsilon", "0.5"], {"epsilon": 0.5}),
    "discrete_csr": ("counts_csr", ["--allow-discrete"], {"allow_discrete": True}),
    "discrete_int": ("counts_dense_int", ["--allow-discrete"], {"allow_discrete": True}),
    "ceiling_seed": ("dense", ["--ceiling", "--ceiling-seed", "7"], {"ceiling": True, "ceiling_seed": 7}),
    "skipped": ("csc", ["--skip-metrics", "mse,roc_auc,clustering_agreement"],
                {"skip": ("mse", "roc_auc", "clustering_agreement")}),
    "vcc": ("csr", ["--profile", "vcc"], {"profile": "vcc"}),
    "minimal": ("csr", ["--profile", "minimal"], {"profile": "minimal"}),
    "de": ("csr", ["--profile", "de"], {"profile": "de"}),
    "anndata": ("csr", ["--profile", "anndata"], {"profile": "anndata"}),
    "pds": ("csr", ["--profile", "pds"], {"profile": "pds"}),
}  # fmt: skip
# float64 pairs are exact; in float32 the older peer computes p in single precision; it does not read float16
PAIRS_2025 = tuple(n for n in PAIRS if n != "float16")
# logarithms that are called counts: the older peer sees for itself
DISCRETE_2025 = ("csr", "counts_float64")


def run_peer(peer: str, jobs: list[dict], folder: Path) -> None:
    listing = folder / "jobs.json"
    listing.write_text(json.dumps(jobs))
    done = subprocess.run(
        [peer_python(peer), str(HERE / "peer_cell_eval.py"), str(listing)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def peer_082(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cell_eval_082")
    jobs = [
        {"pred": str(p), "real": str(r), "out": str(folder / name), "args": ["--ceiling"] * (name in CEILINGS)}
        for name, (p, r) in pairs.items()
    ]
    for name, (pair, args, _) in OPTIONS.items():
        p, r = pairs[pair]
        jobs.append({"pred": str(p), "real": str(r), "out": str(folder / name), "args": args})
    run_peer("cell-eval-0.8.2", jobs, folder)
    return folder


@pytest.fixture(scope="session")
def peer_066(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cell_eval_066")
    jobs = [
        {"pred": str(pairs[n][0]), "real": str(pairs[n][1]), "out": str(folder / n), "args": ["--batch-size", "5000"]}
        for n in PAIRS_2025
    ]
    jobs += [
        {"pred": str(pairs[n][0]), "real": str(pairs[n][1]), "out": str(folder / f"discrete_{n}"),
         "args": ["--batch-size", "5000", "--allow-discrete"]}
        for n in DISCRETE_2025
    ]  # fmt: skip
    run_peer("cell-eval-0.6.6", jobs, folder)
    return folder


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open() as f:
        rows = list(csv.reader(f))
    return rows[0], rows[1:]


def same(a: str, b: str, tol: float, *, relative: bool = False) -> bool:
    if (a == "") != (b == ""):
        return False
    if a == "":
        return True
    x, y = float(a), float(b)
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    if math.isinf(x) or math.isinf(y):
        return x == y
    scale = max(abs(x), 1e-38) if relative else max(1.0, abs(x))  # what single precision holds
    return abs(x - y) <= tol * scale


def check_table(theirs: Path, ours: Path, tolerance: dict[str, float], default: float) -> None:
    head, rows = read(theirs)
    our_head, our_rows = read(ours)
    assert our_head == head, theirs.name
    assert len(our_rows) == len(rows), theirs.name
    wrong = []
    for a, b in zip(rows, our_rows, strict=True):
        for name, x, y in zip(head, a, b, strict=True):
            if name in STRINGS or (name == "statistic" and head[0] == "statistic"):
                ok = x == y
            else:
                ok = same(x, y, tolerance.get(name, default), relative=name in ("p_value", "statistic"))
            if not ok:
                wrong.append((theirs.name, a[0], name, x, y))
    assert not wrong, (len(wrong), wrong[:8])


EXACT = {"p_value": 1e-12, "statistic": 1e-12, "fdr": 1e-12}
# the peer averages distances in float32: its energy distances are good to some 1e-6 of a distance
ENERGY = {"pearson_edistance": 2e-5}


def check_all(theirs: Path, ours: Path, de: dict[str, float]) -> None:
    assert not (theirs / "error.txt").exists(), (theirs / "error.txt").read_text()
    names = sorted(p.name for p in theirs.iterdir())
    assert sorted(p.name for p in ours.iterdir() if p.name != "score.json") == names
    for name in names:
        if name.endswith("_de.csv"):
            check_table(theirs / name, ours / name, de, 1e-5)
        else:
            check_table(theirs / name, ours / name, ENERGY, 2e-6)


@pytest.mark.peer
@pytest.mark.parametrize("name", PAIRS)
def test_equals_cell_eval(name, pairs, peer_082, tmp_path):
    result = vc.score(*pairs[name], profile="full", compat="cell-eval", ceiling=name in CEILINGS)
    result.write(tmp_path)
    check_all(peer_082 / name, tmp_path, EXACT)


@pytest.mark.peer
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_cell_eval(name, pairs, peer_082, tmp_path):
    pair, _, options = OPTIONS[name]
    vc.score(*pairs[pair], compat="cell-eval", **{"profile": "full", **options}).write(tmp_path)
    check_all(peer_082 / name, tmp_path, EXACT)


@pytest.mark.peer
@pytest.mark.parametrize("name", PAIRS_2025)
def test_equals_the_rules_of_2025(name, pairs, peer_066, tmp_path):
    vc.score(*pairs[name], profile="full", compat="vcc2025").write(tmp_path)
    exact = name in ("float64", "counts_float64")
    single = {"p_value": 3e-5, "fdr": 1e-5, "statistic": 1e-12}
    check_all(peer_066 / name, tmp_path, EXACT if exact else single)


@pytest.mark.peer
@pytest.mark.parametrize("name", DISCRETE_2025)
def test_discrete_values_equal_the_rules_of_2025(name, pairs, peer_066, tmp_path):
    vc.score(*pairs[name], profile="full", compat="vcc2025", allow_discrete=True).write(tmp_path)
    check_all(peer_066 / f"discrete_{name}", tmp_path, {"p_value": 3e-5, "fdr": 1e-5, "statistic": 1e-12})


@pytest.fixture(scope="session")
def final_082(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("final_082")
    run_peer(
        "cell-eval-0.8.2",
        [{"pred": str(pairs[n][0]), "real": str(pairs[n][1]), "out": str(folder / n), "args": ["--profile", "minimal"],
          "score": True} for n in FINAL],
        folder,
    )  # fmt: skip
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("name", FINAL)
def test_final_scores_and_baseline_equal_cell_eval(name, pairs, final_082):
    """The mean baseline is never written by us; the peer writes its cells and evaluates them."""
    theirs = final_082 / name
    assert not (theirs / "error.txt").exists(), (theirs / "error.txt").read_text()
    result = vc.score(*pairs[name], profile="minimal", compat="cell-eval")
    head, rows = read(theirs / "base" / "agg_results.csv")
    base = dict(zip(head, next(r for r in rows if r[0] == "mean"), strict=True))
    final = dict(read(theirs / "final.csv")[1])
    for metric, c in result.components.items():
        assert same(base[metric], str(c.baseline), 2e-6), metric
        assert same(final[metric], str(c.score), 1e-5), metric
    assert float(final["avg_score"]) == pytest.approx(result.avg_score, abs=1e-5)


@pytest.mark.peer
def test_layouts_without_peer_support(pairs, tmp_path):
    """Explicit zeros, unused categories and shuffled columns score as the plain file does."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    pred, real = (ad.read_h5ad(p) for p in pairs["csr"])
    want = vc.score(pred, real, profile="minimal", compat="cell-eval").to_frame()
    X = pred.X.tocsr().copy()
    rows, cols = np.nonzero(X.toarray() == 0)
    zeros = sp.coo_array((np.zeros(200, X.dtype), (rows[:200], cols[:200])), shape=X.shape)
    full = sp.csr_array(
        (np.concatenate([X.data, zeros.data]), (np.concatenate([X.nonzero()[0], zeros.coords[0]]),
                                                np.concatenate([X.nonzero()[1], zeros.coords[1]]))),
        shape=X.shape,
    )  # fmt: skip
    assert full.nnz == X.nnz + 200
    pred.X = full
    pred.obs["target_gene"] = pd.Categorical(
        pred.obs["target_gene"].astype(str), categories=["unused", *sorted(set(pred.obs["target_gene"]))]
    )
    got = vc.score(pred, real, profile="minimal", compat="cell-eval").to_frame()
    pd.testing.assert_frame_equal(got, want, check_exact=True)
    turned = pred[:, ::-1].copy()
    with_note = vc.score(turned, real, profile="minimal", compat="cell-eval").to_frame()
    pd.testing.assert_frame_equal(with_note, want, rtol=1e-6)
