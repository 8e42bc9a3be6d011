"""Negative-binomial counts for many cells, one cell after the other, each with its own random stream.

Source: a negative binomial with mean m and dispersion d is a compound Poisson: bursts arrive at rate
log(1 + m d) / d and each has a logarithmic size (Quenouille 1949). Arrivals of all genes together are one
Poisson process on the line on which the genes lie side by side, each as long as its mean; walking that line
costs a step per gene and a draw per molecule, and yields the genes in order. Thinning turns the rate m into the
burst rate. Logarithmic sizes: Kemp 1981, second generator. Streams: Philox 4×32-10 (Salmon et al. 2011) of
(seed, cell) sets up xoshiro256++ (Blackman and Vigna 2021). Oracle: moments and zero share of scipy's nbinom.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

FULL = -1
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_U1, _U11, _U17, _U19, _U23, _U32, _U41, _U45, _U64 = (np.uint64(v) for v in (1, 11, 17, 19, 23, 32, 41, 45, 64))


@kernel()
def philox(seed, cell, lane):
    """Return two uint64 of Philox 4×32-10 with key ``seed`` at counter (cell, lane)."""
    k0, k1 = seed & _LOW, seed >> _U32
    c0, c1 = cell & _LOW, cell >> _U32
    c2, c3 = lane & _LOW, lane >> _U32
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _U32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _U32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0 | (c1 << _U32), c2 | (c3 << _U32)


@kernel(inline=True)
def _rotl(x, k):
    return (x << k) | (x >> (_U64 - k))


@kernel(inline=True)
def _uniform(state):
    """Draw from (0, 1] by xoshiro256++."""
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    out = _rotl(s0 + s3, _U23) + s0
    t = s1 << _U17
    s2 ^= s0
    s3 ^= s1
    state[1] = s1 ^ s2
    state[0] = s0 ^ s3
    state[2] = s2 ^ t
    state[3] = _rotl(s3, _U45)
    return ((out >> _U11) + _U1) * 1.1102230246251565e-16


@kernel(inline=True)
def _burst(state, p, log_q):
    """Draw a logarithmic(p) size; ``log_q`` is log(1 - p)."""
    v = _uniform(state)
    if v >= p:
        return 1
    q = -np.expm1(log_q * _uniform(state))
    if v <= q * q:
        return int(1.0 + np.log(v) / np.log(q))
    return 1 if v >= q else 2


@kernel()
def csr_simulate(
    start,
    seed,
    depth_b,
    profile_b,
    first_b,
    second_b,
    profile_kg,
    dispersion_g,
    effect_indptr,
    effect_indices,
    effect_data,
    state_indptr,
    state_indices,
    state_data,
    rate_g,
    indptr,
    indices,
    data,
):
    """Draw the cells ``start .. start + b - 1``; return the values written, or ``FULL``.

    Parameters
    ----------
    start, seed
        uint64; a cell's stream depends on the seed and the cell's number alone.
    depth_b
        (b,) float64 expected molecules.
    profile_b
        (b,) int32 rows of ``profile_kg``.
    first_b, second_b
        (b,) int32 rows of the effects, a CSR of natural-log fold changes; -1 for none. Both add.
    profile_kg
        (k, g) float32 relative abundances, each row summing to one.
    state_indptr, state_indices, state_data
        CSR of the s cell-state programmes; a cell's activities are standard normal, from its own stream.
    rate_g
        (g,) float32 scratch.
    indptr, indices, data
        Outputs: (b + 1,) int64, (capacity,) int32, (capacity,) int32.
    """
    n_genes = profile_kg.shape[1]
    capacity = len(indices)
    state = np.empty(4, np.uint64)
    nnz = 0
    indptr[0] = 0
    for i in range(len(depth_b)):
        if nnz + n_genes > capacity:
            return FULL
        cell = start + np.uint64(i)
        state[0], state[1] = philox(seed, cell, np.uint64(0))
        state[2], state[3] = philox(seed, cell, np.uint64(1))
        k = profile_b[i]
        for g in range(n_genes):
            rate_g[g] = profile_kg[k, g]
        total = 1.0
        for s in range(len(state_indptr) - 1):
            radius = np.sqrt(-2.0 * np.log(_uniform(state)))  # Box and Muller 1958
            z = radius * np.cos(2.0 * np.pi * _uniform(state))
            for j in range(state_indptr[s], state_indptr[s + 1]):
                g = state_indices[j]
                old = rate_g[g]
                rate_g[g] = old * np.exp(z * state_data[j])
                total += rate_g[g] - old
        for side in range(2):
            e = first_b[i] if side == 0 else second_b[i]
            if e >= 0:
                for j in range(effect_indptr[e], effect_indptr[e + 1]):
                    g = effect_indices[j]
                    old = rate_g[g]
                    rate_g[g] = old * np.exp(effect_data[j])
                    total += rate_g[g] - old
        scale = depth_b[i] / total
        # one Poisson process over all genes: `at` is where the walk is, `arrival` the next molecule's place
        at = 0.0
        arrival = -np.log(_uniform(state)) / scale
        for g in range(n_genes):
            at += rate_g[g]
            if at <= arrival:
                continue
            x = rate_g[g] * scale * dispersion_g[g]
            log_q = -np.log1p(x)
            accept = -log_q / x if x > 1e-9 else 1.0
            p = x / (1.0 + x)
            count = 0
            while arrival < at:
                arrival -= np.log(_uniform(state)) / scale
                if _uniform(state) <= accept:
                    count += _burst(state, p, log_q)
            if count > 0:
                indices[nnz] = g
                data[nnz] = count
                nnz += 1
        indptr[i + 1] = nnz
    return nnz
