"""numba loaded without what a process of our own has no use for: 0.35 s less at every start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let imports of these modules fail, but for those that are loaded already."""
    hidden = [n for n in names if n not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for n in hidden:
            del sys.modules[n]


def load_numba() -> None:
    """Load numba without SciPy and YAML, and let cached kernels load without the compiler's own set-up.

    For the command line's own process, before other threads import anything. numba looks for SciPy to check its
    version and for YAML to read a configuration in the working folder, and does without where they are missing.
    """
    if "numba" in sys.modules:
        return
    with _hidden("scipy", *([] if os.path.exists(".numba_config.yaml") else ["yaml"])):
        import numba  # noqa: F401
    _load_cached_kernels_alone()


def _load_cached_kernels_alone() -> None:
    """Spare a kernel that comes from the cache the type rules and code generators that only compiling needs.

    numba sets all of them up (60 modules, entry points of other packages) before it looks into the cache. Machine
    code needs none, only the runtime that allocates arrays. A kernel that is not in the cache is compiled as ever:
    the compiler sets itself up at its own start.
    """
    from numba.core import caching
    from numba.core.runtime import rtsys

    if not hasattr(caching.Cache, "_load_overload"):  # another numba: its own way
        return

    def load_overload(self: Any, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    caching.Cache.load_overload = load_overload
