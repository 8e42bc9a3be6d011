"""The exceptions that vcelltools raises on purpose, and the exit code each one becomes.

::

    VcellError                  1   never raised itself
    |-- UsageError              2   wrong options, an output that exists without --force
    |-- DataError               3   bad or missing input: file, key, column, label, value
    |   `-- NotCountsError      3   counts are needed and the matrix does not hold counts
    |-- EnvironmentFault        4   disk space, permission, missing filter, no TPU, lost lock
    `-- InterruptedRun          5   stopped, and a second run resumes

Every message is one line that says what is wrong, where, and (after ``hint``) what to do about it.
Anything else that escapes is a bug: exit code 1, with a traceback.
"""

from __future__ import annotations


class VcellError(Exception):
    """Base of every expected failure.

    Parameters
    ----------
    message
        What is wrong and where: the file, the key, the position.
    hint
        What to do about it; shown after the message.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self):  # keeps the hint when a worker process raises
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls, message, hint):
    return cls(message, hint=hint)


class UsageError(VcellError):
    """The command was asked for something it does not do."""

    exit_code = 2
    kind = "usage"


class DataError(VcellError):
    """The input is broken, or lacks what was asked of it."""

    exit_code = 3
    kind = "data"


class NotCountsError(DataError):
    """Counts are needed, and the evidence says that the matrix does not hold them."""

    kind = "not-counts"


class EnvironmentFault(VcellError):
    """The machine refuses: space, permission, a missing HDF5 filter, no accelerator, another writer."""

    exit_code = 4
    kind = "environment"


class InterruptedRun(VcellError):
    """Stopped by a signal or a timer; the work done so far is kept and a second run resumes it."""

    exit_code = 5
    kind = "interrupted"
