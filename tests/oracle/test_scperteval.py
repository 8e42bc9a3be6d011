"""The profile ``calibrated`` compared with scPertEval 0.2.0: every value and both calibrators, without sampling."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.oracle.pairs import make_adata, make_pair
from tests.peers import peer_python
from vcelltools.scoring.cell_eval.rules import PROFILES

SEED = 7
THEIRS = {"mse_degs": "mse_degs_padj=0.05", "de_overlap_50": "de_overlap_k=50"}
OURS_ALONE = ("mae_degs", "centroid_accuracy", "reciprocal_rank", "top_1", "top_5", "top_10")
METRICS = [m for m in PROFILES["calibrated"] if m not in OURS_ALONE]


@pytest.fixture(scope="module", params=["float64", "float32"])
def scored(request, tmp_path_factory):
    """Return both results of one pair (ours and theirs), and the precision in which the peer averages."""
    folder = tmp_path_factory.mktemp("scperteval")
    pred, real, labels, genes, _ = make_pair(40, n_perts=9, per_pert=47, n_controls=120, n_genes=300, strength=0.5)
    for name, X in (("pred", pred), ("real", real)):
        make_adata(sp.csr_matrix(X.astype(request.param)), labels, genes).write_h5ad(folder / f"{name}.h5ad")
    files = [str(folder / "real.h5ad"), str(folder / "pred.h5ad")]
    script = Path(__file__).parent / "peer_scperteval.py"
    protocols = [THEIRS.get(m, m) for m in METRICS]
    done = subprocess.run(
        [peer_python("scperteval-0.2.0"), str(script), *files, str(SEED), *protocols],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours = vc.score(files[1], files[0], profile="calibrated", ceiling_seed=SEED)
    return ours, json.loads(done.stdout), 1e-9 if request.param == "float64" else 2e-4


@pytest.mark.parametrize("metric", METRICS)
def test_values_and_calibrations_are_equal(scored, metric):
    ours, theirs, tolerance = scored
    peer = theirs[THEIRS.get(metric, metric)]
    # among equal statistics at the end of the list of genes, the choice of the peer comes from a partition
    slack = 0.021 if metric == "de_overlap_50" else tolerance
    wanted = np.array([peer["score"][p] for p in ours.table.names], float)
    np.testing.assert_allclose(ours.table.values(metric), wanted, rtol=tolerance, atol=slack)
    c = ours.components[metric].calibration
    for side, value in (("positive", c.positive), ("negative", c.negative)):
        per = np.array(list(peer[side].values()), float)
        assert value == pytest.approx(np.nanmean(per), rel=tolerance, abs=slack)
    if metric == "de_overlap_50":
        return
    assert c.drf == pytest.approx(peer["drf"]["mean"], rel=10 * tolerance, abs=10 * tolerance)
    assert c.drf_median == pytest.approx(peer["drf"]["median"], rel=10 * tolerance, abs=10 * tolerance)
    assert c.bds == pytest.approx(peer["bds"]["bds"])
