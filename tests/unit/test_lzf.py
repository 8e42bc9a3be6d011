"""The LZF kernel against h5py's filter, and on damaged streams."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from vcelltools.kernels.lzf import lzf_unpack


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
