"""Splits into training, validation and test groups, in the TOML format ``[datasets] [training] [zeroshot] [fewshot]``.

::

    [datasets]
    replogle = "stores/replogle"        # names and paths of the stores

    [training]
    replogle = "train"                  # cell lines that are not listed elsewhere train

    [zeroshot]
    "replogle.jurkat" = "test"          # all perturbed cells of a line

    [fewshot."replogle.rpe1"]           # listed perturbations are held out; the others train
    val = ["AARS", "ABCB7"]
    test = ["TP53"]

    [heldout]                           # perturbations held out in every line (an extension of cell-load's format)
    test = ["MYC"]

Control cells belong to every part, as in cell-load.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.textfile import parse_toml, read_text

if TYPE_CHECKING:
    from vcelltools.stores.store import Store

PARTS = ("train", "val", "test")
_SECTIONS = ("datasets", "training", "zeroshot", "fewshot", "heldout")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of the split of each (data set, cell line, perturbation).

    Attributes
    ----------
    training
        Data sets whose unlisted cell lines train; None for all.
    zeroshot
        (data set, cell line) -> part.
    fewshot
        (data set, cell line) -> {perturbation: part}.
    heldout
        Perturbation -> part, in every data set and line.
    datasets
        Name -> path, as given.
    where
        The source of the split, for messages.
    """

    training: frozenset[str] | None = None
    zeroshot: Mapping[tuple[str, str], str] = field(default_factory=dict)
    fewshot: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    heldout: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    where: str = "the split"

    def get_part(self, dataset: str, line: str, perturbation: str) -> str | None:
        """Return ``train``, ``val``, ``test``, or None if the cells are not used.

        If several rules apply, the strictest one wins: test before val before train.
        """
        rules = []
        if perturbation in self.heldout:
            rules.append(self.heldout[perturbation])
        if (dataset, line) in self.zeroshot:
            rules.append(self.zeroshot[dataset, line])
        elif (dataset, line) in self.fewshot:
            rules.append(self.fewshot[dataset, line].get(perturbation, "train"))
        elif self.training is None or dataset in self.training:
            rules.append("train")
        else:
            return None
        return max(rules, key=PARTS.index)

    def get_run_parts(self, store: Store) -> np.ndarray:
        """Return (runs,) object: the part of each run, ``control`` for controls, or None if it is not used."""
        runs = store.runs
        cache: dict[tuple[str, str], str | None] = {}
        out = np.empty(len(runs), dtype=object)
        columns = (runs["cell_line"], runs["perturbation"], runs["is_control"])
        for i, (line, pert, control) in enumerate(zip(*columns, strict=True)):
            if control:
                out[i] = "control"
                continue
            key = (line, pert)
            if key not in cache:
                cache[key] = self.get_part(store.name, line, pert)
            out[i] = cache[key]
        return out

    def get_train_groups(self, store: Store) -> np.ndarray:
        """Return (groups,) bool: rows of ``store.sums`` that may be used in training (training groups and controls)."""
        parts = self.get_run_parts(store)
        out = np.zeros(len(store.group_sizes), bool)
        out[store.runs["sums_row"].to_numpy()[np.isin(parts.astype(str), ["train", "control"])]] = True
        return out

    def check(self, stores: Sequence[Store]) -> None:
        """Check that everything the split names is in the stores.

        Raises
        ------
        DataError
            If a data set, cell line or perturbation does not exist (the message names the most similar one), or a
            control is to be held out.
        """
        by_name = {s.name: s for s in stores}
        for name in sorted({d for d, _ in [*self.zeroshot, *self.fewshot]} | (self.training or frozenset())):
            self._need(name, by_name, "data set")
        for name, line in [*self.zeroshot, *self.fewshot]:
            self._need(line, set(by_name[name].runs["cell_line"]), f"cell line of {name}")
        for (name, line), perts in self.fewshot.items():
            runs = by_name[name].runs
            here = runs[runs["cell_line"] == line]
            self._need_perturbations(perts, [here], f"perturbation of {name}.{line}")
        self._need_perturbations(self.heldout, [s.runs for s in stores] if self.heldout else [], "perturbation")

    def refuse_empty_training(self, stores: Sequence[Store]) -> None:
        """Raise a DataError that explains why there are no training groups and how to fix it."""
        if all(s.runs["is_control"].all() for s in stores):
            names = ", ".join(s.name for s in stores)
            raise DataError(
                f"every cell of {names} is a control, so there is nothing to train on",
                hint="add a store with perturbed cells",
            )
        missing = "[training] lists no other cell line" if self.training else "there is no [training] section"
        raise DataError(
            f"{self.where}: there are no training groups: "
            f"{missing if self.training is not None else 'all groups are held out'}",
            hint=f'list the data sets to train on under [training], such as {stores[0].name} = "train"',
        )

    def _need_perturbations(self, labels: Iterable[str], runs: list[Any], what: str) -> None:
        controls = set().union(*(r.loc[r["is_control"], "perturbation"] for r in runs))
        perturbations = set().union(*(r.loc[~r["is_control"], "perturbation"] for r in runs))
        for p in labels:
            if p in controls - perturbations:
                raise DataError(f"{self.where}: {p!r} is a control, which cannot be held out", hint="remove it")
            self._need(p, perturbations, what)

    def _need(self, label: str, there: Iterable[str], what: str) -> None:
        there = list(there)
        if label not in there:
            near = difflib.get_close_matches(label, there, 1, 0.6)
            some = ", ".join(sorted(there)[:12])
            hint = f"did you mean {near[0]!r}?" if near else f"available: {some}{', ...' if len(there) > 12 else ''}"
            raise DataError(f"{self.where}: no {what} is named {label!r}", hint=hint)


