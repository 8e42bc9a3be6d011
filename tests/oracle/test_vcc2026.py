"""The 2026 metrics and both ends of their scale against cell-eval2 itself, perturbation by perturbation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import vcelltools as vc
from tests.oracle.vcc2026_pairs import PAIRS, make_pair
from tests.peers import find_peer, peer_python
from vcelltools.errors import DataError
from vcelltools.scoring.vcc2026.metrics import METRICS

ANCHORED = ("anchored", "uneven", "category-order")
UNCORRECTED = ("plain", "ties", "equal", "uneven", "zero-group")
TOLERANCE = 1e-9


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs26")
    for name, settings in PAIRS.items():
        for side, adata in zip(("real", "pred"), make_pair(**settings), strict=True):
            adata.write_h5ad(out / f"{name}.{side}.h5ad")
    return out


def run_peer(folder: Path, backend: str, extra: str, anchored: tuple[str, ...]) -> dict:
    python = peer_python("cell-eval2-0.20.0")
    script = Path(__file__).with_name("vcc2026_peer.py")
    done = subprocess.run(
        [python, script, folder, backend, extra, ",".join(anchored)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def corrected(folder):
    """cell-eval2 with pdex, whose rank test is corrected for continuity; pdex lies in cell-eval's environment."""
    other = find_peer("cell-eval-0.8.2")
    if other is None:
        pytest.skip("the peer cell-eval-0.8.2 (its pdex) is not installed here (make peers)")
    (site,) = (other.parent.parent / "lib").glob("python3*/site-packages")
    return run_peer(folder, "pdex", str(site), ANCHORED)


@pytest.fixture(scope="session")
def uncorrected(folder, tmp_path_factory):
    """cell-eval2 with scanpy's rank test, which is not corrected; it is slow, so on some pairs alone."""
    some = tmp_path_factory.mktemp("uncorrected26")
    for name in UNCORRECTED:
        for side in ("real", "pred"):
            (some / f"{name}.{side}.h5ad").symlink_to(folder / f"{name}.{side}.h5ad")
    return run_peer(some, "scanpy", "", ())


def check(folder: Path, name: str, peer: dict, *, continuity: bool) -> None:
    files = (folder / f"{name}.pred.h5ad", folder / f"{name}.real.h5ad")
    if "error" in peer:
        with pytest.raises(DataError, match="shows no effect"):
            vc.score(*files, continuity=continuity, anchors=False, compat="vcc2026")
        assert "not positive" in peer["error"]
        return
    ours = vc.score(*files, continuity=continuity, anchors="ceiling" in peer, compat="vcc2026")
    for m in METRICS:
        theirs = np.nan if peer["mean"][m] is None else peer["mean"][m]
        assert ours.components[m].value == pytest.approx(theirs, abs=TOLERANCE, nan_ok=True), m
        if "ceiling" in peer:
            assert ours.components[m].baseline == pytest.approx(peer["baseline"][m], abs=TOLERANCE), m
            assert ours.components[m].ceiling == pytest.approx(peer["ceiling"][m], abs=TOLERANCE), m
    (context,) = ours.contexts
    row = {label: i for i, label in enumerate(context.labels)}
    per = context.values.per | {
        "expr_mse_unbiased_capped": context.values.error_p,
        "expr_distance_unbiased": context.values.distance_p,
    }
    seen = 0
    for label, metric, value in peer["tidy"]:
        if metric in per:
            got = per[metric][row[label]]
            assert got == pytest.approx(np.nan if value is None else value, abs=TOLERANCE, nan_ok=True), (label, metric)
            seen += 1
    assert seen >= 6 * len(row)


@pytest.mark.peer
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_cell_eval2(folder, corrected, name):
    check(folder, name, corrected[name], continuity=True)


@pytest.mark.peer
@pytest.mark.parametrize("name", UNCORRECTED)
def test_equal_to_cell_eval2_without_continuity(folder, uncorrected, name):
    check(folder, name, uncorrected[name], continuity=False)


@pytest.mark.peer
def test_scores_between_the_ends(folder, corrected):
    """The score is (u − b) / (r − b) of the peer's own numbers, clipped where the rules clip."""
    peer = corrected["anchored"]
    ours = vc.score(folder / "anchored.pred.h5ad", folder / "anchored.real.h5ad", compat="vcc2026").require()
    scores = []
    for m in METRICS:
        s = (peer["mean"][m] - peer["baseline"][m]) / (peer["ceiling"][m] - peer["baseline"][m])
        if m == "expr_mse_unbiased_capped_norm":
            s = min(max(s, 0.0), 1.0)
        if m == "de_wilcoxon_lfc_nmae":
            s = max(s, -6.0)
        assert ours.components[m].score == pytest.approx(s, abs=TOLERANCE)
        scores.append(s)
    assert ours.avg_score == pytest.approx(np.mean(scores), abs=TOLERANCE)
