"""Spatial: fit gene regulation across a tissue, and predict the effects of knockouts.

``check``, ``fit``, ``received`` and ``open_run`` implement the commands of ``spatial``. An opened run gives
coefficients, derivatives, perturbations, screens, interaction tables and transition fields. The room reads AnnData and
h5ad files through ``io``. The kernels are in ``kernels``.

- Input: ``settings``, ``tissue`` (cells and coordinates), ``regulatory_network``, ``modulators`` (possible regulators).
- Fit: ``design`` (columns), ``blocks`` (held-out parts), ``regress`` and ``lasso``, ``honesty`` (null and stability),
  ``local`` (coefficients by cell).
- Run: ``files`` and ``betadata`` on disk, ``fitted`` in memory, ``interactions``, ``field``, ``report``.
- ``screen`` shares knockouts between processes through ``task_queue``. ``simulate`` writes a tissue with known truth.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "check": "_check",
    "received": "_check",
    "fit": "_fit",
    "join": "_fit",
    "plan_fit": "_fit",
    "open_run": "_run",
    "Settings": "settings",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"vcelltools.spatial.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
