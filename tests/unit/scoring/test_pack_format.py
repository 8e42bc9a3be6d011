"""A truth pack that is cut, altered or added to is refused: no bit of it may change a score in silence."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.errors import DataError, UsageError
from vcelltools.scoring.pack_format import read_packfile, write_packfile


@pytest.fixture
def pack(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"mean": rng.random((5, 40)), "n": rng.integers(0, 200, 60).astype(np.uint8), "none": np.zeros((0, 3))}
    return write_packfile(tmp_path / "x.pack", b"testpack", {"a": 1}, [({"label": "x"}, arrays)])


def read(path):
    return read_packfile(path, b"testpack", {"a": 1}, lambda head, arrays: (head, arrays))


def test_every_altered_byte_is_noticed(pack):
    raw = pack.read_bytes()
    ((_, want),) = read(pack)
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        pack.write_bytes(bytes(damaged))
        try:
            ((_, got),) = read(pack)
        except (DataError, UsageError):
            continue
        # bits of the frame's header that mean nothing for these bytes (the window's size, say)
        assert at < 40, at
        assert all((got[k] == want[k]).all() for k in want), at


def test_every_other_length_is_refused(pack):
    raw = pack.read_bytes()
    for cut in (0, 5, 8, 15, 16, 20, len(raw) // 2, len(raw) - 5, len(raw) - 1):
        pack.write_bytes(raw[:cut])
        with pytest.raises(DataError, match="truth pack"):
            read(pack)
    pack.write_bytes(raw + b"\0")
    with pytest.raises(DataError, match=rf"it has {len(raw) + 1:,} of {len(raw):,} bytes"):
        read(pack)


def test_a_pack_of_an_earlier_version_is_refused(pack):
    pack.write_bytes(b"oldpack1" + pack.read_bytes()[8:])
    with pytest.raises(DataError, match="not a truth pack of these rules and this version"):
        read(pack)
