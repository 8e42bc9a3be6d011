"""Compile kernels with one set of options and our own cache (:mod:`vcelltools.kernels.cache`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vcelltools.kernels._lean import load_numba

load_numba()

import numba  # noqa: E402
import numba.extending  # noqa: E402

from vcelltools.kernels.cache import KernelCache, get_folder  # noqa: E402


def kernel(parallel: bool = False, inline: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """Compile a function in nopython mode, without the GIL, cached on disk if possible.

    Parameters
    ----------
    parallel
        Only for kernels called from the main thread with at least a millisecond of work.
    inline
        For small helpers, which are always inlined and never cached separately.
    **options
        Passed on to numba.

    Notes
    -----
    Division follows numpy (x/0 is inf or NaN), because with numba's other rule, which tests every divisor, no loop with
    a division is vectorised.
    """
    options = {"error_model": "numpy", **options}

    def wrap(f: Callable) -> Any:
        if inline:
            return numba.njit(nogil=True, inline="always", **options)(f)
        compiled = numba.njit(nogil=True, parallel=parallel, **options)(f)
        folder = get_folder()
        known = f.__module__.startswith("vcelltools.")  # the stamp of the cache covers our own files alone
        if folder is not None and known and compiled is not f:  # with NUMBA_DISABLE_JIT, it stays plain Python
            compiled._cache = KernelCache(f, folder)
        return compiled

    return wrap


@numba.extending.intrinsic
def count_trailing_zeros(context: Any, word: Any) -> Any:
    """Return the position of the lowest bit of a uint64 that is set: one instruction, which numba does not offer."""
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return numba.types.int64(numba.types.uint64), generate
