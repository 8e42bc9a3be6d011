"""The only caller of ``numba.njit``: one set of options, and a cache that never stops an import.

numba caches compiled code beside the source file. In a read-only installation it falls back to a folder in the
user's home, and where that is not writable either it raises at import. :func:`kernel` then compiles without a
cache. numba stamps only the file that defines a kernel, so a kernel's helpers live in the same file.
"""

from __future__ import annotations

import os
import sys
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


def load_without_blas() -> None:
    """Load numba's array functions without the BLAS that they look for, which saves 0.15 s of importing SciPy.

    For a process of our own whose kernels do no linear algebra: ``np.dot`` cannot be compiled in it afterwards.
    numba takes a missing ``scipy.linalg.cython_blas`` as "no BLAS here".
    """
    name = "scipy.linalg.cython_blas"
    if name in sys.modules or "numba.np.arraymath" in sys.modules:
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del sys.modules[name]


def kernel(parallel: bool = False, inline: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """Compile a function in nopython mode, without the GIL, cached on disk where that is possible.

    Parameters
    ----------
    parallel
        Only for kernels called from the main thread with at least a millisecond of work.
    inline
        For small helpers of the same file: always inlined, never cached on their own.
    """

    def wrap(f: Callable) -> Any:
        if inline:
            return numba.njit(nogil=True, inline="always", **options)(f)
        try:
            return numba.njit(nogil=True, cache=True, parallel=parallel, **options)(f)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(nogil=True, parallel=parallel, **options)(f)

    return wrap
