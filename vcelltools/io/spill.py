"""Keep arrays in a temporary file instead of in memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.write.atomic import translate_os_errors


class Spill:
    """Arrays of one length in a temporary file, which has no name and disappears with the object or the process.

    Any thread may read and write. The file is in the folder of ``TMPDIR``, and grows as values are written.

    Parameters
    ----------
    length
        Length of the arrays.
    dtypes
        Their dtypes.

    Raises
    ------
    EnvironmentFault
        If the folder cannot be written to, or the disk is full; so does :meth:`write`.

    Examples
    --------
    >>> import numpy as np
    >>> spill = Spill(100, np.dtype("float32"), np.dtype("uint16"))
    >>> spill.write(10, np.ones(2, np.float32), np.arange(2, dtype=np.uint16))
    >>> values, codes = np.empty(1, np.float32), np.empty(1, np.uint16)
    >>> spill.read(11, values, codes)
    >>> codes.tolist()
    [1]
    """

    def __init__(self, length: int, *dtypes: np.dtype) -> None:
        self.folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
        with translate_os_errors(self.folder):
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  closed with the object
        weakref.finalize(self, file.close)
        self._fd = file.fileno()
        self._starts = np.cumsum([0, *(d.itemsize * length for d in dtypes)]).tolist()

    def write(self, at: int, *parts: np.ndarray) -> None:
        """Write one contiguous part of each array, from position ``at`` on."""
        with translate_os_errors(self.folder):
            for start, part in zip(self._starts, parts, strict=False):
                pwrite_from(self._fd, part, start + at * part.itemsize)

    def read(self, at: int, *parts: np.ndarray) -> None:
        """Fill one contiguous part of each array, from position ``at`` on."""
        for start, part in zip(self._starts, parts, strict=False):
            pread_into(self._fd, part, start + at * part.itemsize, "the temporary file")


def pwrite_from(fd: int, values: np.ndarray, offset: int) -> int:
    """Write an array of any shape at ``offset`` of the file; return the number of bytes."""
    view = memoryview(np.ascontiguousarray(values)).cast("B")  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done
