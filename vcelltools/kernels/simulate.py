"""Draw negative-binomial counts for many cells, each with its own random stream.

Source: a negative binomial with mean m and dispersion d is a compound Poisson: bursts arrive at rate
log(1 + m d) / d and each has a logarithmic size (Quenouille 1949). Arrivals of all genes together are one
Poisson process on a line on which the genes are adjacent, each as long as its mean; walking that line
(eight genes per step without an arrival) costs one draw per molecule and yields the genes in order. Genes with
many molecules are drawn one by one, as a gamma mixture of Poissons. Thinning turns the rate m into the
burst rate. Logarithmic sizes: Kemp 1981, second generator. Streams: Philox 4×32-10 (Salmon et al. 2011) of
(seed, cell) seeds xoshiro256++ (Blackman and Vigna 2021). Oracle: moments and zero fraction of scipy's nbinom.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

FULL = -1
_DIRECT_ABOVE = 3.0  # molecules
_STEP = 8
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
    """Draw from (0, 1] with xoshiro256++."""
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
def _burst(state, v, p, log_q):
    """Draw a logarithmic(p) size from the uniform ``v``; ``log_q`` is log(1 - p)."""
    if v >= p:
        return 1
    q = -np.expm1(log_q * _uniform(state))
    if v <= q * q:
        return int(1.0 + np.log(v) / np.log(q))
    return 1 if v >= q else 2


@kernel()
def _gamma(state, shape):
    """Draw from a gamma distribution of scale 1 (Marsaglia and Tsang 2000)."""
    boost = 1.0
    if shape < 1.0:
        boost = np.exp(np.log(_uniform(state)) / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / np.sqrt(9.0 * d)
    while True:
        z = np.sqrt(-2.0 * np.log(_uniform(state))) * np.cos(2.0 * np.pi * _uniform(state))
        v = 1.0 + c * z
        if v <= 0.0:
            continue
        v = v * v * v
        if np.log(_uniform(state)) < 0.5 * z * z + d * (1.0 - v + np.log(v)):
            return boost * d * v


@kernel()
def _poisson(state, mean):
    """Draw from a Poisson distribution: by products below a mean of 10, by PTRS above (Hoermann 1993)."""
    if mean < 10.0:
        floor = np.exp(-mean)
        k, product = 0, _uniform(state)
        while product > floor:
            product *= _uniform(state)
            k += 1
        return k
    b = 0.931 + 2.53 * np.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u = _uniform(state) - 0.5
        v = _uniform(state)
        us = 0.5 - abs(u)
        if us < 1e-12:
            continue
        k = np.floor((2.0 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return int(k)
        if k < 0.0 or (us < 0.013 and v > us):
            continue
        if np.log(v * inverse_alpha / (a / (us * us) + b)) <= k * np.log(mean) - mean - math.lgamma(k + 1.0):
            return int(k)


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
        uint64; the stream of a cell depends only on the seed and the number of the cell.
    depth_b
        (b,) float64 expected molecules.
    profile_b
        (b,) int32 rows of ``profile_kg``.
    first_b, second_b
        (b,) int32 rows of the effects, a CSR of natural-log fold changes; -1 for none. Both effects are added.
    profile_kg
        (k, g) float32 relative abundances, each row summing to one.
    state_indptr, state_indices, state_data
        CSR of the s cell-state programmes; the activities of a cell are standard normal, from its own stream.
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
        # one Poisson process over all genes: `at` is the current position, `arrival` that of the next molecule
        at = 0.0
        inverse = 1.0 / scale
        direct = _DIRECT_ABOVE * inverse
        arrival = -np.log(_uniform(state)) * inverse
        g0 = 0
        while g0 < n_genes:
            g1 = g0 + _STEP
            if g1 <= n_genes:
                block = ((np.float64(rate_g[g0]) + rate_g[g0 + 1]) + (np.float64(rate_g[g0 + 2]) + rate_g[g0 + 3])) + (
                    (np.float64(rate_g[g0 + 4]) + rate_g[g0 + 5]) + (np.float64(rate_g[g0 + 6]) + rate_g[g0 + 7])
                )
                if at + block <= arrival and block <= direct:
                    at += block
                    g0 = g1
                    continue
            else:
                g1 = n_genes
            for g in range(g0, g1):
                rate = rate_g[g]
                if rate > direct:  # drawn separately and removed from the line, because the process has no memory
                    arrival += rate
                    at += rate
                    spread = dispersion_g[g]
                    count = _poisson(state, _gamma(state, 1.0 / spread) * spread * (rate * scale))
                    if count > 0:
                        indices[nnz] = g
                        data[nnz] = count
                        nnz += 1
                    continue
                at += rate
                if at <= arrival:
                    continue
                x = rate * scale * dispersion_g[g]
                log_q = -np.log1p(x)
                accept = -log_q / x if x > 1e-9 else 1.0
                p = x / (1.0 + x)
                count = 0
                while arrival < at:
                    arrival -= np.log(_uniform(state)) * inverse
                    u = _uniform(state)
                    if u <= accept:
                        count += _burst(state, u / accept, p, log_q)  # uniform again, given that it is accepted
                if count > 0:
                    indices[nnz] = g
                    data[nnz] = count
                    nnz += 1
            g0 = g1
        indptr[i + 1] = nnz
    return nnz
