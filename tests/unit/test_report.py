"""The report in a real browser: it draws, sorts, filters and switches, and hostile labels stay text."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vcelltools.scoring.gaming import Check
from vcelltools.scoring.report import Panel, ReportComponent, ReportData, make_html, write_report

HOSTILE = [
    '"><img src=x onerror="document.title=1">',
    "</script><script>document.title='owned'</script>",
    "{{ 7*7 }}",
    "'&<b>",
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-sync",
    "--virtual-time-budget=4000",
]


def make_data(n: int = 6, n_genes: int = 200, score: float = 0.42) -> ReportData:
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (n, n_genes))
    pred = 0.7 * real + rng.normal(0, 0.4, real.shape)
    labels = np.array([*HOSTILE, *[f"GENE{i}" for i in range(n)]][:n], dtype=object)
    genes = np.array([HOSTILE[1], *[f"G{i}" for i in range(1, n_genes)]], dtype=object)
    norm = np.linalg.norm(pred, axis=1)[:, None] * np.linalg.norm(real, axis=1)[None]
    values = rng.random((n, 2))
    values[1, 0] = np.nan
    panel = Panel(
        context="", labels=labels, genes=genes, columns=["Discrimination", HOSTILE[0]], values_pm=values,
        real_lfc_ph=real, pred_lfc_ph=pred, real_padj_ph=0.5 * 10.0 ** -(real**2),
        pred_padj_ph=0.5 * 10.0 ** -(pred**2),
        distance_pp=1 - pred @ real.T / norm, quality_p=values[:, 1],
    )  # fmt: skip
    component = ReportComponent(
        name="pds_cosine", title="Discrimination", says="Says.", value=0.7, baseline=0.5, ceiling=0.95, score=score,
        score_unclipped=score, ci95=(0.6, 0.8), n=n, lower_is_better=False,
    )  # fmt: skip
    check = Check(name="effect size", value=5.0, low=0.5, high=2.0, flagged=True, text=f"Five times. {HOSTILE[0]}")
    return ReportData(
        prediction=HOSTILE[0], truth=HOSTILE[1], rules="2026", zero="the mean response", one="a replicate",
        avg_score=score, components=[component], panels=[panel], checks=[check], warnings=[HOSTILE[1]],
        facts=[("Genes", str(n_genes))],
    )  # fmt: skip


def test_page_is_one_file_without_network():
    page = make_html(make_data())
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", page))
    assert addresses <= {"http://www.w3.org"}
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|iframe|object|embed)\b", page)
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "Worse than" not in page


@pytest.mark.parametrize(
    ("score", "says"),
    [(-1.0, "Worse than the baseline"), (0.0, "No better"), (0.1, "A first signal"), (0.4, "A real signal"),
     (0.8, "Most of the way"), (1.2, "At the ceiling"), (float("nan"), "No score")],
)  # fmt: skip
def test_verdict_follows_the_score(score, says):
    data = replace(make_data(score=score), problem="the replicate is no better")
    page = make_html(data)
    assert says in page
    assert ("the replicate is no better" in page) == bool(np.isnan(score))


def test_report_is_written_atomically_and_not_over_another(tmp_path):
    from vcelltools.errors import UsageError

    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(UsageError):
        write_report(score_small(), tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "mine"
    write_report(score_small(), tmp_path / "r.html", force=True, prediction="p.h5ad", truth="t.h5ad")
    assert "p.h5ad" in (tmp_path / "r.html").read_text()


def score_small():
    from tests.oracle.vcc2026_pairs import PAIRS, make_pair
    from vcelltools.scoring.vcc2026 import score_vcc2026

    truth, pred = make_pair(**PAIRS["anchored"])
    return score_vcc2026(pred, truth)


def get_browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    pytest.skip("no Chromium here (apt-get install chromium)")


def browse(page: str, folder: Path, *extra: str) -> str:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [get_browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *extra, f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


DRIVER = """
<script>
const $ = s => document.querySelector(s), out = {};
const column = i => [...document.querySelectorAll("tbody tr")].map(r => r.cells[i].dataset.v);
out.ready = document.documentElement.dataset.ready; out.title = document.title;
const heads = document.querySelectorAll("thead button");
heads[1].click(); out.down = column(1); heads[1].click(); out.up = column(1); heads[0].click();
out.names = [...document.querySelectorAll("tbody tr")].map(r => r.cells[0].textContent);
const find = $("input[type=search]"); find.value = "gene1"; find.dispatchEvent(new Event("input"));
out.found = [...document.querySelectorAll("tbody tr")].filter(r => !r.hidden).map(r => r.cells[0].textContent);
out.options = [...$("select").options].map(o => o.textContent);
out.dots = document.querySelectorAll("svg[id$=volcano] circle").length;
const first = $("svg[id$=volcano]").innerHTML;
$("select").value = "2"; $("select").dispatchEvent(new Event("change"));
out.changed = $("svg[id$=volcano]").innerHTML !== first;
const second = $("svg[id$=volcano]").innerHTML;
$("[id$=-pred]").click(); out.switched = $("svg[id$=volcano]").innerHTML !== second;
const img = $("img[id$=heat]"), b = img.getBoundingClientRect();
img.dispatchEvent(new PointerEvent("pointermove", {clientX: b.left + 2, clientY: b.bottom - 2}));
const go = document.querySelectorAll(".go")[3];
go.click();
out.gone = [$("[id$=-title]"), $("select").selectedOptions[0]].every(e => e.textContent === go.textContent);
out.cell = $("[id$=-cell]").textContent; out.heat = img.naturalWidth;
out.images = document.querySelectorAll("img").length;
out.wide = document.documentElement.scrollWidth - innerWidth;
const pre = document.createElement("pre"); pre.id = "out";
pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(out))));
document.body.append(pre);
</script></body>"""


@pytest.mark.parametrize("width", [1200, 500])
def test_page_works_in_a_browser(tmp_path, width):
    data = make_data()
    page = make_html(data).replace("</body>", DRIVER)
    dom = browse(page, tmp_path, f"--window-size={width},1000", "--dump-dom")
    found = re.search(r'<pre id="out">([^<]+)</pre>', dom)
    assert found, dom[-1500:]
    out = json.loads(base64.b64decode(found.group(1)))
    assert out["ready"] == "yes"
    assert out["title"] == f"{HOSTILE[0]} – score"
    down = [float(v) for v in out["down"] if v]
    assert down == sorted(down, reverse=True)
    assert out["down"][-1] == out["up"][-1] == ""
    assert [float(v) for v in out["up"] if v] == down[::-1]
    assert set(out["names"]) == set(data.panels[0].labels)
    assert out["found"] == ["GENE1"]
    assert set(out["options"]) == set(data.panels[0].labels)
    assert out["dots"] > 100
    assert out["changed"]
    assert out["switched"]
    assert out["gone"]
    assert " × " in out["cell"]
    assert out["heat"] == 6
    assert out["images"] == 1
    assert out["wide"] <= 0


def test_page_makes_a_picture(tmp_path):
    shot = tmp_path / "shot.png"
    browse(make_html(make_data(40)), tmp_path, "--window-size=1000,1400", f"--screenshot={shot}")
    import matplotlib.image

    pixels = matplotlib.image.imread(shot)
    assert len(np.unique(np.round(pixels.reshape(-1, pixels.shape[-1])[::97, :3], 1), axis=0)) > 10


@pytest.mark.parametrize("name", ["plain", "flat"])
def test_report_of_the_other_rules(tmp_path, name):
    """The same page from a scoring by our rules, with the spread between cells measured on the files."""
    import vcelltools as vc
    from tests.oracle.vcc2026_pairs import PAIRS, make_pair
    from vcelltools.scoring.report_data import from_2025, measure_spread

    truth, pred = make_pair(**PAIRS[name])
    truth.write_h5ad(tmp_path / "t.h5ad")
    pred.write_h5ad(tmp_path / "p.h5ad")
    result = vc.score(tmp_path / "p.h5ad", tmp_path / "t.h5ad", ceiling=True)
    X = pred.X.toarray()
    logged = np.log1p(X / X.sum(1, keepdims=True) * np.median(X.sum(1)))
    labels = pred.obs["target_gene"].to_numpy().astype(str)
    want = [logged[labels == p].var(axis=0).sum() for p in result.pair.names]
    np.testing.assert_allclose(measure_spread(result.pred, "target_gene"), want, rtol=1e-6, atol=1e-9)
    data = from_2025(result)
    flags = {c.name for c in data.checks if c.flagged}
    assert ("collapsed to the mean" in flags) == (name == "flat")
    page = make_html(data)
    assert "a perfect prediction" in page
    assert "half of the true cells reach" in page
    assert result.to_json()["gaming"]
    in_memory = vc.score(pred, truth)
    assert {c.name for c in from_2025(in_memory, prediction="p", truth="t").checks} >= {"effect size"}