def parse_split(raw: Mapping[str, Any], *, where: str, names: Iterable[str] = ()) -> Split:
    """Build a split from the plain values of a TOML file.

    Parameters
    ----------
    names
        Names of data sets besides those in ``[datasets]``, to find the end of the data set in ``a.b.c``.
    """
    for key in raw:
        if key not in _SECTIONS:
            near = difflib.get_close_matches(key, _SECTIONS, 1, 0.5)
            hint = f"did you mean [{near[0]}]?" if near else f"sections: {', '.join(_SECTIONS)}"
            raise DataError(f"{where}: unknown section [{key}]", hint=hint)
        if not isinstance(raw[key], Mapping):
            raise DataError(f"{where}: {key} is not a table", hint=f"write [{key}]")
    datasets = {k: _need_str(v, f"{where}: [datasets] {k}") for k, v in raw.get("datasets", {}).items()}
    training = raw.get("training", {})
    for k, v in training.items():
        if v != "train":
            raise DataError(f"{where}: [training] {k} = {v!r}, but only 'train' is allowed there")
    known = sorted({*datasets, *training, *names}, key=len, reverse=True)
    zeroshot = {}
    for key, part in _flatten(raw.get("zeroshot", {}), leaf=str):
        zeroshot[_split_key(key, known, where)] = _need_part(part, f"{where}: [zeroshot] {key}")
    fewshot: dict[tuple[str, str], dict[str, str]] = {}
    for key, lists in _flatten(raw.get("fewshot", {}), leaf=dict):
        place = _split_key(key, known, where)
        if place in zeroshot:
            raise DataError(f"{where}: {key} is both zeroshot and fewshot", hint="keep one of the two")
        fewshot[place] = _read_lists(lists, f"{where}: [fewshot.{key!r}]")
    heldout = _read_lists(raw.get("heldout", {}), f"{where}: [heldout]")
    return Split(
        training=frozenset(training),
        zeroshot=zeroshot,
        fewshot=fewshot,
        heldout=heldout,
        datasets=datasets,
        where=where,
    )


def _need_str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r}, but must be text")
    return value


def _need_part(value: Any, where: str) -> str:
    if value not in PARTS:
        raise DataError(f"{where} = {value!r}", hint=f"one of: {', '.join(PARTS)}")
    return value


def _flatten(table: Mapping[str, Any], *, leaf: type, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, leaf) pairs; unquoted dots in TOML make nested tables, but quoted ones do not."""
    out = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        is_leaf = not isinstance(value, Mapping) or (
            leaf is dict and any(not isinstance(v, Mapping) for v in value.values())
        )
        out += [(name, value)] if is_leaf or not value else _flatten(value, leaf=leaf, prefix=f"{name}.")
    return out


def _split_key(key: str, known: list[str], where: str) -> tuple[str, str]:
    for name in known:
        if key.startswith(f"{name}.") and len(key) > len(name) + 1:
            return name, key[len(name) + 1 :]
    head, dot, tail = key.partition(".")
    if not dot or not tail:
        raise DataError(f"{where}: {key!r} does not have the form dataset.cell_line")
    return head, tail


def _read_lists(lists: Any, where: str) -> dict[str, str]:
    if not isinstance(lists, Mapping):
        raise DataError(f"{where}: it must hold lists of perturbations (val = [...], test = [...])")
    out: dict[str, str] = {}
    for part, perts in lists.items():
        _need_part(part, f"{where} {part}" if part in PARTS else f"{where}: a key")
        if not isinstance(perts, list) or not all(isinstance(p, str) for p in perts):
            raise DataError(f"{where} {part} must be a list of perturbations")
        for p in perts:
            if out.get(p, part) != part:
                raise DataError(f"{where}: {p!r} is in both {out[p]} and {part}")
            out[p] = part
    return out


def read_split(path: str | os.PathLike, *, names: Iterable[str] = ()) -> Split:
    """Read a split from a TOML file."""
    fpath = Path(path)
    what = "a split in TOML, with [training], [zeroshot] or [fewshot],"
    text = read_text(fpath, what=what, hint="see the example in docs/guide.md")
    raw = parse_toml(text, where=str(fpath), hint="see the example in docs/guide.md")
    return parse_split(raw, where=str(fpath), names=names)


def hold_out(stores: Sequence[Store], *, test: float = 0.1, val: float = 0.0, seed: int = 0) -> Split:
    """Hold out a fraction of the perturbations in every cell line, chosen by a seeded hash of the label.

    The part of a label depends only on the label and the seed, so adding a data set does not change it.
    """
    if not 0 <= test <= 1 or not 0 <= val <= 1 or test + val > 1:
        raise ValueError(f"test={test} and val={val} are not valid fractions")
    heldout = {}
    for p, u in _hash_perturbations(stores, seed).items():
        if u < test:
            heldout[p] = "test"
        elif u < test + val:
            heldout[p] = "val"
    return Split(heldout=heldout, where=f"hold_out(test={test}, val={val}, seed={seed})")


def rank_perturbations(stores: Sequence[Store], seed: int) -> list[str]:
    """Return all perturbations in the order in which :func:`hold_out` would take them."""
    place = _hash_perturbations(stores, seed)
    return sorted(place, key=lambda p: (place[p], p))


def _hash_perturbations(stores: Sequence[Store], seed: int) -> dict[str, float]:
    """Return a number in [0, 1) for every perturbation: a seeded hash of its label."""
    from xxhash import xxh3_64_intdigest

    names = {p for s in stores for p in s.runs.loc[~s.runs["is_control"], "perturbation"].unique()}
    return {p: xxh3_64_intdigest(p.encode(), seed) / 2.0**64 for p in sorted(names)}
