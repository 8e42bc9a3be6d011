"""Load numba without modules that kernels do not need, and without a configuration file in the working directory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CONFIG_FNAME = ".numba_config.yaml"


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Make imports of these modules fail."""
    saved = {n: sys.modules[n] for n in names if n in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for n in names:
            del sys.modules[n]
        sys.modules.update(saved)


def load_numba(*, alone: bool = False) -> None:
    """Load numba so that it never reads ``.numba_config.yaml``.

    numba reads that file in the working directory when it is loaded, and again at each compilation:
    in a folder from someone else, it could name a cache whose pickles run code. The environment variables
    ``NUMBA_*`` belong to the user and still apply.

    Parameters
    ----------
    alone
        Whether no other thread imports anything. SciPy, of which numba only needs the version, and YAML are then not
        loaded (which saves 0.2 s). For the process of the command line.
    """
    if "numba" not in sys.modules:
        exists = os.path.exists(_CONFIG_FNAME)
        with warnings.catch_warnings(), _hidden(*(["scipy"] if alone else []), *(["yaml"] if alone or exists else [])):
            if exists:
                warnings.filterwarnings("ignore", "A Numba config file is found")
            import numba  # noqa: F401
    from numba.core import config

    config._config_fname = os.devnull  # never a regular file, which numba checks for
    config.reload_config()
