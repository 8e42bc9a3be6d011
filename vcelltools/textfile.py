"""Small text files that users write or name: read whole, or refused in plain words."""

from __future__ import annotations

import os
from pathlib import Path

from vcelltools.errors import DataError, EnvironmentFault


def read_text(path: str | os.PathLike, *, what: str, hint: str | None = None, missing: str = "no such file") -> str:
    """Return the text of a UTF-8 file.

    Parameters
    ----------
    what
        What the file should be, for the message: ``a list of genes``.
    hint
        What to do where it is something else or missing.
    missing
        What is said where nothing is there.

    Raises
    ------
    DataError
        Where it is missing, a folder, or not text.
    EnvironmentFault
        Where it may not be read.
    """
    p = Path(path)
    try:
        return p.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise DataError(f"{p}: {missing}", hint=hint) from e
    except IsADirectoryError as e:
        raise DataError(f"{p}: is a folder; {what} is expected", hint=hint) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{p}: is not text; {what} is expected", hint=hint) from e
    except PermissionError as e:
        raise EnvironmentFault(f"{p}: permission denied", hint="check the file's mode and owner") from e
    except OSError as e:
        raise DataError(f"{p}: cannot be read: {e.strerror}", hint=hint) from e
