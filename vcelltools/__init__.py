"""vcelltools: from raw single-cell perturbation atlases to a scored virtual-cell prediction.

The public names load on first use, so that ``import vcelltools`` costs almost nothing::

    import vcelltools as vc
    hvgs = vc.hvg("atlas.h5mu", top=2000)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "hvg": "vcelltools.pipelines.hvg",
    "normalize": "vcelltools.pipelines.normalize",
    "convert": "vcelltools.pipelines.convert",
    "sample": "vcelltools.pipelines.convert",
    "inspect": "vcelltools.pipelines.inspect",
    "basis": "vcelltools.pipelines.basis",
    "build_store": "vcelltools.pipelines.store_make",
    "open_store": "vcelltools.pipelines.store",
    "verify_store": "vcelltools.pipelines.store",
    "score": "vcelltools.scoring",
    "de": "vcelltools.pipelines.de",
    "simulate": "vcelltools.pipelines.simulate",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name])
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
