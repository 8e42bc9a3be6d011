"""What can be wrong with a file: structure, encodings, attributes, storage, bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from tests.files import TEXT
from tests.fuzz import zarrs
from tests.fuzz.seeds import Seed
from tests.fuzz.tenxfolder import mutate_folder
from tests.fuzz.zarrs import copy_to_zarr

Mutation = Callable[[h5py.File, Seed, np.random.Generator], None]
SPECIAL = [
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    -(2**63),
]
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i4", ">f8", "?", "c8", "S4"]


def _list(f: h5py.File) -> tuple[list[str], list[str]]:
    """Return the keys of all arrays and of all groups."""
    arrays, groups = [], []
    f.visititems(lambda k, v: (groups if isinstance(v, h5py.Group) else arrays).append(k))
    return arrays, groups


def _parts(f: h5py.File, seed: Seed) -> list[str]:
    """Return the keys of the matrix's arrays."""
    node = f[seed.matrix]
    if isinstance(node, h5py.Dataset):
        return [seed.matrix]
    return [f"{seed.matrix}/{k}" for k in ("indptr", "indices", "data") if k in node]


def _pick(rng: np.random.Generator, items: list):
    return items[int(rng.integers(len(items)))]


def _replace(f: h5py.File, key: str, values: object, **options: object) -> None:
    attrs = {k: v for k, v in f[key].attrs.items() if not isinstance(v, h5py.Reference)}
    del f[key]
    d = f.create_dataset(key, data=values, **options)
    for k, v in attrs.items():
        d.attrs[k] = v


