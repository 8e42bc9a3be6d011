"""numba loaded without what a process of our own has no use for: 0.2 s less at every start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Load numba and its array functions without SciPy and YAML.

    For the command line's own process, before other threads import anything, and for kernels that do no linear
    algebra: ``np.dot`` cannot be compiled in it afterwards. numba looks for SciPy to check its version and to find a
    BLAS, for YAML to read a configuration in the working folder, and does without where they are missing.
    """
    if "numba" in sys.modules:
        return
    with _hidden("scipy", *([] if os.path.exists(".numba_config.yaml") else ["yaml"])):
        import numba
    with _hidden("scipy.linalg.cython_blas"):
        import numba.np.arraymath  # noqa: F401
