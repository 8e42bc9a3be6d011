"""Received ligands: the sum over all sending cells, computed exactly or on a mesh with a certified error.

The sum is ``W[i, l] = (s / N) sum_j exp(-d_ij^2 / 2 r_l^2) x[j, l]``, including the cell itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from threadpoolctl import ThreadpoolController

from vcelltools.errors import UsageError
from vcelltools.io.stream import get_threads
from vcelltools.kernels.received import fill_weights, fill_windows, gather, spread
from vcelltools.runtime.threads import share_work
from vcelltools.spatial.tissue import TINY

KERNELS = ("exact", "fast", "auto")
RADIUS_RULES = ("one", "by-signaling")
AUTO_CELLS = 5_000  # up to this number of cells, auto is exact
MAX_ERROR = 1e-6
SECRETED = "Secreted Signaling"
_BLOCK = 1 << 20  # maximum number of weights in memory at once
_MAX_NODES = 1 << 26
_PAD = 7.5  # radii between the tissue and its periodic images: exp(-7.5^2 / 2) is 6e-13
# mesh step (as a share of the radius), width of the spreading Gaussian (in steps), and nodes per window
_MESHES = ((1 / 3, 0.95, 12), (1 / 4, 1.05, 14))
_OFFSETS = 33  # per axis; the gridded kernel is compared with the true one there


class Exact:
    """The exact sum over all pairs of cells."""

    error_bound = 0.0

    def __init__(self, at: np.ndarray, radius: float, *, senders: np.ndarray | None = None, threads: int = 1) -> None:
        self._at = np.ascontiguousarray(at.T)
        self._from = self._at if senders is None else np.ascontiguousarray(senders.T)
        self._radius, self._threads = radius, threads
        self._blas = ThreadpoolController()

    @cached_property
    def _kept(self) -> np.ndarray | None:
        """Weights of a small tissue, which are kept for later sums."""
        n, m = self._at.shape[1], self._from.shape[1]
        if n * m > 4 * _BLOCK:
            return None
        out = np.empty((n, m))
        fill_weights(self._at, self._from, self._radius, out)
        return out

    def sum(self, values_lm: np.ndarray) -> np.ndarray:
        """Return (l, n) sums of (l, m) values."""
        values_ml = values_lm.T
        n, m = self._at.shape[1], self._from.shape[1]
        out = np.empty((n, len(values_lm)))
        step = max(1, _BLOCK // m)
        kept, space = self._kept, threading.local()

        def visit(a: int) -> None:
            if kept is not None:
                weights = kept[a : a + step]
            else:
                at = np.ascontiguousarray(self._at[:, a : a + step])
                if not hasattr(space, "weights"):
                    space.weights = np.empty((step, m))
                weights = space.weights[: at.shape[1]]
                fill_weights(at, self._from, self._radius, weights)
            out[a : a + step] = weights @ values_ml

        starts = list(range(0, n, step))
        with self._blas.limit(limits=1, user_api="blas"):  # the last digits would depend on its threads
            share_work(starts, [visit] * min(self._threads, len(starts)))
        return np.ascontiguousarray(out.T)


class Fast:
    """The sum on a mesh, whose error :attr:`error_bound` limits, in units of ``sum_j |x_j|``.

    Every cell is spread with a truncated Gaussian, the mesh is multiplied by the remaining Gaussian in Fourier space,
    and the result is gathered with the same truncated Gaussian. This is a fast Gauss transform by gridding, with the
    two windows of Greengard & Lee 2004 (doi:10.1137/S003614450343200X).
    """

    def __init__(self, at: np.ndarray, radius: float, *, senders: np.ndarray | None = None, threads: int = 1) -> None:
        if at.shape[1] != 2:
            raise UsageError("the fast kernel works in two dimensions", hint="kernel exact")
        self._threads = threads
        for step, width, k in _MESHES:
            self._set_up(at, at if senders is None else senders, radius, step * radius, width * step * radius, k)
            if self.error_bound <= MAX_ERROR:
                break

    def _set_up(self, at: np.ndarray, senders: np.ndarray, radius: float, step: float, width: float, k: int) -> None:
        from scipy.fft import next_fast_len

        shape = []
        self._to: list[np.ndarray] = []  # windows of the receivers: first nodes and weights, on y and on x
        self._by: list[np.ndarray] = []  # and of the senders
        for axis in (1, 0):
            origin = float(min(at[:, axis].min(), senders[:, axis].min())) - k * step
            last = 0
            for windows, places in ((self._to, at), (self._by, senders)):
                first, weights = np.empty(len(places), np.int64), np.empty((len(places), k))
                fill_windows(np.ascontiguousarray(places[:, axis]), origin, step, width, first, weights)
                windows.extend([first, weights])
                last = max(last, int(first.max()))
            shape.append(next_fast_len(last + k + math.ceil(_PAD * radius / step), real=True))
        self.shape = (shape[0], shape[1])
        scale = radius * step / (math.sqrt(2 * math.pi) * width**2)
        rest = radius**2 - 2 * width**2
        full = [scale * np.exp(-2 * math.pi**2 * np.fft.fftfreq(m, step) ** 2 * rest) for m in self.shape]
        self._factor = full[0][:, None] * full[1][None, : self.shape[1] // 2 + 1]
        errors = [certify(c, radius, step, width, k) for c in full]
        self.error_bound = (1 + errors[0]) * errors[1] + errors[0]

    def sum(self, values_lm: np.ndarray) -> np.ndarray:
        """Return (l, n) sums of (l, m) values."""
        from scipy.fft import irfft2, rfft2

        out = np.empty((len(values_lm), len(self._to[0])))
        (fy, wy, fx, wx), (from_y, from_wy, from_x, from_wx) = self._to, self._by

        def visit(column: int) -> None:
            grid = np.zeros(self.shape)
            spread(from_y, from_x, from_wy, from_wx, values_lm[column], grid)
            waves = rfft2(grid)
            waves *= self._factor
            gather(fy, fx, wy, wx, irfft2(waves, self.shape), out[column])

        columns = range(len(values_lm))
        if columns:
            share_work(columns, [visit] * min(self._threads, len(columns)))
        return out


def certify(factor_m: np.ndarray, radius: float, step: float, width: float, k: int) -> float:
    """Return a bound of the gridded kernel's error on one axis, over all positions of sender and receiver.

    The gridded kernel depends on the offsets of both from their nodes and on the number of nodes between them. The
    error is smooth in both offsets. It is computed at 33 × 33 offsets for every separation, and the second differences
    bound its increase between these.
    """
    m = len(factor_m)
    kernel = np.fft.ifft(factor_m).real
    offsets = np.linspace(0.0, 1.0, _OFFSETS)
    nodes = np.arange(k) - (k // 2 - 1)
    windows = np.exp(-0.5 * ((offsets[:, None] - nodes[None, :]) * step / width) ** 2)
    reach = m - math.ceil(_PAD * radius / step)  # separations that occur
    separations = np.arange(-k, reach)
    shifted = kernel[(separations[:, None, None] + nodes[None, None, :] - nodes[None, :, None]) % m]
    worst = np.empty((_OFFSETS, _OFFSETS))
    bends = 0.0
    half = windows @ shifted.transpose(1, 0, 2).reshape(k, -1)
    half = half.reshape(_OFFSETS, len(separations), k)
    got = half @ windows.T  # (offset of the sender, separation, offset of the receiver)
    distance = (separations[None, :, None] + offsets[None, None, :] - offsets[:, None, None]) * step
    error = got - np.exp(-0.5 * (distance / radius) ** 2)
    worst = np.abs(error).max()
    for axis in (0, 2):
        bends += float(np.abs(np.diff(error, 2, axis=axis)).max()) / 8
    return float(worst) + bends


class Receiver:
    """Computes received ligands of one tissue, with fixed radii, scale and kernel, for any expression."""

    def __init__(
        self,
        xy: np.ndarray,
        *,
        radius: float,
        scale: float = 1.0,
        kernel: str = "auto",
        radii: dict[str, float] | None = None,
        senders: np.ndarray | None = None,
        threads: int | None = None,
    ) -> None:
        """Set up the kernel.

        Parameters
        ----------
        xy
            (n, d) coordinates.
        radius, scale
            Radius of ligands that are not in ``radii``, and the factor ``s``.
        kernel
            ``exact``, ``fast`` or ``auto``, which is exact up to 5,000 cells.
        radii
            Radii of some ligands.
        senders
            (n, d) other coordinates from which the cells send.
        """
        if kernel not in KERNELS:
            raise UsageError(f"kernel {kernel!r} is not known", hint=f"one of: {', '.join(KERNELS)}")
        for value, name in ((radius, "radius"), (scale, "weighted_ligand_scale_factor")):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}; a number above 0 is expected")
        self.xy, self.radius, self.scale = xy, radius, scale
        self._radii = radii or {}
        self._threads, self._senders = get_threads(threads), senders
        self._asked = kernel
        self._sums: dict[float, Exact | Fast] = {}

    def reorder(self, order: np.ndarray) -> Receiver:
        """Return a receiver of the same kind for the cells in another order."""
        return Receiver(
            self.xy[order], radius=self.radius, scale=self.scale, kernel=self._asked, radii=self._radii,
            threads=self._threads,
        )  # fmt: skip

    def move_senders(self, senders: np.ndarray) -> Receiver:
        """Return a receiver of the same kind in which the cells send from other coordinates."""
        return Receiver(
            self.xy, radius=self.radius, scale=self.scale, kernel=self._asked, radii=self._radii, senders=senders,
            threads=self._threads,
        )  # fmt: skip

    def radius_of(self, ligand: str) -> float:
        """Return the radius of a ligand."""
        return self._radii.get(ligand, self.radius)

    def _get_sum(self, radius: float) -> Exact | Fast:
        if radius not in self._sums:
            n, d = self.xy.shape
            nodes = np.prod(np.ptp(self.xy, axis=0) / (radius / 3) + 60.0)
            fast = self._asked == "fast" or (
                self._asked == "auto" and n > AUTO_CELLS and d == 2 and nodes <= min(_MAX_NODES, n * n / 20)
            )
            if fast and nodes > _MAX_NODES:
                raise UsageError(
                    f"radius {radius:g} is too small for the tissue: the mesh of the fast kernel would have "
                    f"{nodes:,.0f} nodes",
                    hint="kernel exact, or check the units of the coordinates",
                )
            cls = Fast if fast else Exact
            self._sums[radius] = cls(self.xy, radius, senders=self._senders, threads=self._threads)
        return self._sums[radius]

    @property
    def error_bound(self) -> float:
        """The largest certified error of the kernels in use, in units of ``s/N sum_j x_j``; 0 if all are exact."""
        return max((s.error_bound for s in self._sums.values()), default=0.0)

    def receive(self, values_nl: np.ndarray, ligands: Sequence[str]) -> np.ndarray:
        """Return (n, l) received ligands; values up to 1e-9 are not sent."""
        return np.ascontiguousarray(self.receive_rows(values_nl.T, ligands).T)

    def receive_rows(self, values_ln: np.ndarray, ligands: Sequence[str]) -> np.ndarray:
        """Return (l, n) received ligands of (l, n) expression."""
        sent = np.where(values_ln > TINY, values_ln, 0.0)
        by_radius: dict[float, list[int]] = {}
        for i, ligand in enumerate(ligands):
            by_radius.setdefault(self.radius_of(ligand), []).append(i)
        out = np.zeros((len(ligands), len(self.xy)))
        for radius, rows in by_radius.items():
            one = len(rows) == len(ligands)
            got = self._get_sum(radius).sum(np.ascontiguousarray(sent if one else sent[rows]))
            if one:
                out = got
            else:
                out[rows] = got
        out *= self.scale / values_ln.shape[1]
        return out


def get_radii(pairs: Sequence[tuple[str, str, str | None]], *, rule: str, contact_distance: float) -> dict[str, float]:
    """Return the radii of contact ligands: with ``by-signaling``, those whose first pair is not secreted."""
    if rule not in RADIUS_RULES:
        raise UsageError(f"radius_rule {rule!r} is not known", hint=f"one of: {', '.join(RADIUS_RULES)}")
    if rule == "one":
        return {}
    first: dict[str, str | None] = {}
    for ligand, _, kind in pairs:
        first.setdefault(ligand, kind)
    return {ligand: contact_distance for ligand, kind in first.items() if kind != SECRETED}
