"""``prep`` and ``lint`` end to end."""

from __future__ import annotations

import json

from tests.unit.challenge.test_vcc_container import GENES, build, make


def test_prep_then_lint(cli, tmp_path):
    (tmp_path / "genes.csv").write_text("\n".join(GENES))
    make(tmp_path / "pred.h5ad")
    out = tmp_path / "sub.vcc"
    done = cli("prep", tmp_path / "pred.h5ad", "--genes", tmp_path / "genes.csv", "--out", out, "--json")
    assert done.code == 0, done.stderr
    assert done.json["n_cells"] == 8
    assert out.exists()
    again = cli("prep", tmp_path / "pred.h5ad", "--genes", tmp_path / "genes.csv", "--out", out)
    assert again.code == 2
    assert "--force" in again.stderr
    good = cli("lint", out, "--genes", tmp_path / "genes.csv", "--json")
    assert good.code == 0
    assert good.json["ok"] is True
    lost = cli("lint", out, "--genes", tmp_path / "gene.csv")
    assert lost.code == 3 and lost.stderr.startswith(f"error: {tmp_path}/gene.csv: no such file"), "not the container's"
    foreign = cli("lint", out, "--contexts", "A")
    assert foreign.code == 0 and "--contexts belong to the 2026 rules, which are not checked" in foreign.stderr
    bad = build(tmp_path / "bad.vcc", ("watermark.txt", b"vcc-prep"))
    refused = cli("lint", bad, "--json")
    assert refused.code == 3
    assert refused.json["ok"] is False
    assert "missing" in json.dumps(refused.json["problems"])


def test_prep_refuses_with_code_3(cli, tmp_path):
    (tmp_path / "genes.csv").write_text("\n".join([*GENES, "more"]))
    make(tmp_path / "pred.h5ad")
    done = cli("prep", tmp_path / "pred.h5ad", "--genes", tmp_path / "genes.csv", "--out", tmp_path / "x.vcc")
    assert done.code == 3
    assert "more" in done.stderr
    assert not (tmp_path / "x.vcc").exists()
