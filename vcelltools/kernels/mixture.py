"""Mixtures of two components, fitted to a histogram of counts: what is background, and what is signal.

Oracle of both fits: ``tests/unit/kernels/test_mixture.py``, EM on the expanded counts with scipy's densities.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

MAX_STEPS = 500
TOLERANCE = 1e-9
MIN_SD = 0.3
"""Of the signal's log2 counts: a component of one value has no spread, and would swallow the likelihood."""
MIN_SIZE, MAX_SIZE = 0.05, 100.0
SHARE, BACKGROUND, BACKGROUND_SPREAD, SIGNAL, SIGNAL_SPREAD = range(5)
N_PARAMS = 5
_STARTS = (0.5, 0.9, 0.99)
_HALVINGS = 10
_LOG_2PI = math.log(2 * math.pi)


@kernel(inline=True)
def _get_quantile(values, weights, total, q):
    """Return the smallest value that at least a share ``q`` of the weight does not exceed."""
    seen = 0.0
    for i in range(len(values)):
        seen += weights[i]
        if seen >= q * total:
            return values[i]
    return values[-1]


@kernel(inline=True)
def _log_poisson(x, rate):
    return x * math.log(rate) - rate - math.lgamma(x + 1.0)


@kernel(inline=True)
def _log_normal(x, mean, sd):
    z = (x - mean) / sd
    return -0.5 * (z * z + _LOG_2PI) - math.log(sd)


@kernel(inline=True)
def _log_negative_binomial(x, mean, size):
    out = math.lgamma(x + size) - math.lgamma(size) - math.lgamma(x + 1.0)
    out += size * math.log(size / (size + mean))
    if x > 0:
        out += x * math.log(mean / (size + mean))
    return out


@kernel()
def _fit_one_poisson_gaussian(values, weights, params, signal):
    """Run EM from ``params`` in place; return the log likelihood. ``signal`` is (m,) scratch."""
    before = -np.inf
    for _ in range(MAX_STEPS):
        share, rate, mean, sd = params[SHARE], params[BACKGROUND], params[SIGNAL], params[SIGNAL_SPREAD]
        loglik = n1 = n0 = s1 = s0 = 0.0
        for i in range(len(values)):
            x = math.log2(values[i])
            a = math.log(1.0 - share) + _log_poisson(x, rate)
            b = math.log(share) + _log_normal(x, mean, sd)
            top = max(a, b)
            both = top + math.log(math.exp(a - top) + math.exp(b - top))
            loglik += weights[i] * both
            signal[i] = weights[i] * math.exp(b - both)
            n1 += signal[i]
            n0 += weights[i] - signal[i]
            s1 += signal[i] * x
            s0 += (weights[i] - signal[i]) * x
        if n1 < 1e-6 or n0 < 1e-6 or loglik - before <= TOLERANCE * (1.0 + abs(loglik)):
            return loglik
        before = loglik
        mean = s1 / n1
        square = 0.0
        for i in range(len(values)):
            d = math.log2(values[i]) - mean
            square += signal[i] * d * d
        params[SHARE] = min(max(n1 / (n1 + n0), 1e-6), 1.0 - 1e-6)
        params[BACKGROUND] = max(s0 / n0, 1e-3)
        params[SIGNAL] = mean
        params[SIGNAL_SPREAD] = max(math.sqrt(square / n1), MIN_SD)
    return before


@kernel()
def _fit_size(values, weights, mean, size):
    """Return the size of largest likelihood near ``size``, of a negative binomial with this mean: golden section."""
    low, high = math.log(max(size / 4.0, MIN_SIZE)), math.log(min(size * 4.0, MAX_SIZE))
    golden = 0.6180339887498949
    a, b = high - golden * (high - low), low + golden * (high - low)
    fa = fb = -np.inf
    for step in range(_HALVINGS):
        if step == 0 or fa >= fb:
            if step:
                high, b, fb = b, a, fa
                a = high - golden * (high - low)
            fa = 0.0
            for i in range(len(values)):
                fa += weights[i] * _log_negative_binomial(values[i] - 1.0, mean, math.exp(a))
            if step:
                continue
            fb = 0.0
            for i in range(len(values)):
                fb += weights[i] * _log_negative_binomial(values[i] - 1.0, mean, math.exp(b))
        else:
            low, a, fa = a, b, fb
            b = low + golden * (high - low)
            fb = 0.0
            for i in range(len(values)):
                fb += weights[i] * _log_negative_binomial(values[i] - 1.0, mean, math.exp(b))
    return math.exp(0.5 * (low + high))


