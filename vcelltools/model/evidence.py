"""Weight the prior effect of each gene by the evidence for it.

The prior of a run has two parts: the *shared* effect of all perturbations in the context, and the *own* part, which is
specific to the perturbation. The share of each part that recurs in a new context differs between genes. It depends on
the size of the effect relative to its standard error, on the agreement of the gene's effects between contexts, on the
expression of the gene, and on whether it is the targeted gene. A small network, shared by all genes, learns these
weights. Every gene of every run is a training example, so some dozens of perturbations suffice, whereas the
transformer would overfit the noise.
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
    """Evidence on the effects of sets; all arrays are float32 (b, g), effects in log1p CP10K."""

    prior: jax.Array
    """The prior effect: the shared plus the perturbation-specific part."""
    shared: jax.Array
    """The shared effect of all perturbations in the context."""
    error: jax.Array
    """Standard error of the perturbation-specific part."""
    control: jax.Array
    """Mean of the context's control cells."""
    own_gene: jax.Array
    """1 at the targeted gene, 0 elsewhere."""
    information: jax.Array
    """Variance of the true effects over the noise variance, from the agreement between contexts; 0 if not measured."""


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
    """Return the tables that :func:`read_evidence` reads; missing values are zero, or -1.

    Parameters
    ----------
    prior_kg, shared_kg
        (k, g): one row per run.
    cells_k
        (k,): number of cells behind the perturbation-specific part, 0 if it was not measured.
    target_k
        (k,): column of the targeted gene, -1 without one.
    control_cg
        (c, g): one row per context.
    variance_g
        (g,): variance between control cells.
    ratio_g
        (g,): variance of the true effects over the noise variance of an effect measured on one cell.
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
    """Return the shape and dtype of every table of :func:`make_tables`."""
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
    """Return the evidence for sets of the given runs and contexts."""
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
    """Return the parameters of the small network; initially it keeps every prior effect unchanged."""
    w = jax.random.truncated_normal(key, -2.0, 2.0, (N_FACTS, WIDTH), jnp.float32) / np.sqrt(N_FACTS)
    return {"w": w, "b": jnp.zeros((WIDTH,)), "out": jnp.zeros((WIDTH, 3)), "out_b": jnp.zeros((3,))}


def judge_prior(params: dict[str, jax.Array], evidence: Evidence, scale: float) -> jax.Array:
    """Return the effects (b, g) in which the parts of the prior are weighted per gene by the evidence."""
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
