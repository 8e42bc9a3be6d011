"""Tables as Arrow columns: damage is an error, wherever it is."""

from __future__ import annotations

import pytest

from vcelltools.errors import DataError
from vcelltools.io.frame import read_frame, write_frame


def test_a_feather_table_comes_back_and_damage_is_an_error(tmp_path):
    columns = {"name": [f"gene {i}" for i in range(60)], "value": [i / 7 for i in range(60)]}
    path = write_frame(tmp_path / "t.feather", columns)
    assert read_frame(path, what="a table").to_pydict() == columns
    raw, refused = path.read_bytes(), 0
    for at in range(0, len(raw), 8):
        path.write_bytes(raw[:at] + bytes(16) + raw[at + 16 :])
        try:
            read_frame(path, what="a table").to_pydict()  # other values cannot be told from the true ones
        except DataError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("length", [0, 1, 6, 40])
def test_a_short_feather_table_is_refused(tmp_path, length):
    path = write_frame(tmp_path / "t.feather", {"a": [1, 2]})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_frame(path, what="a table")
