"""What is known of an effect before the network sees a cell, and how far each gene of it is to be believed.

The prior of a run splits into what perturbations *share* in the context and what is the perturbation's *own*. How
much of either survives in a new context differs from gene to gene: with the size of the effect against its standard
error, with how well the gene's effects agree between contexts, with how strongly the gene is expressed, and it is
special for the gene that was targeted. A small network, the same for all genes, learns this: every run teaches it as
often as there are genes, so that some dozens of perturbations suffice where the transformer's own weights would
remember noise.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N_FACTS, WIDTH = 8, 24
BY_RUN = ("prior", "shared", "cells", "target")
_LARGEST_Z = 6.0


class Evidence(NamedTuple):
    """What is known of the effects of some sets; all float32 (b, g), effects in log1p CP10K."""

    prior: jax.Array
    """The effect to start from: ``shared`` plus the perturbation's own."""
    shared: jax.Array
    """What perturbations share in the context."""
    error: jax.Array
    """Standard error of the perturbation's own part."""
    control: jax.Array
    """Mean of the context's control cells."""
    own_gene: jax.Array
    """1 at the targeted gene, else 0."""
    information: jax.Array
    """Variance of true effects over that of the noise, from the agreement between contexts; 0: nothing measured."""


def make_tables(
    prior_kg: np.ndarray,
    *,
    shared_kg: np.ndarray | None = None,
    cells_k: np.ndarray | None = None,
    target_k: np.ndarray | None = None,
    control_cg: np.ndarray | None = None,
    variance_g: np.ndarray | None = None,
    ratio_g: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return the tables that :func:`read_evidence` reads; what is not given is zero, or -1.

    Parameters
    ----------
    prior_kg, shared_kg
        (k, g): by run.
    cells_k
        (k,): cells that the perturbation's own part was measured on, 0 where it was not.
    target_k
        (k,): column of the run's own gene, -1 without one.
    control_cg
        (c, g): by context.
    variance_g
        (g,): of one control cell.
    ratio_g
        (g,): variance of true effects over the noise variance of one cell's worth of effect.
    """
    k, g = prior_kg.shape
    given = {
        "prior": prior_kg,
        "shared": shared_kg,
        "cells": cells_k,
        "target": np.full(k, -1) if target_k is None else target_k,
        "control": control_cg,
        "variance": variance_g,
        "ratio": None if ratio_g is None else np.minimum(ratio_g, 1e4),
    }
    shapes = get_table_shapes(k, 1 if control_cg is None else len(control_cg), g)
    return {
        name: np.zeros(shape, dtype) if given[name] is None else np.asarray(given[name], dtype)
        for name, (shape, dtype) in shapes.items()
    }


def get_table_shapes(n_runs: int, n_contexts: int, genes: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return shape and dtype of every table of :func:`make_tables`."""
    f = np.float32
    return {
        "prior": ((n_runs, genes), f),
        "shared": ((n_runs, genes), f),
        "cells": ((n_runs,), f),
        "target": ((n_runs,), np.int32),
        "control": ((n_contexts, genes), f),
        "variance": ((genes,), f),
        "ratio": ((genes,), f),
    }


def read_evidence(tables: dict[str, jax.Array], run_b: jax.Array, context_b: jax.Array) -> Evidence:
    """Return the evidence of the sets of runs in contexts."""
    prior = tables["prior"][run_b]
    shape = prior.shape
    cells = jnp.broadcast_to(tables["cells"][run_b][:, None], shape)
    gene = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return Evidence(
        prior=prior,
        shared=tables["shared"][run_b],
        error=jnp.sqrt(jnp.broadcast_to(tables["variance"][None], shape) / jnp.maximum(cells, 1.0)),
        control=tables["control"][context_b],
        own_gene=(gene == jnp.broadcast_to(tables["target"][run_b][:, None], shape)).astype(jnp.float32),
        information=jnp.broadcast_to(tables["ratio"][None], shape) * cells,
    )


def init_judge(key: jax.Array) -> dict[str, jax.Array]:
    """Return the small network's parameters; it starts by believing everything."""
    w = jax.random.truncated_normal(key, -2.0, 2.0, (N_FACTS, WIDTH), jnp.float32) / np.sqrt(N_FACTS)
    return {"w": w, "b": jnp.zeros((WIDTH,)), "out": jnp.zeros((WIDTH, 3)), "out_b": jnp.zeros((3,))}


def judge_prior(params: dict[str, jax.Array], evidence: Evidence, scale: float) -> jax.Array:
    """Return the effect (b, g) that the evidence supports: the prior's parts, each gene weighed by its facts."""
    e = evidence
    own = e.prior - e.shared
    z = jnp.clip(own / (e.error + 1e-4), -_LARGEST_Z, _LARGEST_Z) / 2
    facts = jnp.stack(
        [
            own / scale,
            e.shared / scale,
            z,
            jnp.abs(z),
            e.error / (2 * scale),
            e.control,
            e.own_gene,
            jnp.log(e.information + 1e-3) / 2,
        ]
    )
    hidden = jnp.einsum("fbg,fh->hbg", facts, params["w"])
    hidden = jax.nn.gelu(hidden + jnp.broadcast_to(params["b"][:, None, None], hidden.shape))
    out = jnp.einsum("hbg,ho->obg", hidden, params["out"])
    out = out + jnp.broadcast_to(params["out_b"][:, None, None], out.shape)
    return e.shared * (1.0 + out[0]) + own * (1.0 + out[1]) + out[2] * scale
