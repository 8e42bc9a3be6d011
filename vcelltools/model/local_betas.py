"""A network that varies the coefficients of regressions over a tissue, and starts at the given coefficients.

The coefficients of cell i are ``2 sigmoid(z_i) * beta``, where ``beta`` are those of the cell's cluster and ``z_i`` is
the output of a network for the place of the cell and for its neighbours. This is the model of SpaceTravLR (bioRxiv
2025). The last layer is zero at the start, so that training begins at ``beta`` itself. A coefficient keeps its sign, at
most doubles, and stays 0 if it is 0.

The place is seen either through Fourier features of the coordinates (Tancik et al. 2020, arXiv:2006.10739), or through
a map of inverse distances to the nodes of a mesh and a convolutional network. The map holds nothing but the position.

Several runs are trained side by side: one for each held-out part of the cells, and one on all cells. The error on the
held-out parts decides, for each cluster, at which epoch the last run is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vcelltools.errors import DataError

Params = dict[str, Any]
Array = np.ndarray | jax.Array

PATIENCE = 15  # epochs without progress of any cluster, after which training stops
BATCH = 128
_PROGRESS = 1e-4  # share of the held-out error by which it must fall to count as progress
_WIDTH = 64
_COUNTS = (16, 32, _WIDTH)
_CHANNELS = (16, 32, _WIDTH)
_WAVES = 16
_PERIOD = 2.0  # of a typical wave, in longest sides of the tissue: shorter ones predict held-out blocks worse
_SLOPE = 0.1  # of the negative side at the start
_KEPT = 0.9  # share of the running mean and variance that a mini-batch leaves
_NEAREST = 1e-6
_CHUNK = 1024  # cells that are evaluated at once
_LAYERS = 2  # values of a layer in memory at once, when cells are evaluated
_JAX = 320_000_000  # bytes of JAX itself, and of compiling the programs


@dataclass(frozen=True)
class Config:
    """The shape of the network and of its training; all fields are static when it is compiled.

    Attributes
    ----------
    encoder
        ``position`` (Fourier features) or ``map`` (convolutions).
    mesh
        Nodes on each side of the mesh of the map, a multiple of 8.
    clusters
        Number of clusters with coefficients.
    columns
        Number of coefficients, including the intercept; those beyond the coefficients of a problem are 0.
    batch
        Cells in a mini-batch.
    rate
        Learning rate of Adam.
    """

    encoder: str
    mesh: int
    clusters: int
    columns: int
    batch: int
    rate: float


class Cells(NamedTuple):
    """The cells that a network sees, in float32.

    Attributes
    ----------
    place
        (n, d) coordinates, in [-1, 1] along the longest side.
    counts
        (n, k) neighbours by cluster, in units of the mean number of neighbours.
    cluster
        (n,) int32 position of the cell's cluster among the coefficients.
    X
        (n, columns) the column of the intercept, and the columns of the regression.
    """

    place: Array
    counts: Array
    cluster: Array
    X: Array


class Runs(NamedTuple):
    """What differs between the k + 1 runs; the last one is trained on all cells. All values are float32.

    Attributes
    ----------
    beta
        (k + 1, clusters, columns) coefficients at the start.
    residual
        (k + 1, n) expression less the prediction at the start.
    weight
        (k + 1, n) 1 for the cells of the training, 0 for others.
    """

    beta: Array
    residual: Array
    weight: Array


class Held(NamedTuple):
    """The held-out cells of k runs.

    Attributes
    ----------
    rows, used
        (k, m) int32 cells, and 1 for those that count; the others fill the rows.
    start
        (k, m) prediction at the start.
    low, high
        (k, clusters) range of the expression in the training, to which predictions are clipped.
    """

    rows: Array
    used: Array
    start: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class LocalFit:
    """The result of a training.

    Attributes
    ----------
    factor
        (n, columns) float32 factor on each coefficient of every cell, in (0, 2), at the epoch :attr:`best`.
    sse
        (epochs + 1, k, clusters) float64 held-out sums of squares; the first row is that of the start.
    best
        (clusters,) the epoch with the least held-out error.
    """

    factor: np.ndarray
    sse: np.ndarray
    best: np.ndarray


def _dense(rng: np.random.Generator, n_in: int, n_out: int) -> Params:
    w = rng.uniform(-1.0, 1.0, (n_in, n_out)) * np.sqrt(3 / n_in)
    return {"w": w.astype(np.float32), "b": np.zeros(n_out, np.float32), "slope": np.array(_SLOPE, np.float32)}


def _stack(rng: np.random.Generator, widths: list[int]) -> list[Params]:
    return [_dense(rng, i, o) for i, o in pairwise(widths)]


def init_params(config: Config, rng: np.random.Generator, *, dims: int, n_counts: int) -> tuple[Params, list[Params]]:
    """Return float32 parameters, with a last layer of zeros, and the running means and variances of the map.

    They are arrays of numpy, because JAX would compile a program for each shape.
    """
    params: Params = {"counts": _stack(rng, [n_counts, *_COUNTS])}
    stats: list[Params] = []
    if config.encoder == "map":
        params["map"] = []
        for i, o in pairwise([1, *_CHANNELS]):
            params["map"].append(_dense(rng, 9 * i, o) | {"scale": np.ones(o, np.float32)})
            stats.append({"mean": np.zeros(o, np.float32), "variance": np.ones(o, np.float32)})
    else:
        params["place"] = _stack(rng, [dims + 2 * _WAVES, _WIDTH, _WIDTH])
    heads = config.clusters * config.columns
    params["head"] = {"w": np.zeros((_WIDTH, heads), np.float32), "b": np.zeros(heads, np.float32)}
    return params, stats


def _bend(x: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, slope * x)


def _pass(layers: list[Params], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = _bend(x @ layer["w"] + layer["b"], layer["slope"])
    return x


def _get_waves(dims: int) -> np.ndarray:
    """Return (d, waves) waves of random directions, whose inverse periods are normal."""
    return np.pi / _PERIOD * np.random.default_rng(0).normal(size=(dims, _WAVES)).astype(np.float32)


def _draw_map(place: jax.Array, mesh: int) -> jax.Array:
    """Return (b, mesh, mesh, 1) inverse distances from the cells to the nodes, in units of the nodes' distance."""
    step = 2.0 / mesh
    nodes = (jnp.arange(mesh, dtype=jnp.float32) + 0.5) * step - 1.0
    x, y = (place[:, i, None, None] - nodes.reshape(shape) for i, shape in ((0, (1, 1, -1)), (1, (1, -1, 1))))
    return (step / jnp.maximum(jnp.sqrt(x * x + y * y), _NEAREST))[..., None]


