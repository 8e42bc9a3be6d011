"""Write the HTML report: a single file that works offline.

:class:`ReportData` holds the content of the page as plain arrays and strings, and :func:`make_html` renders it. Labels
come from untrusted files: the template escapes all of them, and the content security policy of the page forbids it to
load or send anything.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.write.atomic import to_plain
from vcelltools.names import show
from vcelltools.scoring.gaming import Check
from vcelltools.version import __version__

if TYPE_CHECKING:
    from vcelltools.scoring.result import Calibration

MAX_POINTS = 60_000
"""Total number of points in volcano plots; a page of this size opens quickly on a phone."""
SCATTER_POINTS = 900
N_SCATTER = 3


@dataclass(frozen=True, kw_only=True)
class ReportComponent:
    """A metric of the score, with its explanation.

    ``replicate`` is the value that one half of the true cells reaches against the other, where the upper end of the
    scale is something else; ``calibration`` says what the metric is worth on this data.
    """

    name: str
    title: str
    says: str
    value: float
    baseline: float
    ceiling: float
    score: float
    score_unclipped: float
    ci95: tuple[float, float] | None
    n: int
    lower_is_better: bool
    replicate: float | None = None
    calibration: Calibration | None = None

    @property
    def weak(self) -> bool:
        """Whether the metric has too little range on this data to tell models apart."""
        return self.calibration is not None and not self.calibration.discriminates


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The data of the plots for one context: perturbations × genes, and perturbations × perturbations.

    Attributes
    ----------
    context
        Its name, or "" if there is only one.
    labels, genes
        (p,) perturbations and (h,) genes.
    columns, values_pm
        The table: metric names and (p, m) values, NaN if undefined.
    real_lfc_ph, pred_lfc_ph, real_padj_ph, pred_padj_ph
        (p, h) log2 fold changes and adjusted p, or None without differential expression.
    distance_pp
        (p, p) distance of each predicted effect (rows) to each true one, as in the discrimination score, or None.
    distance_name
        The name of the distance.
    quality_p
        (p,) values by which the perturbations are sorted from best to worst.
    """

    context: str
    labels: np.ndarray
    genes: np.ndarray
    columns: list[str]
    values_pm: np.ndarray
    real_lfc_ph: np.ndarray | None
    pred_lfc_ph: np.ndarray | None
    real_padj_ph: np.ndarray | None
    pred_padj_ph: np.ndarray | None
    distance_pp: np.ndarray | None
    quality_p: np.ndarray
    distance_name: str = "distance"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page.

    Attributes
    ----------
    prediction, truth
        The names of the files.
    rules
        The name of the rule set.
    zero, one
        Descriptions of the ends of the scale.
    avg_score
        The average score, or NaN.
    components, panels
        The metrics, and the plots of every context.
    checks
        The gaming panel.
    warnings
        Warnings, shown at the end; ``problem`` is shown beside the verdict.
    facts
        Pairs of labels and values for the footer.
    """

    prediction: str
    truth: str
    rules: str
    zero: str
    one: str
    avg_score: float
    components: list[ReportComponent]
    panels: list[Panel]
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problem: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)


def make_html(data: ReportData) -> str:
    """Return the page."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("vcelltools.scoring", "report"),
        autoescape=True,
        finalize=lambda v: show(v) if type(v) is str else v,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["num"] = format_number
    page = env.get_template("report.html.j2")
    return page.render(
        d=data,
        verdict=get_verdict(data),
        gauge=get_gauge(data),
        rows=[_get_row(c) for c in data.components],
        flagged=[c for c in data.checks if c.flagged],
        panels=[_get_panel(p, i, len(data.panels)) for i, p in enumerate(data.panels)],
        version=__version__,
    )


def format_number(value: Any, digits: int = 3) -> str:
    """Return a number with three significant digits and a true minus, or a dash."""
    if value is None or not np.isfinite(value):
        return "–"
    v = float(value)
    if v < 0:
        return f"−{format_number(-v, digits)}"
    if v == 0:
        return "0"
    if v >= 1000:
        return f"{v:,.0f}" if v < 1e5 else f"{v:.1e}"
    return f"{v:.{digits}g}" if v < 0.001 else f"{v:.{max(digits - 1 - int(np.floor(np.log10(v))), 0)}f}"


