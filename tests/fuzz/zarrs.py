"""zarr stores for the fuzzer: a seed's HDF5 tree copied into one, what can be wrong with its files, a naive reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

META = ("zarr.json", ".zarray", ".zattrs", ".zgroup")


def copy_to_zarr(source: Path, path: Path, rng: np.random.Generator) -> None:
    """Copy an HDF5 file, damaged or not, as a zarr store of format 2 or 3; what zarr cannot hold is left out."""
    version = int(rng.choice([2, 3]))
    sharded = version == 3 and rng.random() < 0.3
    if path.exists():
        shutil.rmtree(path)
    nodes: dict[str, tuple[dict[str, Any], np.ndarray | None]] = {}
    with h5py.File(source, "r") as f:  # read first: h5py's lock and zarr's threads would wait for each other
        keys: list[str] = ["/"]
        f.visit(keys.append)
        for key in keys:
            nodes[key] = dict(f[key].attrs), _read(f[key])
    root = zarr.open_group(str(path), mode="w", zarr_format=version)
    for key, (attrs, values) in nodes.items():
        if values is not None and values.dtype.names is None:
            node = _write_array(root, key, values, version, sharded, rng)
        elif values is None:
            node = root if key == "/" else root.require_group(key)
        else:
            continue
        node.update_attributes({k: v for k, v in map(_to_plain, attrs.items()) if v is not None})


def _read(node: h5py.Group | h5py.Dataset) -> np.ndarray | None:
    if isinstance(node, h5py.Group) or node.shape is None:
        return None
    return np.asarray(node[()])


def _to_plain(item: tuple[str, Any]) -> tuple[str, Any]:
    key, value = item
    plain = value.tolist() if hasattr(value, "tolist") else value
    plain = plain.decode("utf-8", "replace") if isinstance(plain, bytes) else plain
    try:
        json.dumps(plain)
    except (TypeError, ValueError):  # a reference, a list of bytes
        return key, str(plain)
    return key, plain


def _write_array(root: Any, key: str, values: np.ndarray, version: int, sharded: bool, rng: np.random.Generator) -> Any:
    if values.dtype.kind in "OS":
        flat = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.ravel().tolist()]
        values = np.array(flat, dtype=object).reshape(values.shape)
    chunks = tuple(max(1, min(s, int(rng.integers(4, 80)))) for s in values.shape)
    options: dict[str, Any] = {"chunks": chunks} if values.ndim else {}
    if sharded and values.ndim and values.dtype.kind in "iuf":
        options["shards"] = tuple(2 * c for c in chunks)
    if version == 3:
        options["compressors"] = [None, GzipCodec(), ZstdCodec(), BloscCodec()][int(rng.integers(4))]
    dtype = str if values.dtype.kind == "O" else values.dtype
    made = root.create_array(key, shape=values.shape, dtype=dtype, config={"write_empty_chunks": True}, **options)
    made[...] = values
    return made


def _list_files(path: Path, *, meta: bool) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and (p.name in META) == meta)


def _pick(rng: np.random.Generator, items: list) -> Any:
    return items[int(rng.integers(len(items)))]


def drop_chunk(path: Path, rng: np.random.Generator) -> None:
    """Remove a chunk: zarr would read its fill value."""
    _pick(rng, _list_files(path, meta=False)).unlink()


def rename_chunk(path: Path, rng: np.random.Generator) -> None:
    """Give a chunk another place: as many files as before, one of them no chunk of the array."""
    fpath = _pick(rng, _list_files(path, meta=False))
    fpath.rename(fpath.with_name(str(_pick(rng, ["99", "0.0.0", "junk", "0.99"]))))


def exchange_chunks(path: Path, rng: np.random.Generator) -> None:
    """Put one chunk's bytes in another's place."""
    files = _list_files(path, meta=False)
    _pick(rng, files).write_bytes(_pick(rng, files).read_bytes())


def damage_bytes(path: Path, rng: np.random.Generator) -> None:
    """Flip bits of a chunk, cut it, empty it, lengthen it."""
    fpath = _pick(rng, _list_files(path, meta=False))
    raw = bytearray(fpath.read_bytes())
    choice = int(rng.integers(4))
    if choice == 0 and raw:
        for _ in range(int(rng.integers(1, 5))):
            raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    elif choice == 1:
        del raw[int(rng.integers(len(raw) + 1)) :]
    elif choice == 2:
        raw.clear()
    else:
        raw += rng.bytes(int(rng.integers(1, 64)))
    fpath.write_bytes(bytes(raw))


def damage_metadata(path: Path, rng: np.random.Generator) -> None:
    """Change, retype or remove one entry of a node's metadata, at any depth."""
    fpath = _pick(rng, _list_files(path, meta=True))
    body = json.loads(fpath.read_text())
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(body)
    if not places:
        return
    node, key = _pick(rng, places)
    if rng.random() < 0.2:
        del node[key]
    else:
        others = [o[k] for o, k in places]
        node[key] = _pick(rng, [0, 1, -1, 3, 2**40, None, "", "x", [], {}, 0.5, True, "<i4", "float64", *others])
    try:
        fpath.write_text(json.dumps(body))
    except (ValueError, RecursionError):  # an entry that holds itself
        return


