"""Fit the mean-variance trend by which the seurat_v3 flavours normalise."""

from __future__ import annotations

import numpy as np

from vcelltools.errors import UsageError, check_number
from vcelltools.runtime.threads import one_blas_thread

_DEGREE = 2


def fit_trend(mean_g: np.ndarray, variance_g: np.ndarray, *, span: float = 0.3) -> tuple[np.ndarray, str | None]:
    """Fit log10 variance on log10 mean over the genes that vary.

    The fit is loess of degree 2, as in Seurat v3 and scanpy (Stuart et al., Cell 2019). With few cells, the means take
    so few values that loess fails ("near singularities"). The fallback is a quadratic in log10 mean, fitted to all
    genes by least squares, of lower degree with fewer than three distinct means. It does not use random numbers and
    does not depend on the order of genes.

    Parameters
    ----------
    mean_g, variance_g
        (g,) float64; every gene has variance > 0.
    span
        Fraction of the genes in each local fit, above 0 and at most 1.

    Returns
    -------
    tuple
        (g,) fitted log10 variances, and the reason for the fallback or None.

    Raises
    ------
    UsageError
        If the span is not above 0 and at most 1.
    """
    check_span(span)
    if len(mean_g) == 0:
        return np.zeros(0), None
    x, y = np.log10(mean_g), np.log10(variance_g)
    local = int(span * len(x))
    # skmisc's Fortran code uses floor(span * genes) genes in a local fit and crashes the process if that is 0; with
    # 1 or 2 it never converges. A quadratic needs one gene more than its degree, and 4 genes are the least it was
    # tested on.
    if len(x) < _DEGREE + 2:
        reason = f"only {len(x)} {'gene varies' if len(x) == 1 else 'genes vary'}"
    elif local < _DEGREE + 1:
        reason = (
            f"a span of {span} leaves {local} of {len(x)} genes for a local fit, which needs at least {_DEGREE + 1}"
        )
    else:
        from skmisc.loess import loess

        try:
            model = loess(x, y, span=span, degree=_DEGREE)
            model.fit()
            fitted = np.asarray(model.outputs.fitted_values)
            if np.isfinite(fitted).all():
                return fitted, None
            reason = "loess returned values that are not finite"
        except ValueError as e:
            text = e.args[0] if e.args else str(e)
            reason = "loess failed: " + (text.decode("ascii", "replace") if isinstance(text, bytes) else str(text))
    return _fit_quadratic(x, y), " ".join(reason.split())


def check_span(span: float) -> None:
    """Raise a :class:`UsageError` if the span of the local fits is not above 0 and at most 1."""
    check_number("span", span)
    if not 0 < span <= 1:
        raise UsageError(f"span is {span}, but must be above 0 and at most 1")


@one_blas_thread()
def _fit_quadratic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    degree = min(_DEGREE, len(np.unique(x)) - 1)
    centre = x.mean()
    basis = np.vander(x - centre, degree + 1)
    coefficients, *_ = np.linalg.lstsq(basis, y, rcond=None)
    return basis @ coefficients
