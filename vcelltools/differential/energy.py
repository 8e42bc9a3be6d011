"""The energy distance between two groups of cells, with a permutation test."""

from __future__ import annotations

import numpy as np

from vcelltools.errors import UsageError

_AT_ONCE = 128
_TIE = 1e-12
"""Relative tolerance of the statistic: labelings that differ only by rounding count as equal."""


def pair_distances(x_ng: np.ndarray) -> np.ndarray:
    """Return the (n, n) float64 Euclidean distances between the rows of ``x_ng``."""
    x = np.asarray(x_ng, np.float64)
    x = x - x.mean(axis=0)
    square = np.einsum("ij,ij->i", x, x)
    out = x @ x.T
    out *= -2.0
    out += square[:, None]
    out += square
    np.maximum(out, 0.0, out=out)
    np.fill_diagonal(out, 0.0)
    return np.sqrt(out, out=out)


def energy_of(distance_nn: np.ndarray, first_bn: np.ndarray) -> np.ndarray:
    """Return the energy distance of every labeling, 2·E|a−b| − E|a−a'| − E|b−b'|, each mean over all pairs.

    Parameters
    ----------
    distance_nn
        (n, n) distances between the pooled cells.
    first_bn
        (b, n) bool: cells of the first group; the group sizes are the same in every row.

    Notes
    -----
    Székely and Rizzo 2013. As in ``score``, the pairs include each cell with itself.
    """
    s = first_bn.astype(np.float64)
    n1 = s.sum(axis=1)
    n2 = distance_nn.shape[0] - n1
    row = distance_nn.sum(axis=1)
    total = row.sum()
    own = np.einsum("ij,ij->i", s @ distance_nn, s)
    touching = s @ row
    cross = touching - own
    rest = total - 2.0 * touching + own
    return 2.0 * cross / (n1 * n2) - own / (n1 * n1) - rest / (n2 * n2)


def test_energy(
    a_ng: np.ndarray, b_ng: np.ndarray, *, permutations: int = 999, seed: int | list[int] = 0
) -> tuple[float, float]:
    """Return the energy distance between two groups of cells and its permutation p-value.

    Parameters
    ----------
    a_ng, b_ng
        Cells × genes of the two groups.
    permutations
        Number of permutations; 0 gives a p of NaN. p = (1 + permutations with at least this distance) / (1 + all).
    seed
        Random seed of the permutations.

    Raises
    ------
    UsageError
        If a group has no cells.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> e, p = test_energy(rng.normal(0, 1, (50, 3)), rng.normal(2, 1, (60, 3)), permutations=99)
    >>> e > 1, p
    (True, 0.01)
    """
    if not len(a_ng) or not len(b_ng):
        raise UsageError("the energy distance needs cells in both groups")
    distance = pair_distances(np.concatenate([a_ng, b_ng]))
    n = len(distance)
    first = np.arange(n) < len(a_ng)
    observed = float(energy_of(distance, first[None])[0])
    if not permutations:
        return observed, float("nan")
    rng, reached = np.random.default_rng(seed), 0
    for start in range(0, permutations, _AT_ONCE):
        labelings = np.tile(first, (min(_AT_ONCE, permutations - start), 1))
        drawn = energy_of(distance, rng.permuted(labelings, axis=1))
        reached += int(np.count_nonzero(drawn >= observed - _TIE * abs(observed)))
    return observed, (1 + reached) / (1 + permutations)


test_energy.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it because of its name