def _convolve(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return the 3 × 3 convolution of (b, h, w, c) as one product, which compiles well in a loop on any device."""
    _, height, width, _ = x.shape
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1) @ w


def _read_map(
    layers: list[Params], stats: list[Params], x: jax.Array, weight: jax.Array | None
) -> tuple[jax.Array, list[Params]]:
    """Return (b, width) features of maps. Mini-batches are normalised by their own moments if they have weights."""
    out = []
    for layer, known in zip(layers, stats, strict=True):
        x = _convolve(layer["w"], x)
        mean, variance = known["mean"], known["variance"]
        if weight is not None:
            share = weight / (jnp.maximum(weight.sum(), 1.0) * x.shape[1] * x.shape[2])
            mean = jnp.einsum("b,bhwc->c", share, x)
            variance = jnp.einsum("b,bhwc->c", share, (x - mean) ** 2)
            batch = {"mean": mean, "variance": variance}
            out.append({k: _KEPT * known[k] + (1 - _KEPT) * batch[k] for k in known})
        x = _bend((x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["b"], layer["slope"])
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    return x.mean((1, 2)), out


def _apply(
    config: Config, params: Params, stats: list[Params], cells: Cells, weight: jax.Array | None = None
) -> tuple[jax.Array, list[Params]]:
    """Return (b, columns) factors less 1, and the running moments. ``weight`` is given for training."""
    place = jnp.asarray(cells.place)
    if config.encoder == "map":
        seen, stats = _read_map(params["map"], stats, _draw_map(place, config.mesh), weight)
    else:
        phase = place @ _get_waves(place.shape[1])
        seen = _pass(params["place"], jnp.concatenate([place, jnp.sin(phase), jnp.cos(phase)], axis=1))
    seen = seen + _pass(params["counts"], jnp.asarray(cells.counts))
    z = (seen @ params["head"]["w"] + params["head"]["b"]).reshape(-1, config.clusters, config.columns)
    z = jnp.take_along_axis(z, jnp.asarray(cells.cluster)[:, None, None], axis=1)[:, 0]
    return jnp.tanh(z / 2), stats  # 2 sigmoid(z) - 1


def _pick(cells: Cells, rows: jax.Array) -> Cells:
    return Cells(*(jnp.asarray(v)[rows] for v in cells))


def _sum_terms(factor: jax.Array, cells: Cells, beta: jax.Array) -> jax.Array:
    """Return (b,) the change of the prediction."""
    return (factor * jnp.asarray(cells.X) * beta[jnp.asarray(cells.cluster)]).sum(1)


def _each(config: Config) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what applies a function to every run: all at once, or one after another for the large maps."""
    if config.encoder == "map":
        return lambda f: lambda *args: jax.lax.map(lambda a: f(*a), args)
    return jax.vmap


class _State(NamedTuple):
    params: Params
    stats: list[Params]
    moments: Any


def _make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.rate)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run_epoch(config: Config, state: _State, cells: Cells, runs: Runs, order: jax.Array) -> tuple[_State, jax.Array]:
    """Return the state after one pass over the mini-batches (batches, b), and the mean loss of each run."""
    optimizer = _make_optimizer(config)

    def train(state: _State, beta: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[_State, jax.Array]:
        def step(state: _State, rows: jax.Array) -> tuple[_State, jax.Array]:
            part, w = _pick(cells, rows), weight[rows]

            def get_loss(params: Params) -> tuple[jax.Array, list[Params]]:
                factor, stats = _apply(config, params, state.stats, part, w)
                error = residual[rows] - _sum_terms(factor, part, beta)
                return (w * error**2).sum() / jnp.maximum(w.sum(), 1.0), stats

            (loss, stats), gradient = jax.value_and_grad(get_loss, has_aux=True)(state.params)
            updates, moments = optimizer.update(gradient, state.moments, state.params)
            return _State(optax.apply_updates(state.params, updates), stats, moments), loss

        state, losses = jax.lax.scan(step, state, order)
        return state, losses.mean()

    out: tuple[_State, jax.Array] = _each(config)(train)(state, *(jnp.asarray(v) for v in runs))
    return out


@partial(jax.jit, static_argnums=0)
def _measure(config: Config, state: _State, cells: Cells, runs: Runs, held: Held) -> jax.Array:
    """Return (k, clusters) held-out sums of squares."""

    def measure(params: Params, stats: list[Params], beta: jax.Array, residual: jax.Array, held: Held) -> jax.Array:
        def get_error(rows: jax.Array, start: jax.Array) -> jax.Array:
            part = _pick(cells, rows)
            factor, _ = _apply(config, params, stats, part)
            low, high = jnp.asarray(held.low)[part.cluster], jnp.asarray(held.high)[part.cluster]
            guess = jnp.clip(start + _sum_terms(factor, part, beta), low, high)
            out: jax.Array = (residual[rows] + start - guess) ** 2
            return out

        error = _in_chunks(get_error, held.rows, held.start)
        kind = jax.nn.one_hot(jnp.asarray(cells.cluster)[held.rows], config.clusters, dtype=jnp.float32)
        return jnp.asarray(held.used * error) @ kind

    k = len(held.rows)
    params, stats = jax.tree.map(lambda v: v[:k], (state.params, state.stats))
    given = (params, stats, jnp.asarray(runs.beta)[:k], jnp.asarray(runs.residual)[:k], held)
    out: jax.Array = _each(config)(measure)(*given)
    return out


@partial(jax.jit, static_argnums=0)
def _get_factors(config: Config, state: _State, cells: Cells) -> jax.Array:
    """Return (n, columns) factors of the last run."""
    params, stats = jax.tree.map(lambda v: v[-1], (state.params, state.stats))
    return 1.0 + _in_chunks(
        lambda rows: _apply(config, params, stats, _pick(cells, rows))[0], jnp.arange(len(cells.cluster))
    )


def _in_chunks(f: Callable[..., jax.Array], *args: Array) -> jax.Array:
    if len(args[0]) <= _CHUNK:
        return f(*args)
    return jax.lax.map(lambda a: f(*(v[None] for v in a))[0], args, batch_size=_CHUNK)


def estimate_bytes(config: Config, n_cells: int, n_runs: int) -> int:
    """Return the approximate memory in bytes that :func:`train` needs, besides its arguments.

    It counts the arguments on the device, the factors, the parameters with the moments and gradient of Adam, and the
    layers of the largest chunk of cells, of which a few lie in memory at once; and JAX itself with its compiler.

    Parameters
    ----------
    n_runs
        Number of runs, including the one on all cells.

    Examples
    --------
    >>> small = Config("position", 8, clusters=2, columns=16, batch=128, rate=0.01)
    >>> wide = Config("position", 8, clusters=2, columns=1024, batch=128, rate=0.01)
    >>> estimate_bytes(small, 1000, 7) < estimate_bytes(wide, 1000, 7)
    True
    """
    heads = config.clusters * config.columns
    of_cells = n_cells * (4 * config.columns + 2 * n_runs)
    of_network = 5 * n_runs * (_WIDTH * heads + 4 * _WIDTH**2)
    at_once = _LAYERS * min(_CHUNK, n_cells)
    if config.encoder == "map":  # 3 × 3 neighbours and channels of every layer, one run after another
        inputs = (1, *_CHANNELS[:-1])
        nodes = sum(
            config.mesh**2 // 4**k * (9 * i + o) for k, (i, o) in enumerate(zip(inputs, _CHANNELS, strict=True))
        )
        layers = at_once * (nodes + heads)
    else:
        layers = at_once * n_runs * (heads + 4 * _WIDTH)
    return _JAX + 4 * (of_cells + of_network + layers)


def train(
    config: Config, cells: Cells, runs: Runs, held: Held, *, epochs: int, seed: tuple[int, ...], what: str
) -> LocalFit:
    """Train all runs, and return the factors at the epoch that predicts the held-out cells best.

    Parameters
    ----------
    epochs
        The most epochs. Training stops after ``PATIENCE`` epochs in which no cluster makes progress.
    seed
        Numbers that determine parameters and mini-batches.
    what
        Name of the problem, for messages.

    Raises
    ------
    DataError
        If the loss is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((2, 4), np.float32)
    >>> cells = Cells(np.linspace(-1, 1, 8, dtype="f4").reshape(4, 2), one.T, np.zeros(4, "i4"), one.T)
    >>> runs = Runs(np.ones((2, 1, 2), "f4"), 0 * one, one)
    >>> held = Held(np.array([[0, 1]], "i4"), one[:1, :2], one[:1, :2], -9 * one[:1, :1], 9 * one[:1, :1])
    >>> config = Config("position", 8, clusters=1, columns=2, batch=4, rate=0.01)
    >>> fit = train(config, cells, runs, held, epochs=2, seed=(0,), what="a gene")
    >>> fit.factor.tolist() == [[1.0, 1.0]] * 4  # nothing is left to explain, so the start is best
    True
    """
    rng = np.random.default_rng(seed)
    n, k = len(cells.cluster), len(runs.beta)
    params, stats = init_params(config, rng, dims=cells.place.shape[1], n_counts=cells.counts.shape[1])
    moments = jax.eval_shape(_make_optimizer(config).init, params)  # zeros, all of them
    one = _State(params, stats, jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), moments))
    state = jax.tree.map(lambda v: jnp.asarray(np.repeat(v[None], k, axis=0)), one)
    cells, runs, held = jax.tree.map(jnp.asarray, (cells, runs, held))
    curve = [np.asarray(_measure(config, state, cells, runs, held), np.float64)]
    least = curve[0].sum(0)
    mark, waited = least.copy(), 0
    best = np.zeros(config.clusters, np.int64)
    factor = np.ones((n, config.columns), np.float32)
    cluster = np.asarray(cells.cluster)
    batches = n // config.batch
    for epoch in range(1, epochs + 1):
        order = rng.permutation(n)[: batches * config.batch].reshape(batches, config.batch)
        state, loss = _run_epoch(config, state, cells, runs, jnp.asarray(order, jnp.int32))
        if not np.isfinite(np.asarray(loss)).all():
            raise DataError(f"{what}: the loss is not finite in epoch {epoch}", hint="use a lower learning rate (lr)")
        curve.append(np.asarray(_measure(config, state, cells, runs, held), np.float64))
        now = curve[-1].sum(0)
        better = now < least
        if better.any():
            rows = better[cluster]
            factor[rows] = np.asarray(_get_factors(config, state, cells))[rows]
            least, best = np.where(better, now, least), np.where(better, epoch, best)
        progress = now < mark * (1 - _PROGRESS)
        mark = np.where(progress, now, mark)
        waited = 0 if progress.any() else waited + 1
        if waited >= PATIENCE:
            break
    return LocalFit(factor, np.array(curve), best)
