"""The spatial room compared with plain loops and an independent solver: ligands, derivatives, knockouts, fits."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tests.tissues import GENES, make_tissue_adata, receive
from vcelltools.kernels.bilinear import GROUP, WIDE
from vcelltools.spatial._received import Exact, Fast, Receiver
from vcelltools.spatial.betadata import Betas
from vcelltools.spatial.fitted import Engine, compute_splash
from vcelltools.spatial.lasso import get_group_penalties, solve
from vcelltools.spatial.tissue import open_tissue

NAMES = ("Tf0", "Tf1", "Lig0$Rec0", "Lig1$Rec1", "Lig2$Lig2", "Lig0$Lig3", "Lig1#Tf1", "Lig3#Tf2")


def make_betas(target: str, seed: int, *, keys: np.ndarray, per_cell: bool = False, names=NAMES) -> Betas:
    rng = np.random.default_rng(seed)
    return Betas(
        target, names, keys, rng.normal(size=len(keys)), rng.normal(size=(len(keys), len(names))) * 0.4, per_cell
    )


@pytest.fixture
def tissue():
    return open_tissue(make_tissue_adata(60))


def get_all(tissue, radius=150.0, scale=1.0):
    """Return expression and received ligands of all genes, as dicts of columns."""
    x = tissue.expression(GENES)
    W = receive(tissue.xy, x, radius, scale)
    return dict(zip(GENES, x.T.copy(), strict=True)), dict(zip(GENES, W.T.copy(), strict=True))


def splash_loops(betas, rows, x, W, W0, s=1.0, cap=None):
    """Return {gene: (n,)} by the definition, one cell and modulator at a time."""
    out = {g: np.zeros(len(rows)) for g in betas.modulators.genes}
    for i, r in enumerate(rows):
        for name, b in zip(betas.names, betas.values[r], strict=True):
            if "$" in name:
                ligand, receptor = name.split("$")
                if x[receptor][i] > 1e-9:
                    out[receptor][i] += s * b * W[ligand][i]
                out[ligand][i] += s * b * x[receptor][i]
            elif "#" in name:
                ligand, tf = name.split("#")
                out[ligand][i] += s * b * x[tf][i]
                out[tf][i] += s * b * W0[ligand][i]
            else:
                out[name][i] += b
    return {g: v if cap is None else np.clip(v, -cap, cap) for g, v in out.items()}


def value_loops(betas, rows, x, W, s=1.0):
    """Return (n,) the value of the model without the intercept."""
    out = np.zeros(len(rows))
    for name, b in zip(betas.names, betas.values.T, strict=True):
        if "$" in name or "#" in name:
            ligand, other = name.replace("#", "$").split("$")
            out += s * b[rows] * W[ligand] * x[other]
        else:
            out += b[rows] * x[name]
    return out


def perturb_loops(all_betas, tissue, desired, scope, hops, *, exact, s=1.0, cap=None, radius=150.0):
    """Return the published scheme and the exact response, by their definitions."""
    x0, W0 = get_all(tissue, radius)
    top = {g: v.max() for g, v in x0.items()}
    rows = {b.target: np.arange(tissue.n_cells) if b.per_cell else tissue.clusters for b in all_betas}
    ligands = {g for b in all_betas for g in b.modulators.ligands}
    first = {g: np.zeros(tissue.n_cells) for g in GENES}
    for g, v in desired.items():
        first[g][scope] = v - x0[g][scope]
    delta = {g: v.copy() for g, v in first.items()}
    x, W = x0, W0
    for _ in range(hops):
        x1 = {g: x0[g] + delta[g] for g in GENES}
        received = receive(tissue.xy, np.column_stack([x1[g] for g in GENES]), radius)
        W1 = {g: received[:, i] if g in ligands else W0[g] for i, g in enumerate(GENES)}
        new = {g: np.zeros(tissue.n_cells) for g in GENES}
        if exact:
            for b in all_betas:
                r = rows[b.target]
                new[b.target] = value_loops(b, r, x1, W1, s) - value_loops(b, r, x0, W0, s)
        else:
            for g in ligands:
                delta[g] = delta[g] + (W1[g] - W0[g]) - (x1[g] - x0[g])
            for b in all_betas:
                slopes = splash_loops(b, rows[b.target], x, W, W0, s, cap)
                new[b.target] = sum(slopes[g] * delta[g] for g in slopes)
            for g in GENES:
                new[g] = np.where(first[g] != 0, first[g], new[g])
        delta = {g: np.clip(x0[g] + new[g], 0, top[g]) - x0[g] for g in GENES}
        if exact:
            for g in desired:
                delta[g][scope] = first[g][scope]
        x, W = x1, W1
    after = {g: x0[g] + delta[g] for g in GENES}
    for g, v in desired.items():
        after[g][scope] = v
    return after


@pytest.mark.parametrize("d", [2, 3])
def test_received_is_the_double_loop(d):
    rng = np.random.default_rng(1)
    xy, x = rng.random((80, d)) * 500, rng.gamma(1.0, 1.0, (80, 5)) * (rng.random((80, 5)) < 0.7)
    x[3, 0] = 5e-10  # sends nothing
    got = Receiver(xy, radius=120.0, scale=0.7, kernel="exact").receive(x, list("abcde"))
    np.testing.assert_allclose(got, receive(xy, x, 120.0, 0.7), rtol=1e-13)


def test_received_has_the_same_bytes_for_any_number_of_threads():
    rng = np.random.default_rng(6)
    for n in (500, 1300, 2100):  # the weights of the last are not kept
        xy, x = rng.random((n, 2)) * 1000, rng.random((n, 30))
        seen = set()
        for threads in (1, 2):
            with threadpool_limits(threads, user_api="blas"):
                receiver = Receiver(xy, radius=100.0, kernel="exact", threads=threads)
                for columns in (1, 7, 30):
                    seen.add((columns, receiver.receive(x[:, :columns], [str(i) for i in range(columns)]).tobytes()))
        assert len(seen) == 3


def test_the_fast_kernel_keeps_its_certificate():
    rng = np.random.default_rng(2)
    xy = rng.random((6000, 2)) * [4000, 2500]
    x = rng.gamma(0.5, 1.0, (2, 6000))
    fast = Fast(xy, 150.0)
    assert 0 < fast.error_bound <= 1e-6
    error = np.abs(fast.sum(x) - Exact(xy, 150.0).sum(x)) / x.sum(1)[:, None]
    assert error.max() <= fast.error_bound
    one = np.zeros((1, 6000))
    one[0, 17] = 1.0  # a single sender shows the error of the kernel
    error = np.abs(fast.sum(one) - Exact(xy, 150.0).sum(one)).max()
    assert 1e-12 < error <= fast.error_bound


@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("cap", [None, 0.3])
def test_splash_is_the_loop(tissue, per_cell, cap):
    keys = tissue.cells if per_cell else np.arange(3)
    betas = make_betas("Gene0", 5, keys=keys, per_cell=per_cell)
    receiver = Receiver(tissue.xy, radius=150.0)
    genes, got = compute_splash(betas, tissue, receiver, scale=1.7, cap=cap)
    x, W = get_all(tissue)
    rows = np.arange(60) if per_cell else tissue.clusters
    want = splash_loops(betas, rows, x, W, W, 1.7, cap)
    np.testing.assert_allclose(got, np.column_stack([want[g] for g in genes]), rtol=1e-13, atol=1e-14)


def test_splash_is_the_derivative_of_the_model(tissue):
    """Return differences of the value of the model, in which the received ligand is changed directly."""
    betas = make_betas("Gene0", 6, keys=np.arange(3), names=("Tf0", "Lig0$Rec0", "Lig1#Tf1"))
    genes, got = compute_splash(betas, tissue, Receiver(tissue.xy, radius=150.0))
    x, W = get_all(tissue)
    base, h = value_loops(betas, tissue.clusters, x, W), 1e-6
    for i, g in enumerate(genes):
        moved_x = {**x, g: x[g] + h} if not g.startswith("Lig") else x
        moved_W = {**W, g: W[g] + h} if g.startswith("Lig") else W
        slope = (value_loops(betas, tissue.clusters, moved_x, moved_W) - base) / h
        expressed = x[g] > 0 if g.startswith("Rec") else np.ones(60, bool)
        np.testing.assert_allclose(got[expressed, i], slope[expressed], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("response", ["derivative", "exact"])
@pytest.mark.parametrize(
    ("desired", "part", "cap", "per_cell", "s"),
    [
        ({"Tf0": 0.0}, False, None, False, 1.0),
        ({"Lig0": 0.0}, False, None, False, 1.0),
        ({"Lig2": 4.0, "Tf1": 0.0}, True, None, False, 0.5),
        ({"Gene1": 0.0}, True, 0.25, False, 1.0),
        ({"Lig3": 0.0}, True, 0.25, True, 2.0),
        ({"Rec0": 9.0}, False, None, True, 1.0),
    ],
)
def test_perturb_is_the_scheme_written_out(tissue, response, desired, part, cap, per_cell, s):
    keys = np.arange(3)
    betas = [make_betas("Gene0", 1, keys=keys), make_betas("Lig0", 2, keys=keys, names=("Tf1", "Gene0", "Lig1$Rec2"))]
    betas.append(make_betas("Gene1", 3, keys=tissue.cells if per_cell else keys, per_cell=per_cell))
    betas.append(make_betas("Tf1", 4, keys=keys, names=("Gene1", "Lig0$Rec0")))
    engine = Engine(tissue, Receiver(tissue.xy, radius=150.0), betas, also=list(desired), scale=s, cap=cap)
    scope = np.arange(60) % 3 == 0 if part else np.ones(60, bool)
    got = engine.perturb(desired, cells=scope, hops=3, response=response)
    want = perturb_loops(
        betas, tissue, desired, scope, 3, exact=response == "exact", s=s, cap=None if response == "exact" else cap
    )
    np.testing.assert_allclose(got.after, np.column_stack([want[g] for g in got.genes]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("response", ["derivative", "exact"])
def test_perturb_with_more_terms_and_cells_than_a_block(response):
    """The models share most of some 200 terms, each leaves out others, and a cluster has more cells than a block."""
    tissue = open_tissue(make_tissue_adata(200, clusters=1))
    assert len(GENES) ** 2 > GROUP and WIDE < 200
    names = [*GENES, *(f"{a}{mark}{b}" for mark in "$#" for a in GENES for b in GENES[:8] if a != b)]
    betas = [
        make_betas(g, i, keys=np.arange(1), names=tuple(n for k, n in enumerate(names) if k % 5 != i and g not in n))
        for i, g in enumerate(("Gene0", "Lig0", "Tf1"))
    ]
    for b in betas:
        b.values[:] *= 0.05
    got = Engine(tissue, Receiver(tissue.xy, radius=150.0), betas).perturb({"Lig1": 0.0}, hops=3, response=response)
    want = perturb_loops(betas, tissue, {"Lig1": 0.0}, np.ones(200, bool), 3, exact=response == "exact")
    np.testing.assert_allclose(got.after, np.column_stack([want[g] for g in got.genes]), rtol=1e-12, atol=1e-13)
    assert len(np.unique(got.delta[:, got.genes.index("Gene0")])) > 100  # not clipped everywhere


def test_a_run_in_mode_full_is_perturbed_cell_by_cell(tmp_path):
    """Its coefficients by cell, as the file holds them, give the derivatives and the knockouts of the plain loops."""
    from tests.tissues import write_network
    from vcelltools import spatial

    adata = make_tissue_adata(300, clusters=2)
    x, at = adata.layers["imputed_count"], {g: i for i, g in enumerate(GENES)}
    x[:, at["Gene0"]] = 1.0 + (0.1 + adata.obsm["spatial"][:, 0] / 400) * x[:, at["Tf0"]]
    x[:, at["Gene1"]] = 1.0 + 0.7 * x[:, at["Tf1"]]
    options = {"network": write_network(tmp_path), "radius": 60.0, "genes": ["Gene0", "Gene1"]}
    spatial.fit(adata, tmp_path / "run", mode="full", epochs=15, **options)
    run = spatial.open_run(tmp_path / "run", adata)
    both = [run.betas(g) for g in run.genes]
    assert [b.per_cell for b in both] == [True, False] and np.ptp(both[0].values[:, 0]) > 0
    want = perturb_loops(both, run.tissue, {"Tf0": 0.0}, np.ones(300, bool), 2, exact=False, radius=60.0)
    got = run.perturb({"Tf0": 0.0}, hops=2)
    np.testing.assert_allclose(got.simulated, np.column_stack([want[g] for g in got.genes]), rtol=1e-12, atol=1e-13)
    table = run.splash("Gene0").columns
    np.testing.assert_array_equal(table["beta_Tf0"], both[0].values[:, both[0].names.index("Tf0")])


def make_regression(n: int, k: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return centred X (n, k), whose columns correlate and one is a copy, and y (n,), which depends on five of them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, k)) + rng.normal(size=(n, 1))
    X[:, 7] = X[:, 3]
    y = X[:, :5] @ rng.normal(size=5) + rng.normal(size=n)
    return X - X.mean(0), y - y.mean()


@pytest.mark.parametrize("scale", ["group-size", "none", "inverse-group-size"])
@pytest.mark.parametrize(("l1", "group"), [(0.1, 0.0), (0.02, 0.02), (0.0, 0.05), (1e-9, 1e-9), (5.0, 0.1)])
def test_fits_meet_their_certificate_and_no_solver_does_better(l1, group, scale):
    from scipy.optimize import minimize

    X, y = make_regression(90, 30, seed=8)
    starts = np.array([0, 6, 20, 20, 30])
    sizes = np.diff(starts)
    lam = get_group_penalties(group, sizes, scale)
    found = solve(X.T @ X / 90, X.T @ y / 90, starts, l1=l1, lam_g=lam)
    assert found.kkt <= 1e-6

    def norm(w):
        return sum(v * np.linalg.norm(w[a:b]) for v, a, b in zip(lam, starts, starts[1:], strict=False))

    def value(w):
        return ((y - X @ w) ** 2).sum() / 180 + l1 * np.abs(w).sum() + norm(w)

    def split_value(u):  # positive and negative parts, smooth except for the groups, started near the solution
        w = u[:30] - u[30:]
        return ((y - X @ w) ** 2).sum() / 180 + l1 * u.sum() + norm(w)

    start = np.concatenate([np.maximum(found.w, 0), np.maximum(-found.w, 0)]) + 1e-3
    other = minimize(split_value, start, method="L-BFGS-B", bounds=[(0, None)] * 60, options={"maxiter": 3000})
    assert value(found.w) <= other.fun + 1e-9
    if group == 0.0 or l1 > 1:
        np.testing.assert_allclose(value(found.w), other.fun, rtol=1e-5)


def test_the_objective_is_that_of_cvxpy(tmp_path):
    """Clarabel, an interior-point method, reaches no lower objective than the certificate allows, and neither do we."""
    import json
    import subprocess

    from tests.peers import peer_python

    X, y = make_regression(120, 40, seed=9)
    starts = np.array([0, 6, 20, 20, 40])
    problems = [(l1, group) for l1 in (0.1, 0.01, 1e-4) for group in (0.0, 0.02, 0.1)]
    np.savez(tmp_path / "p.npz", X=X, y=y, starts=starts, problems=problems)
    code = (
        "import sys, json, numpy as np, cvxpy as cp\n"
        "d = np.load(sys.argv[1]); X, y, s = d['X'], d['y'], d['starts']; out = []\n"
        "for l1, g in d['problems']:\n"
        "    w = cp.Variable(X.shape[1])\n"
        "    norms = [g * np.sqrt(b - a) * cp.norm(w[a:b], 2) for a, b in zip(s, s[1:]) if b > a]\n"
        "    p = cp.Problem(cp.Minimize(cp.sum_squares(y - X @ w) / (2 * len(y)) + l1 * cp.norm(w, 1) + sum(norms)))\n"
        "    p.solve(solver='CLARABEL', tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12); out.append(p.value)\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run(
        [peer_python("cvxpy-1.6.7"), "-c", code, tmp_path / "p.npz"], capture_output=True, text=True, check=True
    )
    for (l1, group), theirs in zip(problems, json.loads(done.stdout), strict=True):
        lam = get_group_penalties(group, np.diff(starts), "group-size")
        found = solve(X.T @ X / 120, X.T @ y / 120, starts, l1=l1, lam_g=lam, tol=1e-8)
        norms = sum(v * np.linalg.norm(found.w[a:b]) for v, a, b in zip(lam, starts, starts[1:], strict=False))
        ours = ((y - X @ found.w) ** 2).sum() / 240 + l1 * np.abs(found.w).sum() + norms
        assert found.kkt <= 1e-6 and abs(ours - theirs) <= 1e-9, (l1, group, ours - theirs)
