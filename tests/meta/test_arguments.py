"""Every public function refuses a text for a number, and anything but True and False for a switch."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

import vcelltools as vc
import vcelltools.atlas
import vcelltools.spatial
from vcelltools.errors import UsageError, checked


def find_arguments():
    for room in (vc, vcelltools.spatial, vcelltools.atlas):
        for name in room._PUBLIC:
            verb = getattr(room, name)
            if not callable(verb) or dataclasses.is_dataclass(verb):
                continue
            for p in inspect.signature(verb).parameters.values():
                kinds = set(str(p.annotation).split(" | "))
                if kinds - {"None"} and kinds <= {"int", "float", "bool", "None"}:
                    yield pytest.param(verb, p.name, kinds, id=f"{room.__name__}.{name}.{p.name}")


ARGUMENTS = list(find_arguments())


@pytest.mark.parametrize(("verb", "name", "kinds"), ARGUMENTS)
def test_a_text_is_neither_a_number_nor_a_switch(verb, name, kinds):
    needed = {
        p.name: 1 if p.annotation in ("int", "float") else object()
        for p in inspect.signature(verb).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    with pytest.raises(UsageError) as e:
        verb(**needed | {name: "no"})
    assert e.value.field == name and "'no'" in e.value.message
    if "float" not in kinds and "int" in kinds:
        with pytest.raises(UsageError, match="whole number"):
            verb(**needed | {name: 2.5})


def test_there_are_many_of_them():
    assert len(ARGUMENTS) > 150


def test_what_is_accepted():
    @checked
    def verb(a: int, b: float | None = None, *, c: bool = False, d: str = "") -> tuple:
        return a, b, c, d

    assert verb(1) == (1, None, False, "")
    assert verb(np.int64(1), np.float32(2), c=np.True_, d="no") == (1, 2.0, True, "no")
    assert verb(b=3, a=1) == (1, 3, False, "")
    for bad in ({"a": None}, {"a": True}, {"a": 1, "b": float("nan")}, {"a": 1, "c": 1}, {"a": 1, "c": None}):
        with pytest.raises(UsageError):
            verb(**bad)