@kernel()
def _fit_one_negative_binomials(values, weights, params, signal, rest):
    """Run EM from ``params`` in place; return the log likelihood. ``signal`` and ``rest`` are (m,) scratch."""
    before = -np.inf
    for _ in range(MAX_STEPS):
        loglik = n1 = n0 = s1 = s0 = 0.0
        for i in range(len(values)):
            x = values[i] - 1.0
            a = math.log(1.0 - params[SHARE]) + _log_negative_binomial(x, params[BACKGROUND], params[BACKGROUND_SPREAD])
            b = math.log(params[SHARE]) + _log_negative_binomial(x, params[SIGNAL], params[SIGNAL_SPREAD])
            top = max(a, b)
            both = top + math.log(math.exp(a - top) + math.exp(b - top))
            loglik += weights[i] * both
            signal[i] = weights[i] * math.exp(b - both)
            rest[i] = weights[i] - signal[i]
            n1 += signal[i]
            n0 += rest[i]
            s1 += signal[i] * x
            s0 += rest[i] * x
        if n1 < 1e-6 or n0 < 1e-6 or loglik - before <= 1e-7 * (1.0 + abs(loglik)):
            return loglik
        before = loglik
        params[SHARE] = min(max(n1 / (n1 + n0), 1e-6), 1.0 - 1e-6)
        params[BACKGROUND] = max(s0 / n0, 1e-3)
        params[SIGNAL] = max(s1 / n1, 1e-3)
        params[BACKGROUND_SPREAD] = _fit_size(values, rest, params[BACKGROUND], params[BACKGROUND_SPREAD])
        params[SIGNAL_SPREAD] = _fit_size(values, signal, params[SIGNAL], params[SIGNAL_SPREAD])
    return before


@kernel()
def _find_threshold(params, largest, gaussian):
    """Return the smallest count above the background that is more likely signal, 0 where there is none."""
    for v in range(2, largest + 1):
        if gaussian:
            x = math.log2(v)
            a = math.log(1.0 - params[SHARE]) + _log_poisson(x, params[BACKGROUND])
            b = math.log(params[SHARE]) + _log_normal(x, params[SIGNAL], params[SIGNAL_SPREAD])
        else:
            x = v - 1.0
            a = math.log(1.0 - params[SHARE]) + _log_negative_binomial(x, params[BACKGROUND], params[BACKGROUND_SPREAD])
            b = math.log(params[SHARE]) + _log_negative_binomial(x, params[SIGNAL], params[SIGNAL_SPREAD])
        if x > params[BACKGROUND] and b > a:
            return v
    return 0


@kernel()
def fit_mixtures(starts, values, weights, gaussian, params_gk, threshold_g):
    """Fit background and signal to the counts of every guide, from three starts, and keep the likeliest fit.

    With ``gaussian``: log2 counts are Poisson in the background and normal in the signal, as in Replogle et al. 2020
    (Nature Biotechnology 38, 954). Without: counts less one are negative binomial in both, because only cells with a
    count take part. EM; the negative binomial's size by golden section.

    Parameters
    ----------
    starts
        (g + 1,) int64: guide k owns ``values[starts[k]:starts[k + 1]]``.
    values, weights
        (m,) float64 distinct counts from 1 on, increasing within each guide, and how many cells have each.
    params_gk
        (g, 5) float64 output: the signal's share; background (rate, or mean) and its size; signal (mean) and its
        spread (standard deviation, or size). NaN for a guide without counts.
    threshold_g
        (g,) int64 output: the smallest count that is more likely signal than background; 0 where the fit has none.
    """
    for k in range(len(starts) - 1):
        x, w = values[starts[k] : starts[k + 1]], weights[starts[k] : starts[k + 1]]
        threshold_g[k] = 0
        params_gk[k] = np.nan
        if len(x) == 0:
            continue
        total = w.sum()
        signal, rest = np.empty(len(x)), np.empty(len(x))
        params = np.empty(N_PARAMS)
        best = -np.inf
        for q in _STARTS:
            high = _get_quantile(x, w, total, q)
            params[SHARE] = 0.3
            if gaussian:
                params[BACKGROUND], params[BACKGROUND_SPREAD] = 0.5, np.nan
                params[SIGNAL], params[SIGNAL_SPREAD] = max(math.log2(high), 2.5), 1.0
                loglik = _fit_one_poisson_gaussian(x, w, params, signal)
            else:
                params[BACKGROUND], params[BACKGROUND_SPREAD] = 0.5, 1.0
                params[SIGNAL], params[SIGNAL_SPREAD] = max(high, 6.0), 1.0
                loglik = _fit_one_negative_binomials(x, w, params, signal, rest)
            apart = params[SIGNAL] > (params[BACKGROUND] + 1.0 if gaussian else 2.0 * params[BACKGROUND] + 1.0)
            if apart and loglik > best + 1e-9 * abs(loglik):
                best = loglik
                params_gk[k] = params
        if best > -np.inf:
            threshold_g[k] = _find_threshold(params_gk[k], int(x[-1]), gaussian)
