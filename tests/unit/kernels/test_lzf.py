"""The LZF kernel and the Fletcher checksum against h5py's filters, and on damaged chunks."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.errors import DataError
from vcelltools.io.hdf5.arrays import Hdf5Array
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.write.sink import Codec, Sink, Space
from vcelltools.kernels.lzf import lzf_pack, lzf_unpack


def pack(tmp_path, values: np.ndarray) -> np.ndarray | None:
    """Return ``values`` packed by h5py, or None where it kept them as they are."""
    with h5py.File(tmp_path / "f.h5", "w") as f:
        d = f.create_dataset("x", data=values, chunks=values.shape, compression="lzf")
        mask, raw = d.id.read_direct_chunk((0,))
    return None if mask else np.frombuffer(raw, np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_what_h5py_packs_is_unpacked(tmp_path, seed):
    rng = np.random.default_rng(seed)
    cases = [rng.poisson(0.5, 20_000).astype("f4"), np.zeros(50_000), rng.integers(0, 9, 777), np.arange(3000) % 7]
    for values in cases:
        packed = pack(tmp_path, values)
        assert packed is not None
        out = np.empty(values.nbytes, np.uint8)
        assert lzf_unpack(packed, out) == values.nbytes
        np.testing.assert_array_equal(out.view(values.dtype), values)


@settings(max_examples=200, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.lists(st.sampled_from([b"ab", b"a", b"\0" * 300, b"xyz" * 99, bytes(range(256)) * 40]), max_size=12).map(
            b"".join
        ),
    )
)
def test_what_is_packed_is_unpacked_and_has_one_form(data):
    values = np.frombuffer(data, np.uint8)
    out = np.empty(len(values) + len(values) // 32 + 1, np.uint8)
    n = lzf_pack(values, out)
    assert 0 <= n <= len(out)
    back = np.empty_like(values)
    assert lzf_unpack(out[:n], back) == len(values) and back.tobytes() == data
    tight = np.full(n + 8, 77, np.uint8)
    assert lzf_pack(values, tight[:n]) == n and tight[:n].tobytes() == out[:n].tobytes()
    if n:
        assert lzf_pack(values, tight[: n - 1]) == -1
    assert (tight[n:] == 77).all()


def test_h5py_reads_what_is_packed_and_no_run_differs(tmp_path):
    """The filter of h5py packs with a table that holds what the memory held before; ours starts with an empty one."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, 9_000).astype("u1")
    cases = [rng.poisson(0.5, 20_000).astype("f4"), np.zeros(50_000), noise, np.arange(3)]
    for k, values in enumerate(cases):
        forms = set()
        for again in range(3):
            path = tmp_path / f"{k}{again}.h5"
            codec = Codec("lzf", None, 2)
            with h5py.File(path, "w") as f:
                sink = Sink(f, "x", dtype=values.dtype, codec=codec, space=Space(path, path), chunk=(4096,))
                sink.write(values)
                sink.finish()
                np.testing.assert_array_equal(f["x"][:], values)
                n = f["x"].id.get_num_chunks()
                forms.add(b"".join(f["x"].id.read_direct_chunk((i * 4096,))[1] for i in range(n)))
                assert len(b"".join(forms)) <= -(-len(values) // 4096) * 4096 * values.itemsize
            codec.close()
        assert len(forms) == 1


def test_damaged_streams_never_leave_the_buffers(tmp_path):
    packed = pack(tmp_path, np.random.default_rng(0).poisson(1.0, 2_000).astype("i4"))
    rng = np.random.default_rng(1)
    out = np.empty(8_000 + 64, np.uint8)
    for _ in range(300):
        bad = packed.copy()
        bad[rng.integers(len(bad), size=3)] = rng.integers(256, size=3)
        out[8_000:] = 77
        n = lzf_unpack(bad[: int(rng.integers(1, len(bad) + 1))], out[:8_000])
        assert -1 <= n <= 8_000
        assert (out[8_000:] == 77).all()


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}])
@pytest.mark.parametrize("dtype", ["u1", "i4", "f8"])
def test_fletcher32_chunks_are_read_and_checked(tmp_path, dtype, options):
    x = np.random.default_rng(0).integers(0, 200, 1000).astype(dtype)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:
        dset = f.create_dataset("a", data=x, chunks=(101,), fletcher32=True, **options)
        at = dset.id.get_chunk_info(3).byte_offset
    source = FileBytes(path)
    with h5py.File(path) as f:
        np.testing.assert_array_equal(Hdf5Array(f, f["a"], source).read(0, 1000, x.dtype, None), x)
    with open(path, "r+b") as raw:
        raw.seek(at + 5)
        byte = raw.read(1)
        raw.seek(at + 5)
        raw.write(bytes([byte[0] ^ 8]))
    with h5py.File(path) as f, pytest.raises(DataError, match="checksum"):
        Hdf5Array(f, f["a"], source).read(0, 1000, x.dtype, None)
    source.close()