def get_verdict(data: ReportData) -> dict[str, str]:
    """Return the headline, its tone, and the sentence below it."""
    s = data.avg_score
    if not np.isfinite(s):
        return {"tone": "none", "head": "No score", "text": data.problem or "Some metrics are undefined."}
    steps = [
        (-np.inf, "bad", "Worse than the baseline", f"Predicting {data.zero} would have scored better."),
        (-0.02, "bad", "No better than the baseline", f"It is no more informative than {data.zero}."),
        (0.05, "weak", "A weak signal", f"It is a little better than {data.zero}."),
        (0.25, "fair", "A clear signal", f"It is well above {data.zero}, but still far from {data.one}."),
        (0.6, "good", "A strong signal", f"It is closer to {data.one} than to {data.zero}."),
        (0.95, "good", "At the ceiling", f"It is as good as {data.one}, or better."),
    ]
    _, tone, head, text = [step for step in steps if s >= step[0]][-1]
    text += _compare_metrics(data)
    n = sum(c.flagged for c in data.checks)
    if n:
        text += f" Read the {'flag' if n == 1 else f'{n} flags'} below first."
    return {"tone": tone, "head": head, "text": text}


def _compare_metrics(data: ReportData) -> str:
    """Return a sentence on the strongest and the weakest metric; a metric below the baseline is not a strength."""
    known = [c for c in data.components if np.isfinite(c.score) and not c.weak]
    if len(known) < 2:
        return ""
    raw = {c.name: c.score_unclipped if np.isfinite(c.score_unclipped) else c.score for c in known}
    best, worst = max(known, key=lambda c: raw[c.name]), min(known, key=lambda c: raw[c.name])
    if raw[best.name] <= 0:
        return " No metric is better than the baseline."
    last = f"{raw[worst.name]:.2f}" if raw[worst.name] >= 0 else f"worse than {data.zero}"
    return f" Strongest: {_lower(best.title)} ({best.score:.2f}). Weakest: {_lower(worst.title)} ({last})."


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _clip(score: float, low: float = -0.5, high: float = 1.25) -> float:
    """Return the position of a score on a bar, 0 to 100 for ``low`` to ``high``."""
    return float(100 * (min(max(score, low), high) - low) / (high - low))


def get_gauge(data: ReportData) -> dict[str, Any] | None:
    """Return the positions on the scale of the verdict."""
    if not np.isfinite(data.avg_score):
        return None
    return {
        "at": _clip(data.avg_score),
        "zero": _clip(0.0),
        "one": _clip(1.0),
        "off": not -0.5 <= data.avg_score <= 1.25,
    }


def _get_row(c: ReportComponent) -> dict[str, Any]:
    out: dict[str, Any] = {
        "c": c,
        "zero": _clip(0.0),
        "one": _clip(1.0),
        "at": None,
        "lo": None,
        "hi": None,
        "rep": None,
    }
    if np.isfinite(c.score):
        out["at"] = _clip(c.score)
    span = c.ceiling - c.baseline
    if c.ci95 is not None and np.isfinite(span) and span != 0 and np.isfinite(c.ci95[0]):
        ends = sorted(_clip((v - c.baseline) / span) for v in c.ci95)
        out["lo"], out["hi"] = ends
    if c.replicate is not None and np.isfinite(c.replicate) and np.isfinite(span) and span != 0:
        out["rep"] = _clip((c.replicate - c.baseline) / span)
    return out