def set_value(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Put a special number somewhere in indptr, indices or data."""
    key = _pick(rng, _parts(f, seed))
    values = f[key][()]
    if values.size == 0:
        return
    g, n = seed.counts.shape[1], seed.counts.shape[0]
    at = int(rng.integers(values.size))
    special = _pick(rng, [*SPECIAL, g, g - 1, n, n - 1, len(values.ravel()), np.nan, np.inf, 0.5, -0.0, 3e30])
    with np.errstate(all="ignore"):
        try:
            values.reshape(-1)[at] = special
        except (OverflowError, ValueError):
            values.reshape(-1)[at] = 99
    f[key][...] = values


def add_noise(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Change several neighbouring numbers a little."""
    key = _pick(rng, _parts(f, seed))
    values = f[key][()]
    flat = values.reshape(-1)
    if len(flat) < 2:
        return
    a = int(rng.integers(len(flat)))
    part = flat[a : a + int(rng.integers(1, 6))]
    part[...] = (part.astype(np.int64) + rng.integers(-2, 3, len(part))).astype(values.dtype)
    f[key][...] = values


def swap_values(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Exchange two numbers of one array."""
    key = _pick(rng, _parts(f, seed))
    values = f[key][()]
    flat = values.reshape(-1)
    if len(flat) > 1:
        a, b = rng.integers(len(flat), size=2)
        flat[[a, b]] = flat[[b, a]]
        f[key][...] = values


def repeat_index(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Make an index equal to the one before it: a duplicate, or a wrong row."""
    key = f"{seed.matrix}/indices"
    if key in f and len(f[key]) > 1:
        at = int(rng.integers(1, len(f[key])))
        f[key][at] = f[key][at - 1]


def change_dtype(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Store an array in another type."""
    key = _pick(rng, _parts(f, seed))
    values = f[key][()]
    dtype = _pick(rng, DTYPES)
    with np.errstate(all="ignore"):
        _replace(f, key, values.astype(str).astype("S4") if dtype == "S4" else values.astype(dtype))


def change_length(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Cut or lengthen an array."""
    key = _pick(rng, [*_parts(f, seed), *[k for k in _list(f)[0] if rng.random() < 0.3]])
    values = f[key][()]
    if np.ndim(values) == 0:
        return
    n = max(0, len(values) + int(_pick(rng, [-len(values), -5, -1, 1, 5, len(values)])))
    _replace(f, key, np.resize(values, (n, *np.shape(values)[1:])), dtype=f[key].dtype)


def change_rank(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Give an array another number of dimensions, or none, or no space at all."""
    key = _pick(rng, _list(f)[0])
    values = f[key][()]
    dtype = f[key].dtype
    choice = int(rng.integers(4))
    if choice == 0:
        _replace(f, key, np.reshape(values, (-1, 1)), dtype=dtype)
    elif choice == 1:
        _replace(f, key, np.reshape(values, -1)[0] if np.size(values) else 0)
    elif choice == 2:
        _replace(f, key, h5py.Empty("f4"))
    else:
        _replace(f, key, np.reshape(values, -1), dtype=dtype)


def exchange_parts(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Exchange two of indptr, indices and data."""
    keys = _parts(f, seed)
    if len(keys) == 3:
        a, b = rng.permutation(3)[:2]
        f.move(keys[a], "tmp")
        f.move(keys[b], keys[a])
        f.move("tmp", keys[b])


def delete_node(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Remove any array or group."""
    arrays, groups = _list(f)
    del f[_pick(rng, arrays + groups)]


def change_kind(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Put a group where an array was, or an array where a group was."""
    arrays, groups = _list(f)
    key = _pick(rng, arrays + groups)
    was_group = isinstance(f[key], h5py.Group)
    del f[key]
    if was_group:
        f[key] = np.arange(3)
    else:
        f.create_group(key)


def change_attribute(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Change, retype or remove an attribute anywhere."""
    arrays, groups = _list(f)
    found = [(k, a) for k in ["/", *arrays, *groups] for a in f[k].attrs]
    if not found:
        return
    key, name = _pick(rng, found)
    attrs = f[key].attrs
    n, g = seed.counts.shape
    choices = {
        "shape": [
            (n, g + 1),
            (n + 1, g),
            (g, n),
            (n,),
            (n, g, 1),
            (0, 0),
            (-n, g),
            (n, 2**40),
            (2**62, g),
            5,
            "x",
            (n + 0.5, g),
        ],
        "encoding-type": [
            "csr_matrix",
            "csc_matrix",
            "array",
            "dataframe",
            "",
            "x" * 3000,
            b"\xff\xfe",
            7,
            "categorical",
        ],
        "_index": ["_index", "index", "nope", "", "batch", b"\xff", 3, "../var/_index", "/"],
        "column-order": [["nope"], "x", 3, ["batch", "batch"], np.zeros((2, 2))],
    }
    key_of = {"h5sparse_shape": "shape", "h5sparse_format": "encoding-type"}
    options = choices.get(key_of.get(name, name), ["x", 0, np.arange(3)])
    if rng.random() < 0.2:
        del attrs[name]
    else:
        attrs[name] = _pick(rng, options)


def change_names(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Damage the names of genes or cells: repeated, empty, numbers, not UTF-8."""
    keys = [
        k for k in (f"{seed.var}/_index", f"{seed.obs}/_index", f"{seed.var}/name", f"{seed.var}/gene_names") if k in f
    ]
    if not keys:
        return
    key = _pick(rng, keys)
    n = len(f[key])
    choice = int(rng.integers(5))
    if choice == 0:
        _replace(f, key, np.array(["same"] * n, object), dtype=TEXT)
    elif choice == 1:
        _replace(f, key, np.arange(n))
    elif choice == 2:
        _replace(f, key, np.array([b"\xff\xfe%d" % i for i in range(n)]))
    elif choice == 3:
        _replace(f, key, np.array([""] * n, object), dtype=TEXT)
    else:
        _replace(f, key, np.linspace(0, 1, n))


def change_codes(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Damage the categorical column."""
    key = f"{seed.obs}/batch"
    if f"{key}/codes" not in f:
        return
    choice = int(rng.integers(4))
    codes = f[f"{key}/codes"]
    if choice == 0:
        codes[int(rng.integers(len(codes)))] = _pick(rng, [-1, -2, 3, 100, 127, -128])
    elif choice == 1:
        _replace(f, f"{key}/codes", codes[()].astype(_pick(rng, ["f8", "u1", "i8", "?"])))
    elif choice == 2:
        _replace(f, f"{key}/categories", np.array([1.5, np.nan, 2.5]))
    else:
        _replace(f, f"{key}/categories", np.array(["a", "a", "b"], object), dtype=TEXT)


def never_write(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Declare an array of the matrix and leave (part of) it unwritten."""
    key = _pick(rng, _parts(f, seed))
    values = f[key][()]
    attrs = dict(f[key].attrs)
    del f[key]
    chunks = tuple(max(1, s // 3) for s in values.shape) if rng.random() < 0.6 and values.size else None
    d = f.create_dataset(key, values.shape, values.dtype, chunks=chunks)
    d.attrs.update(attrs)
    if chunks and rng.random() < 0.5:
        d[: chunks[0]] = values[: chunks[0]]


def damage_chunk(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Replace a stored chunk by junk, by another one, by one of a wrong size, or switch its filters off."""
    keys = [k for k in _parts(f, seed) if f[k].chunks and f[k].id.get_num_chunks()]
    if not keys:
        return
    d = f[_pick(rng, keys)].id
    count = d.get_num_chunks()
    at = d.get_chunk_info(int(rng.integers(count))).chunk_offset
    other = d.get_chunk_info(int(rng.integers(count))).chunk_offset
    mask, raw = d.read_direct_chunk(at)
    choice = int(rng.integers(5))
    if choice == 0:
        raw = rng.bytes(len(raw))
    elif choice == 1:
        mask, raw = d.read_direct_chunk(other)
    elif choice == 2:
        raw = raw[: int(rng.integers(len(raw)))]
    elif choice == 3:
        mask = int(rng.integers(8))
    else:
        raw = zlib.compress(bytes(int(rng.integers(1, 1 << 16))), 9)
    d.write_direct_chunk(at, raw, mask)


def link_away(f: h5py.File, seed: Seed, rng: np.random.Generator) -> None:
    """Replace a node by a link: to itself, to a sibling, to nowhere, to another file."""
    arrays, groups = _list(f)
    key = _pick(rng, arrays + groups)
    target = _pick(rng, ["/" + key, "/nowhere", "/" + _pick(rng, arrays), "/", ".", ""])
    del f[key]
    f[key] = h5py.ExternalLink(f.filename, target or "/") if rng.random() < 0.3 else h5py.SoftLink(target or "/")


STRUCTURAL: list[Mutation] = [
    set_value, set_value, set_value, add_noise, swap_values, repeat_index, change_dtype, change_length, change_rank,
    exchange_parts, delete_node, change_kind, change_attribute, change_attribute, change_names, change_codes,
    never_write, damage_chunk, damage_chunk, link_away,
]  # fmt: skip


def change_bytes(path: Path, rng: np.random.Generator) -> str:
    """Damage the file itself: flip bits, overwrite, cut, lengthen."""
    raw = bytearray(path.read_bytes())
    choice = int(rng.integers(6))
    if choice == 0:
        for _ in range(int(rng.integers(1, 9))):
            at = int(rng.integers(len(raw)))
            raw[at] ^= 1 << int(rng.integers(8))
    elif choice == 1:  # metadata is mostly at the front
        at = int(rng.integers(min(len(raw), 4096)))
        raw[at] = int(_pick(rng, [0, 1, 0x7F, 0x80, 0xFF]))
    elif choice == 2:
        a = int(rng.integers(len(raw)))
        n = int(rng.integers(1, 64))
        raw[a : a + n] = rng.bytes(len(raw[a : a + n]))
    elif choice == 3:
        del raw[int(rng.integers(len(raw))) :]
    elif choice == 4:
        a = int(rng.integers(len(raw)))
        raw[a : a + 512] = bytes(len(raw[a : a + 512]))
    else:
        a, b = (int(v) for v in rng.integers(len(raw), size=2))
        n = min(64, len(raw) - max(a, b))
        raw[a : a + n], raw[b : b + n] = raw[b : b + n], raw[a : a + n]
    path.write_bytes(bytes(raw))
    return f"change_bytes[{choice}]"


def mutate(seed: Seed, rng: np.random.Generator) -> list[str]:
    """Apply one to three mutations to a seed's file; return their names."""
    if seed.kind == "10x-folder":
        return mutate_folder(seed.path, rng)
    if rng.random() < 0.3:
        return [change_bytes(seed.path, rng)]
    return _change(seed, rng, STRUCTURAL)


def make_zarr(seed: Seed, rng: np.random.Generator, *, whole: bool) -> tuple[Seed, list[str]]:
    """Make a zarr store of a seed's file; unless ``whole``, what is in it is damaged before, or its files after."""
    inside = not whole and rng.random() < 0.4
    done = _change(seed, rng, [m for m in STRUCTURAL if m not in (never_write, damage_chunk, link_away)] * inside)
    path = seed.path.with_suffix(".zarr")
    copy_to_zarr(seed.path, path, rng)
    for _ in range(0 if whole or inside else int(rng.choice([1, 1, 2]))):
        change = _pick(rng, zarrs.MUTATIONS)
        try:
            change(path, rng)
            done.append(change.__name__)
        except (KeyError, ValueError, TypeError, OSError, IndexError):
            done.append(f"({change.__name__})")
    return replace(seed, path=path), done


def _change(seed: Seed, rng: np.random.Generator, changes: list[Mutation]) -> list[str]:
    done: list[str] = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3])) if changes else 0):
        change = _pick(rng, changes)
        try:
            with h5py.File(seed.path, "a") as f:
                change(f, seed, rng)
            done.append(change.__name__)
        except (KeyError, ValueError, TypeError, OSError, RuntimeError, OverflowError, AttributeError, IndexError):
            done.append(f"({change.__name__})")  # does not apply after an earlier one
    return done
