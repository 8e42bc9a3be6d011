"""The mean-variance trend that the seurat_v3 flavours divide by."""

from __future__ import annotations

import numpy as np

# skmisc's Fortran code ends the process on fewer points than this
_MIN_LOESS_POINTS = 4


def fit_trend(mean_g: np.ndarray, variance_g: np.ndarray, *, span: float = 0.3) -> tuple[np.ndarray, str | None]:
    """Fit log10 variance on log10 mean over the genes that vary.

    Loess of degree 2 as Seurat v3 and scanpy use it (Stuart et al., Cell 2019). On few cells the means take so few
    values that loess fails ("near singularities") or ends the process; the fallback is then a quadratic in
    log10 mean, fitted to all genes by least squares, of lower degree where there are fewer than three distinct
    means. It needs no random numbers and does not depend on the order of genes.

    Parameters
    ----------
    mean_g, variance_g
        (g,) float64; every gene has variance > 0.
    span
        Share of the genes in each local fit.

    Returns
    -------
    tuple
        (g,) fitted log10 variances, and None or why the fallback was taken.
    """
    if len(mean_g) == 0:
        return np.zeros(0), None
    x, y = np.log10(mean_g), np.log10(variance_g)
    reason = None
    if len(x) < _MIN_LOESS_POINTS:
        reason = f"only {len(x)} genes vary"
    else:
        from skmisc.loess import loess

        try:
            model = loess(x, y, span=span, degree=2)
            model.fit()
            fitted = np.asarray(model.outputs.fitted_values)
            if np.isfinite(fitted).all():
                return fitted, None
            reason = "loess gave values that are not finite"
        except ValueError as e:
            text = e.args[0] if e.args else str(e)
            reason = "loess failed: " + (text.decode("ascii", "replace") if isinstance(text, bytes) else str(text))
    return _fit_quadratic(x, y), " ".join(reason.split())


def _fit_quadratic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    degree = min(2, len(np.unique(x)) - 1)
    centre = x.mean()
    basis = np.vander(x - centre, degree + 1)
    coefficients, *_ = np.linalg.lstsq(basis, y, rcond=None)
    return basis @ coefficients
