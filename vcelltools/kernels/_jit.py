"""The only caller of ``numba.njit``: one set of options, and a cache that never stops an import.

numba caches compiled code beside the source file. In a read-only installation it falls back to a folder in the
user's home, and where that is not writable either it raises at import. :func:`kernel` then compiles without a
cache. numba stamps only the file that defines a kernel, so a kernel's helpers live in the same file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def _set_private_cache() -> None:
    """Point numba at a private cache where the package's own folder is not writable."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return
    here = Path(__file__).resolve().parent
    if os.access(here, os.W_OK):
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = base / "vcelltools" / "numba"
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError:
        return
    numba.config.CACHE_DIR = str(target)


_set_private_cache()


def kernel(parallel: bool = False, inline: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """Compile a function in nopython mode, without the GIL, cached on disk where that is possible.

    Parameters
    ----------
    parallel
        Only for kernels called from the main thread with at least a millisecond of work.
    inline
        For small helpers of the same file: always inlined, never cached on their own.
    **options
        Passed on to numba.

    Notes
    -----
    Division follows numpy (x/0 is inf or NaN): numba's other rule tests every divisor, and no loop that divides
    becomes vector instructions then.
    """
    options = {"error_model": "numpy", **options}

    def wrap(f: Callable) -> Any:
        if inline:
            return numba.njit(nogil=True, inline="always", **options)(f)
        try:
            return numba.njit(nogil=True, cache=True, parallel=parallel, **options)(f)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(nogil=True, parallel=parallel, **options)(f)

    return wrap
