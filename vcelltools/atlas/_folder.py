"""The folder of a fetched atlas: ``raw/{id}.h5ad``, ``samples.parquet`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.atlas._sources import ID_PATTERN
from vcelltools.errors import DataError, checked
from vcelltools.io.write.atomic import atomic_file, write_json
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
MANIFEST, SAMPLES, RAW = "manifest.json", "samples.parquet", "raw"
# first columns of samples.parquet, before those of the source
ID, PATH, CELLS = "_id", "_path", "_cells"
_BLOCK = 4 << 20


@dataclass
class Folder:
    """A fetched atlas on the disk.

    Attributes
    ----------
    dpath
        The folder.
    body
        The manifest.
    """

    dpath: Path
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def manifest_fpath(self) -> Path:
        """Path of the manifest."""
        return self.dpath / MANIFEST

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """For each id of a complete file, its bytes, md5, sha256 and cells."""
        return self.body.setdefault("files", {})

    @property
    def ids(self) -> list[str]:
        """The chosen experiments, in order."""
        return list(self.body.get("ids", []))

    def get_raw(self, name: str) -> Path:
        """Return the path of an experiment's file."""
        return self.dpath / RAW / f"{name}.h5ad"

    def save(self) -> None:
        """Write the manifest."""
        write_json(self.manifest_fpath, self.body, force=True)

    def read_samples(self) -> dict[str, dict[str, Any]]:
        """Return the table of chosen experiments as experiment -> column -> value; None for missing values."""
        import pyarrow.parquet as pq

        fpath = self.dpath / SAMPLES
        try:
            rows = pq.ParquetFile(fpath).read().to_pylist()  # read_table imports pandas
            found = [str(row[ID]) for row in rows]
        except Exception as e:  # pyarrow raises many types of errors for damaged bytes
            raise DataError(f"{fpath} cannot be read ({type(e).__name__})", hint="fetch again") from None
        if found != self.ids:
            raise DataError(f"{fpath} lists different experiments than {MANIFEST}", hint="fetch again")
        return {name: {c: _plain(v) for c, v in row.items()} for name, row in zip(found, rows, strict=True)}

    def write_samples(self, table: pd.DataFrame, ids: list[str], paths: list[str], cells: np.ndarray) -> None:
        """Write the table of the chosen experiments."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        head = {ID: pa.array(ids, pa.string()), PATH: pa.array(paths, pa.string())}
        head[CELLS] = pa.array(cells, pa.float64(), from_pandas=True)
        columns = {c: _to_arrow(table[c]) for c in table.columns if c not in head}
        with atomic_file(self.dpath / SAMPLES, force=True) as tmp:
            pq.write_table(pa.table({**head, **columns}), tmp, compression="zstd")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return None if isinstance(value, float) and np.isnan(value) else value


def _to_arrow(values: pd.Series) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values.to_numpy(), from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array([None if v is None else str(v) for v in values], pa.string())


@checked
def open_folder(dpath: str | os.PathLike) -> Folder:
    """Open a folder that ``atlas fetch`` wrote.

    Raises
    ------
    DataError
        If it is not such a folder, or its manifest is damaged.
    """
    d = Path(dpath)
    fpath = d / MANIFEST
    try:
        body = json.loads(fpath.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(
            f"{d} holds no fetched atlas ({type(e).__name__})",
            hint="fetch one with vcelltools atlas fetch SOURCE --out DIR",
        ) from None
    if not isinstance(body, dict) or body.get("kind") != "fetched atlas" or body.get("schema") != SCHEMA:
        raise DataError(f"{fpath} is not a manifest of a fetched atlas with schema {SCHEMA}")
    names = [*body.get("ids", []), *body.get("files", {})]
    if bad := next((x for x in names if not isinstance(x, str) or not ID_PATTERN.fullmatch(x)), None):
        raise DataError(f"{fpath}: the id {bad!r} is not allowed")
    return Folder(d, body)


def hash_file(fpath: Path) -> tuple[str, str]:
    """Return (md5, sha256) of a file."""
    md5, sha = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(fpath, "rb") as f:
        while block := f.read(_BLOCK):
            md5.update(block)
            sha.update(block)
    return md5.hexdigest(), sha.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result of verifying a fetched atlas.

    Attributes
    ----------
    path
        The folder.
    files, bytes
        Number of files that were hashed, and their total size.
    bad
        (id, fault) of each file with a fault.
    missing
        Chosen experiments that were not fetched.
    """

    path: Path
    files: int
    bytes: int
    bad: list[tuple[str, str]]
    missing: list[str]

    @property
    def ok(self) -> bool:
        """Whether every chosen experiment is present and unchanged."""
        return not self.bad and not self.missing

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        bad = [{"id": i, "reason": why} for i, why in self.bad]
        return {"path": str(self.path), "ok": self.ok, "files": self.files, "bytes": self.bytes, "bad": bad,
                "missing": self.missing}  # fmt: skip


@checked
def verify_folder(dpath: str | os.PathLike, *, progress: Progress = SILENT) -> Verified:
    """Hash every fetched file again and compare it with the manifest."""
    folder = open_folder(dpath)
    bad = []
    total = 0
    progress.start("hashing", sum(f["bytes"] for f in folder.files.values()), "bytes")
    for name, facts in folder.files.items():
        fpath = folder.get_raw(name)
        size = fpath.stat().st_size if fpath.is_file() else None
        if size is None:
            bad.append((name, "the file is missing"))
        elif size != facts["bytes"]:
            bad.append((name, f"it has {size:,} bytes, but {facts['bytes']:,} were fetched"))
        elif hash_file(fpath)[1] != facts["sha256"]:
            bad.append((name, "its hash has changed since it was fetched"))
        total += size or 0
        progress.advance(facts["bytes"])
    progress.finish()
    missing = [x for x in folder.ids if x not in folder.files]
    return Verified(path=folder.dpath, files=len(folder.files), bytes=total, bad=bad, missing=missing)
