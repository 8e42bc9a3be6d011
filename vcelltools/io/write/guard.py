"""Check all outputs of a command before any work.

An output must not be, contain or lie inside an input, nor lie inside a store, a run, statistics or a zarr folder, and
two outputs must not overlap.
``--force`` replaces a file only with one of the same kind, and a folder only if it has the manifest that this
program writes for that kind of folder. Everything else is an error, even with ``--force``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcelltools.errors import UsageError, spell
from vcelltools.io.write.atomic import check_output, is_left

_ELSEWHERE = "choose another name"
_KINDS = {
    "hdf5": "an HDF5 file",
    "png": "a PNG image",
    "parquet": "a Parquet table",
    "feather": "a feather table",
    "vcc": "a .vcc",
    "pack": "a truth pack",
    "html": "a report of vcelltools",
    "json": "a JSON file",
    "text": "a text file",
    "config": "a configuration written by vcelltools init",
}
_HDF5_STARTS = (512, 1024, 2048)  # after a header, such as that of an h5mu
_MAGIC = ((b"\x89HDF", "hdf5"), (b"\x89PNG", "png"), (b"PAR1", "parquet"), (b"ARROW1", "feather"), (b"vctru", "pack"))
_WHOLES = {  # a file in a folder that is one thing -> what the folder is
    "X.f16": "the store", "vocabulary.json": "the run", "over_gene.npy": "the statistics", ".zgroup": "the zarr store",
    "zarr.json": "the zarr store",
}  # fmt: skip
INIT_MARK = "# vcelltools.toml: defaults for every command"  # the first line of files written by init
REPORT_MARK = '<meta name="generator" content="vcelltools">'


@dataclass(frozen=True)
class Target:
    """One output of a command.

    Attributes
    ----------
    path
        The target.
    kind
        A key of ``_KINDS`` for a file; the name of the kind for a folder ("store", "run").
    owns
        For a folder, a function that returns whether this program wrote the existing one.
    reuse
        Whether an existing output is allowed without ``--force``, because the command resumes it, reads it or moves it.
    """

    path: str | os.PathLike
    kind: str = "text"
    owns: Callable[[Path], bool] | None = None
    reuse: bool = False


def guard_outputs(
    targets: Iterable[Target], *, reads: Iterable[object] = (), force: bool = False, need_bytes: int = 0
) -> None:
    """Check all outputs of a command against each other, its inputs and existing files.

    Parameters
    ----------
    reads
        All inputs of the command; entries that are not paths (None, an AnnData) are skipped.
    force
        Whether an existing output may be replaced.
    need_bytes
        Free bytes that the first output needs on the disk.

    Raises
    ------
    UsageError
        If an output must not be written.
    EnvironmentFault
        If a folder is read-only, or a disk does not have enough space.
    """
    outputs = list(targets)
    sources = [Path(r) for r in reads if isinstance(r, str | os.PathLike)]
    for number, target in enumerate(outputs):
        path = Path(target.path)
        _refuse_inputs(path, sources)
        _refuse_part(path)
        for other in outputs[:number]:
            _refuse_other(path, Path(other.path))
        stands = os.path.lexists(path)
        check_output(
            path, force=force or target.reuse, need_bytes=0 if number else need_bytes, folder=target.owns is not None
        )
        if stands:
            _refuse_foreign(path, target)


def _refuse_inputs(path: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        if same_file(path, source):
            raise UsageError(f"{path} is the input itself", hint=f"choose another {spell('out')}")
        if os.path.lexists(source) and _lies_inside(path, source):
            raise UsageError(f"{path} lies inside the input {source}", hint=f"choose another {spell('out')}")
        if path.is_dir() and _lies_inside(source, path):
            raise UsageError(f"{path} contains the input {source}", hint=f"choose another {spell('out')}")


def _refuse_part(path: Path) -> None:
    """Raise if an output would become a part of a folder that is one thing, whether or not the command reads it."""
    for folder in Path(os.path.realpath(path)).parents:
        for name, what in _WHOLES.items():
            if os.path.lexists(folder / name):
                raise UsageError(f"{path} lies inside {what} {folder}", hint=f"choose another {spell('out')}")


def _refuse_other(path: Path, other: Path) -> None:
    if same_file(path, other):
        raise UsageError(f"two outputs have the name {path}", hint="choose different names")
    if _lies_inside(path, other) or _lies_inside(other, path):
        raise UsageError(
            f"the outputs {other} and {path} overlap, because one lies inside the other", hint="choose different names"
        )


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths are the same file, by inode if both exist (for links and letter case), else by real path."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return os.path.realpath(a) == os.path.realpath(b)


def _lies_inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, which need not exist, is below ``folder``."""
    return any(same_file(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def _refuse_foreign(path: Path, target: Target) -> None:
    """Raise if an existing output is of another kind or was not written by this program."""
    if target.owns is not None:
        if any(not is_left(p.name) for p in path.iterdir()) and not target.owns(path):
            raise UsageError(f"{path} contains other files and is not a {target.kind} of vcelltools", hint=_ELSEWHERE)
        return
    found = _sniff(path)
    if found not in ("", target.kind):
        is_ = _KINDS.get(found, "a file of another kind")
        raise UsageError(f"{path} is {is_}, but the output is {_KINDS[target.kind]}", hint=_ELSEWHERE)


def _sniff(path: Path) -> str:
    """Return the kind of a file by its first bytes, or "" for an empty file or a dangling link."""
    try:
        with open(path, "rb") as f:
            head = f.read(4096)
    except FileNotFoundError:
        return ""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if any(head.startswith(_MAGIC[0][0], at) for at in _HDF5_STARTS):
        return "hdf5"
    if head[257:262] == b"ustar":
        return "vcc"
    if b"\0" in head:
        return "other"
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith(INIT_MARK):
        return "config"
    if path.suffix.lower() == ".toml":
        return "toml"
    if text[:9].lower().startswith(("<!doctype", "<html")):
        return "html" if REPORT_MARK in text else "page"
    if text.startswith(("{", "[")) and path.suffix.lower() == ".json":
        return "json"
    return "text" if text else ""


def get_kind(path: str | os.PathLike) -> str:
    """Return the kind of an output by its extension, such as ``de.parquet`` or ``de.csv``."""
    suffix = Path(path).suffix.lower()
    return {
        ".parquet": "parquet",
        ".feather": "feather",
        ".html": "html",
        ".h5ad": "hdf5",
        ".h5mu": "hdf5",
        ".json": "json",
    }.get(suffix, "text")