def damage_text(path: Path, rng: np.random.Generator) -> None:
    """Cut or overwrite a metadata file."""
    fpath = _pick(rng, _list_files(path, meta=True))
    raw = bytearray(fpath.read_bytes())
    at = int(rng.integers(len(raw)))
    if rng.random() < 0.5:
        del raw[at:]
    else:
        raw[at] = int(rng.integers(256))
    fpath.write_bytes(bytes(raw))


def link_chunk(path: Path, rng: np.random.Generator) -> None:
    """Replace a file by a symbolic link to one outside."""
    fpath = _pick(rng, _list_files(path, meta=bool(rng.random() < 0.3)))
    away = path.with_name("elsewhere")
    away.write_bytes(fpath.read_bytes())
    fpath.unlink()
    fpath.symlink_to(away)


MUTATIONS: list[Callable[[Path, np.random.Generator], None]] = [
    drop_chunk, rename_chunk, exchange_chunks, damage_bytes, damage_bytes, damage_metadata, damage_metadata,
    damage_metadata, damage_text, link_chunk,
]  # fmt: skip


# -- the naive reader: whole arrays by zarr itself, and every chunk asked for by another fill value -------------------


def read_array(path: Path, key: str) -> np.ndarray:
    """Return a whole array.

    Raises
    ------
    Exception
        Where zarr cannot read it, where it lies behind a link, and where a chunk of a sparse matrix is absent (zarr
        leaves out chunks of other arrays that hold the fill value alone).
    """
    folder = path / key
    for fpath in [folder, *folder.rglob("*")]:
        if fpath.is_symlink():
            raise ValueError("a link")
    values = np.asarray(zarr.open_array(str(folder), mode="r")[...])
    meta = next(p for n in META[:2] if (p := folder / n).is_file())
    kept = meta.read_text()
    body = json.loads(kept)
    if key.rpartition("/")[2] in ("data", "indices", "indptr"):
        try:
            seen = []
            for fill in ("one", "two") if values.dtype.kind in "TO" else (1, 2):
                body["fill_value"] = fill
                meta.write_text(json.dumps(body))
                seen.append(np.asarray(zarr.open_array(str(folder), mode="r")[...]))
        finally:
            meta.write_text(kept)
        equal = seen[0] == seen[1]
        if not (equal | ((seen[0] != seen[0]) & (seen[1] != seen[1]))).all():
            raise ValueError("a chunk is absent")
    return values


def read_attributes(path: Path, key: str) -> dict[str, Any]:
    """Return the attributes of a group or array."""
    return dict(zarr.open(str(path / key), mode="r").attrs)
