"""The report in a real browser: it draws, sorts, filters and switches, and hostile labels stay text."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from vcelltools.scoring.cell_eval import rules as cell_eval_rules
from vcelltools.scoring.gaming import Check
from vcelltools.scoring.report.data import WORDS, make_report_data, write_report
from vcelltools.scoring.report.report import (
    Panel,
    ReportComponent,
    ReportData,
    _get_panel,
    format_number,
    get_verdict,
    make_html,
)
from vcelltools.scoring.vcc2026.metrics import METRICS

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


def test_closest_to_their_own_truth_is_by_the_distance_of_the_metric():
    """An effect predicted three times too large, where another true one is: nearest by cosine, and not by L1."""
    rng = np.random.default_rng(3)
    labels = np.repeat(["non-targeting", *"ABCDEF"], 20)
    base, effect = rng.uniform(3, 5, 40), rng.normal(0, 0.6, (7, 40))
    effect[0], effect[2] = 0, 3 * effect[1] + rng.normal(0, 0.2, 40)
    x = {}
    for name, size in (("real", 1.0), ("pred", np.array([0, 3, 1, 1, 1, 1, 1])[:, None])):
        mean = np.repeat(np.maximum(base + size * effect, 0), 20, axis=0)
        cells = np.maximum(mean + rng.normal(0, 0.05, mean.shape), 0)
        x[name] = ad.AnnData(cells, obs=pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(140)]))
    result = vc.score(x["pred"], x["real"], profile="vcc")
    data = make_report_data(result)
    heat = _get_panel(data.panels[0], 0, 1)["heat"]
    assert heat["own_is_nearest"] == sum(v == 1 for v in result.table.columns["discrimination_score_l1"]) == 5
    assert heat["distance"] == "L1 distance"
    assert "by L1 distance" in make_html(data)


def test_every_metric_has_a_title_and_a_sentence():
    for name in {*cell_eval_rules.METRICS, *cell_eval_rules.COUNT_COLUMNS, *METRICS} - {"de_nsig_counts"}:
        title, says = WORDS[name]
        assert title and says.endswith((".", "?")), name


def make_verdict(*scores: float) -> str:
    data = make_data(score=float(np.mean(np.maximum(scores, 0))))
    (first,) = data.components
    parts = [
        replace(first, name=f"m{i}", title=f"Metric {i}", score=max(s, 0.0), score_unclipped=s)
        for i, s in enumerate(scores)
    ]
    return get_verdict(replace(data, components=parts, checks=[]))["text"]


def test_the_headline_praises_no_metric_below_the_baseline():
    assert make_verdict(-0.5, -3.0).endswith("No metric is better than the baseline.")
    assert "Strongest: metric 0 (0.40). Weakest: metric 1 (worse than the mean response)." in make_verdict(0.4, -3.0)
    assert "Strongest: metric 1 (0.60). Weakest: metric 0 (0.40)." in make_verdict(0.4, 0.6)


def test_infinite_fold_changes_are_drawn_on_the_frame_and_counted():
    data = make_data()
    (panel,) = data.panels
    real, padj = panel.real_lfc_ph.copy(), panel.real_padj_ph.copy()
    real[:, 0], real[:, 1], padj[:, :2] = np.inf, -np.inf, 1e-9
    shown = _get_panel(replace(panel, real_lfc_ph=real, real_padj_ph=padj), 0, 1)
    for plot in shown["scatter"]:
        assert plot["infinite"] == 2
        assert {x for x, _, sig in plot["points"] if sig} >= {2.0, 98.0}  # both edges
    assert all(s["i"] == 2 and s["j"] == 0 for s in shown["volcano"]["sets"])
    assert "2 infinite" in make_html(replace(data, panels=[replace(panel, real_lfc_ph=real, real_padj_ph=padj)]))


def test_large_numbers_stay_short():
    assert [format_number(v) for v in (0, 12.3456, 1234.5, -99_999, 1.23e5, -4.5e12, 1e-5)] == [
        "0", "12.3", "1,234", "−99,999", "1.2e+05", "−4.5e+12", "1e-05",
    ]  # fmt: skip


def test_a_single_perturbation_and_an_undefined_metric_are_called_that():
    rng = np.random.default_rng(0)
    labels = ["non-targeting"] * 20 + ["A"] * 20
    x, y = (np.log1p(rng.poisson(3.0, (40, 30))) * 1.1 for _ in range(2))
    obs = pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(40)])
    x[:20] = y[:20]
    result = vc.score(ad.AnnData(x, obs), ad.AnnData(y, obs), profile="minimal")
    assert result.avg_score is None
    assert result.problem == "No average: a single perturbation cannot be told from others."
    assert "a single perturbation cannot be told" in make_html(make_report_data(result))
    said = " ".join(result.warnings)
    assert "there is only one perturbation, so a discrimination score of 1 has no meaning" in said
    assert "overlap_at_N: it is undefined for every perturbation" in said


def test_a_metric_that_is_undefined_everywhere_gives_no_average():
    rng = np.random.default_rng(1)
    labels = ["non-targeting"] * 30 + ["A"] * 8 + ["B"] * 8  # too few cells for any gene to be significant
    x, y = (np.log1p(rng.poisson(3.0, (46, 30))) * 1.1 for _ in range(2))
    obs = pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(46)])
    x[:30] = y[:30]
    pair = ad.AnnData(x, obs), ad.AnnData(y, obs)
    result = vc.score(*pair)
    assert result.components["mae"].score is not None
    assert result.avg_score is None
    assert "overlap_at_N is undefined" in result.problem
    assert vc.score(*pair, skip=["overlap_at_N"]).avg_score is not None
    assert vc.score(*pair, compat="cell-eval").avg_score is not None


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
    [(-1.0, "Worse than the baseline"), (0.0, "No better"), (0.1, "A weak signal"), (0.4, "A clear signal"),
     (0.8, "A strong signal"), (1.2, "At the ceiling"), (float("nan"), "No score")],
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
    import vcelltools as vc
    from tests.oracle.vcc2026_pairs import PAIRS, make_pair

    truth, pred = make_pair(**PAIRS["anchored"])
    return vc.score(pred, truth, compat="vcc2026")


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
    from vcelltools.scoring.report.data import make_report_data

    truth, pred = make_pair(**PAIRS[name])
    truth.write_h5ad(tmp_path / "t.h5ad")
    pred.write_h5ad(tmp_path / "p.h5ad")
    result = vc.score(tmp_path / "p.h5ad", tmp_path / "t.h5ad", ceiling=True)
    X = pred.X.toarray()
    logged = np.log1p(X / X.sum(1, keepdims=True) * np.median(X.sum(1)))
    labels = pred.obs["target_gene"].to_numpy().astype(str)
    want = [logged[labels == p].var(axis=0).sum() for p in result.pair.names]
    np.testing.assert_allclose(result.pred.spread_k[result.pred.perts], want, rtol=1e-6, atol=1e-9)
    data = make_report_data(result)
    flags = {c.name for c in data.checks if c.flagged}
    assert ("collapsed to the mean" in flags) == (name == "flat")
    page = make_html(data)
    assert "a perfect prediction" in page
    assert "half of the true cells reach" in page
    assert result.to_json()["gaming"]
    in_memory = vc.score(pred, truth)
    assert {c.name for c in make_report_data(in_memory, prediction="p", truth="t").checks} >= {"effect size"}


def test_odd_characters_of_names_are_shown_by_their_escapes():
    page = make_html(replace(make_data(), problem="\x1b]0;owned\x07 <i>", prediction="a\u202eb\x1b[31m.h5ad"))
    assert "\x1b" not in page and "\u202e" not in page and "\x07" not in page
    assert r"a\u202eb\x1b[31m.h5ad" in page
