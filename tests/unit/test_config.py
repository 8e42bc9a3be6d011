"""``vcelltools.toml``: strict, with kind errors; presets."""

from __future__ import annotations

import pytest

from vcelltools.config import Config, DatasetConfig, Guides, load_config, parse_config
from vcelltools.errors import DataError, UsageError
from vcelltools.presets import PRESETS, get_preset, resolve_preset

FULL = """
[basis]
top = 500
path = "basis.txt"
[[datasets]]
name = "kolf"
path = "KOLF_Pan_Genome_Aggregate.h5mu"
modality = "rna"
layer = "X"
pert_col = "feature_call"
control = ["Non-Targeting"]
group_by = ["batch"]
cell_line = "KOLF2.1J"
gene_id_col = "gene_ids"
gene_name_col = "index"
guides = { sep = "|", n_col = "num_features", policy = "single" }
[store]
path = "stores"
[train]
out = "runs/rn"
model = "transformer"
[score]
truth = "adata_Validation.h5ad"
"""


def test_the_documented_file():
    c = parse_config(FULL, where="t")
    d = c.get_dataset("kolf")
    assert d.controls == ("Non-Targeting",) and d.guides == Guides(n_col="num_features")
    assert c.basis.top == 500 and c.train == {"out": "runs/rn", "model": "transformer"}
    assert c.score.truth == "adata_Validation.h5ad"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[datasets]]\nname = 'a'\npertcol = 'x'",
            r"t: \[datasets\[0?.*\]\] unknown key 'pertcol' \(did you mean 'pert_col'\?\)",
        ),
        ("[basis]\ntopp = 3", r"\[basis\] unknown key 'topp' \(did you mean 'top'\?\)"),
        ("[stores]\npath = 'x'", r"unknown key 'stores' \(did you mean 'store'\?\)"),
        ("[[datasets]]\nname = 'a'\nguides = { separator = '|' }", r"unknown key 'separator' \(did you mean 'sep'\?\)"),
        ("[store]\nzzz = 1", r"unknown key 'zzz' \(valid keys: path, target_sum, seed\)"),
        ("[[datasets]]\npath = 'a'", r"'name' is missing"),
        (
            "[[datasets]]\nname = 'a'\nguides = { policy = 'both' }",
            r"policy 'both' is not known \(one of: single, combination, first\)",
        ),
        ("[[datasets]]\nname = 'a'\ncontrol_is_missing = 1", r"control_is_missing.*expected `bool`"),
        ("[basis]\ntop = 0", r"basis.top: .*>= 1"),
        ("[basis]\ntop = '5'", r"basis.top: .*expected `int`"),
        ("[[datasets]]\nname = 'a/b'", r"name"),
        ("[[datasets]]\nname = 'a'\nguides = { policy = 'both' }", r"policy.*both"),
        ("[[datasets]]\nname = 'a'\n[[datasets]]\nname = 'a'", r"two data sets are named 'a'"),
        ("[basis", r"not valid TOML"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(DataError, match=message):
        parse_config(text, where="t")


def test_no_file_is_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config()[0] == Config()
    with pytest.raises(DataError, match="no such file"):
        load_config("x.toml")
    with pytest.raises(UsageError, match="did you mean 'kolf'"):
        parse_config(FULL, where="t").get_dataset("kolff")


def test_presets_fill_what_is_not_given():
    d = resolve_preset(DatasetConfig(name="k", preset="replogle-rpe1", cell_line="mine", group_by=["lane"]))
    assert (d.pert_col, d.controls, d.cell_line, d.group_by) == ("gene", ("non-targeting",), "mine", ["lane"])
    t = resolve_preset(DatasetConfig(name="t", preset="tahoe-100m", cell_line="A549"))
    assert t.cell_line == "A549" and t.cell_line_col is None
    with pytest.raises(UsageError, match="did you mean 'kolf'"):
        get_preset("klf")
    for name, p in PRESETS.items():
        assert p.checked, name
        assert resolve_preset(DatasetConfig(name="x", preset=name)).pert_col == p.values["pert_col"]
        assert p.source and p.title


@pytest.mark.parametrize(
    "text", ["[basis\n", "[basis]\ntop = '5'", "[[datasets]]\npath = 'a'", 2 * "[[datasets]]\nname = 'a'\n"]
)
def test_every_error_names_a_remedy(text):
    with pytest.raises(DataError) as e:
        parse_config(text, where="t")
    assert e.value.hint