def _get_panel(p: Panel, i: int, n: int) -> dict[str, Any]:
    order = np.argsort(-np.where(np.isfinite(p.quality_p), p.quality_p, -np.inf), kind="stable")
    out: dict[str, Any] = {
        "id": f"p{i}",
        "title": f"Context {p.context}" if p.context else "",
        "columns": p.columns,
        "table": [[str(p.labels[k]), [float(v) for v in p.values_pm[k]]] for k in order],
        "scatter": [],
        "heat": None,
        "volcano": None,
    }
    if p.real_lfc_ph is not None:
        m = len(order)
        best = [(int(k), "best") for k in order[: min(N_SCATTER, (m + 1) // 2)]]
        worst = [(int(k), "worst") for k in order[::-1][: min(N_SCATTER, m // 2)]]
        out["scatter"] = [_get_scatter(p, k, kind) for k, kind in best + worst[::-1]]
        out["volcano"] = to_plain(_get_volcano(p, order, MAX_POINTS // n))
    if p.distance_pp is not None and len(p.labels) > 1:
        out["heat"] = {
            "png": _make_png(p.distance_pp[order][:, order]),
            "labels": [str(p.labels[k]) for k in order],
            "distance": p.distance_name,
            "own_is_nearest": int((np.diagonal(p.distance_pp) <= p.distance_pp.min(axis=1)).sum()),
        }
    return out


def _get_scatter(p: Panel, k: int, kind: str) -> dict[str, Any]:
    """Return one small plot of predicted against true log2 fold changes, in a 100 × 100 box."""
    assert p.real_lfc_ph is not None
    assert p.pred_lfc_ph is not None
    assert p.real_padj_ph is not None
    x, y = p.real_lfc_ph[k], p.pred_lfc_ph[k]
    ok = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))  # infinite values are drawn on the frame
    known = p.real_padj_ph[k] < 0.05
    ok = _thin(ok, np.abs(x), known, SCATTER_POINTS)
    limit = _get_limit(x[ok], y[ok])

    def at(v: np.ndarray, sign: int) -> np.ndarray:
        return np.round(50 + sign * 48 * np.clip(v / limit, -1, 1), 1)

    points = list(zip(at(x[ok], 1).tolist(), at(y[ok], -1).tolist(), known[ok].tolist(), strict=True))
    sig = ok[known[ok]]
    a, b = np.clip(x[sig], -limit, limit), np.clip(y[sig], -limit, limit)
    r = float(np.corrcoef(a, b)[0, 1]) if len(sig) > 2 and a.std() > 0 and b.std() > 0 else np.nan
    return {
        "label": str(p.labels[k]),
        "kind": kind,
        "limit": limit,
        "points": points,
        "r": r,
        "n": int(known.sum()),
        "infinite": int(np.count_nonzero(known & (np.isinf(x) | np.isinf(y)))),
    }


def _get_limit(x: np.ndarray, y: np.ndarray) -> float:
    """Return the range of the axes, ignoring the infinite fold changes of genes that one side does not express."""
    size = np.abs(np.concatenate([x, y]))
    size = size[size < 10]
    return max(float(np.quantile(size, 0.995)), 0.5) if len(size) else 1.0


def _thin(ok: np.ndarray, size: np.ndarray, always: np.ndarray, n: int) -> np.ndarray:
    """Keep at most ``n`` points: significant ones (largest first), and a sample of the others."""
    if len(ok) <= n:
        return ok
    sig, rest = ok[always[ok]], ok[~always[ok]]
    sig = sig[np.argsort(-size[sig], kind="stable")[:n]]
    few = max(n - len(sig), min(n // 5, len(rest)))
    some = np.random.default_rng(0).choice(rest, min(few, len(rest)), replace=False)
    return np.sort(np.concatenate([sig[: n - len(some)], some]))


def _get_volcano(p: Panel, order: np.ndarray, budget: int) -> dict[str, Any]:
    """Return the points of every perturbation as integers: hundredths of log2 fold change, tenths of −log10 p."""
    assert p.real_lfc_ph is not None
    assert p.pred_lfc_ph is not None
    assert p.real_padj_ph is not None
    assert p.pred_padj_ph is not None
    per = max(60, min(800, budget // max(len(order), 1)))
    used: dict[int, int] = {}
    sets = []
    for k in order:
        x, y = p.real_lfc_ph[k], p.pred_lfc_ph[k]
        px, py = p.real_padj_ph[k], p.pred_padj_ph[k]
        ok = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))
        known = (px < 0.05) | (py < 0.05)
        ok = _thin(ok, np.abs(x), known, per)
        rows = []
        for g in ok:
            name = used.setdefault(int(g), len(used))
            rows += [name, _hundredths(x[g]), _tenths(px[g]), _hundredths(y[g]), _tenths(py[g])]
        seen = ok[np.isfinite(x[ok]) & np.isfinite(y[ok])]
        limit = _hundredths(_get_limit(x[seen], y[seen]))
        counts = {"n": int((px < 0.05).sum()), "m": int((py < 0.05).sum())}
        counts |= {"i": int(np.count_nonzero(np.isinf(x))), "j": int(np.count_nonzero(np.isinf(y)))}
        sets.append({"label": str(p.labels[k]), "limit": limit, "rows": rows, **counts})
    return {"genes": [str(p.genes[g]) for g in used], "sets": sets}


def _hundredths(v: float) -> int:
    return (
        int(np.clip(round(float(v) * 100), -2000, 2000))
        if np.isfinite(v)
        else (0 if np.isnan(v) else int(np.sign(v) * 2000))
    )


def _tenths(p: float) -> int:
    if not np.isfinite(p):
        return 0
    return int(min(round(-10 * float(np.log10(max(p, 1e-300)))), 3000))


def _make_png(distance_pp: np.ndarray) -> str:
    """Return a matrix as a data URI, where near is bright; large ones are halved until they fit on a screen."""
    from matplotlib.image import imsave

    m = np.nan_to_num(distance_pp, nan=np.nanmax(distance_pp) if np.isfinite(distance_pp).any() else 1.0)
    while max(m.shape) > 600:
        n = len(m) // 2 * 2
        m = m[:n, :n].reshape(n // 2, 2, n // 2, 2).min(axis=(1, 3))
    low, high = np.quantile(m, [0.01, 0.99])
    png = io.BytesIO()
    imsave(png, -m, vmin=-high, vmax=-low if high > low else 1 - high, cmap="viridis", format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
