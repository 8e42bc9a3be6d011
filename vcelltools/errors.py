"""The exceptions that vcelltools raises deliberately, and their exit codes.

::

    VcellError                  1   base class, never raised
    |-- UsageError              2   wrong options, or an existing output without --force
    |-- DataError               3   bad or missing input: a file, key, column, label or value
    |   `-- NotCountsError      3   a matrix that should hold counts does not
    |-- EnvironmentFault        4   disk space, permissions, a missing filter, no TPU, a lost lock
    `-- InterruptedRun          5   interrupted; a second run resumes

Every message is one line that says what is wrong and where, followed by ``hint``, which says what to do about it.
Any other exception is a bug: exit code 1, with a traceback.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from inspect import signature
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# argument -> its option while a command runs; None if the caller is Python
_flags: Mapping[str, str] | None = None


def speak_flags(flags: Mapping[str, str] | None) -> None:
    """Make :func:`spell` write options such as ``{"layer": "--layer"}``; None restores Python names."""
    global _flags  # noqa: PLW0603
    _flags = flags


def get_flags() -> Mapping[str, str] | None:
    """Return the argument of the last :func:`speak_flags`, to pass on to a child process."""
    return _flags


def spell(field: str, value: Any = None) -> str:
    """Return an argument as the caller writes it: ``layer`` in Python, ``--layer`` on the command line.

    With a ``value``: ``layer='counts'`` and ``--layer counts``; a true or false switch is ``force=True`` and
    ``--force``, ``log=False`` and ``--no-log``. A setting without an option is written as in the configuration.

    Examples
    --------
    >>> spell("layer"), spell("layer", "counts"), spell("force", True)
    ('layer', "layer='counts'", 'force=True')
    """
    if _flags is None:
        return field if value is None else f"{field}={value!r}"
    flag = _flags.get(field)
    if flag is None:
        return field if value is None else f"{field} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
    if value is None or value is True:
        return flag
    return f"--no-{flag[2:]}" if value is False else f"{flag} {shlex.quote(str(value))}"


class VcellError(Exception):
    """Base class of all expected failures.

    Parameters
    ----------
    message
        What is wrong, and where: the file, the key, the position.
    hint
        What to do about it, shown after the message.
    field
        The Python name of the argument at fault, if there is one.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self):  # keep the hint when a worker process raises
        return _rebuild, (type(self), self.message, self.hint, self.field)


def _rebuild(cls, message, hint, field=None):
    return cls(message, hint=hint, field=field)


class UsageError(VcellError):
    """The command was called with options or arguments that it does not support."""

    exit_code = 2
    kind = "usage"


class DataError(VcellError):
    """The input is damaged, or lacks something that the command needs."""

    exit_code = 3
    kind = "data"


class NotCountsError(DataError):
    """The command needs counts, and there is evidence that the matrix does not hold counts."""

    kind = "not-counts"


LARGEST_FLOAT, LARGEST_INT = 1e12, 2**63 - 1


def check_number(field: str, value: float | None, *, low: float | None = None, high: float | None = None) -> None:
    """Raise a :class:`UsageError` unless a setting is a finite number between ``low`` and ``high``.

    None is accepted. The command line, the configuration and the functions all check numbers here.
    """
    if value is None:
        return
    if not isinstance(value, Real):
        raise UsageError(f"{spell(field)} is {value!r}, but must be a number", field=field)
    largest = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
    if not abs(value) <= largest:  # also true for NaN
        raise UsageError(f"{spell(field)} is {value}, but must be a finite number of at most {largest:g}", field=field)
    if low is not None and value < low:
        raise UsageError(f"{spell(field)} is {value:g}, but must be at least {low:g}", field=field)
    if high is not None and value > high:
        raise UsageError(f"{spell(field)} is {value:g}, but must be at most {high:g}", field=field)


def checked(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check the numbers and switches with which a public function is called, by its annotations.

    A text such as ``force="no"`` would otherwise be taken for true, and ``top="50"`` would fail deep inside.
    """
    kinds: dict[str, set[str]] = {}
    for name, parameter in signature(verb).parameters.items():
        parts = set(str(parameter.annotation).split(" | "))
        if parts - {"None"} and parts <= {"int", "float", "bool", "None"}:
            kinds[name] = parts
    order = list(signature(verb).parameters)

    @functools.wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name, value in (*zip(order, args, strict=False), *kwargs.items()):
            if name in kinds:
                _check_kind(name, value, kinds[name])
        return verb(*args, **kwargs)

    return call


def _check_kind(field: str, value: Any, kinds: set[str]) -> None:
    if value is None and "None" in kinds:
        return
    is_switch = type(value).__name__ in ("bool", "bool_")  # Python's and numpy's
    if is_switch and "bool" in kinds:
        return
    if kinds <= {"bool", "None"}:
        raise UsageError(f"{spell(field)} is {value!r}, but must be True or False", field=field)
    if is_switch or not isinstance(value, Real):
        raise UsageError(f"{spell(field)} is {value!r}, but must be a number", field=field)
    if "float" not in kinds and not isinstance(value, Integral):
        raise UsageError(f"{spell(field)} is {value!r}, but must be a whole number", field=field)
    check_number(field, value)  # type: ignore[arg-type]  # a number of numpy is one too


class EnvironmentFault(VcellError):
    """The machine cannot do the work: no space or permission, a missing HDF5 filter or accelerator, another writer."""

    exit_code = 4
    kind = "environment"


class InterruptedRun(VcellError):
    """A signal or a timer stopped the work; what is done is kept, and a second run resumes it."""

    exit_code = 5
    kind = "interrupted"
