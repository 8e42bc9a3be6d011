"""The HTML report: one file, no network, made to be read.

:class:`ReportData` is all that the page shows, as plain arrays and strings; :func:`make_html` draws it. Labels come
from files that nobody vouches for: the template escapes every one of them, and the page's own policy forbids it to load
or send anything.
"""

from __future__ import annotations

import base64
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.atomic import to_plain, write_text
from vcelltools.scoring.gaming import Check

if TYPE_CHECKING:
    from vcelltools.scoring.result import Result
    from vcelltools.scoring.result26 import Score2026

MAX_POINTS = 60_000
"""Points of all volcanoes together; a page of this size opens at once on a phone."""
SCATTER_POINTS = 900
N_SCATTER = 3


@dataclass(frozen=True, kw_only=True)
class ReportComponent:
    """A metric of the score, with the words that explain it.

    ``replicate`` is the value that one half of the true cells reaches against the other, where the upper end of the
    scale is something else.
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


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What is drawn for one context: perturbations × genes, and perturbations × perturbations.

    Attributes
    ----------
    context
        Its name, "" where there is but one.
    labels, genes
        (p,) perturbations and (h,) genes.
    columns, values_pm
        The table: metric names and (p, m) values, NaN where undefined.
    real_lfc_ph, pred_lfc_ph, real_padj_ph, pred_padj_ph
        (p, h) log2 fold changes and adjusted p, or None without differential expression.
    distance_pp
        (p, p) distance of each predicted effect (rows) to each true one, or None.
    quality_p
        (p,) what orders the perturbations from best to worst.
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


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page.

    Attributes
    ----------
    prediction, truth
        The files' names.
    rules
        The rule set in words.
    zero, one
        What the ends of the scale are.
    avg_score
        The total, NaN where there is none.
    components, panels
        The metrics, and the drawings of every context.
    checks
        The gaming panel.
    warnings
        Shown at the end; ``problem`` beside the verdict.
    facts
        Pairs of words for the foot of the page.
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


def write_report(result: Result | Score2026, path: str | os.PathLike, *, force: bool = False, **names: str) -> Path:
    """Write the report of a scored prediction; ``names`` may give ``prediction`` and ``truth``."""
    from vcelltools.scoring.report_data import from_2025, from_2026
    from vcelltools.scoring.result26 import Score2026

    data = from_2026(result, **names) if isinstance(result, Score2026) else from_2025(result, **names)
    return write_text(path, make_html(data), force=force)


def make_html(data: ReportData) -> str:
    """Return the page."""
    import jinja2

    from vcelltools import __version__

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("vcelltools", "scoring"),
        autoescape=True,
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
    """Return a number for people: three significant digits, a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    v = float(value)
    if v == 0:
        return "0"
    if abs(v) >= 1000:
        return f"{v:,.0f}"
    return f"{v:.{digits}g}" if abs(v) < 0.001 else f"{v:.{max(digits - 1 - int(np.floor(np.log10(abs(v)))), 0)}f}"


def get_verdict(data: ReportData) -> dict[str, str]:
    """Return the headline, its tone, and the sentence below it."""
    s = data.avg_score
    if not np.isfinite(s):
        return {"tone": "none", "head": "No score", "text": data.problem or "Some metrics are undefined."}
    steps = [
        (-np.inf, "bad", "Worse than the baseline", f"Predicting {data.zero} would have scored better."),
        (-0.02, "bad", "No better than the baseline", f"It carries no more than {data.zero}."),
        (0.05, "weak", "A first signal", f"It is a little better than {data.zero}."),
        (0.25, "fair", "A real signal", f"A good way up from {data.zero}, and a longer one still to go."),
        (0.6, "good", "Most of the way", f"Nearer to {data.one} than to {data.zero}."),
        (0.95, "good", "At the ceiling", f"As good as {data.one}, or better."),
    ]
    _, tone, head, text = [step for step in steps if s >= step[0]][-1]
    known = [c for c in data.components if np.isfinite(c.score)]
    if len(known) > 1:
        best, worst = max(known, key=lambda c: c.score), min(known, key=lambda c: c.score)
        text += (
            f" Strongest: {_lower(best.title)} ({best.score:.2f}). Weakest: {_lower(worst.title)} ({worst.score:.2f})."
        )
    n = sum(c.flagged for c in data.checks)
    if n:
        text += f" {'A flag' if n == 1 else f'{n} flags'} below should be read first."
    return {"tone": tone, "head": head, "text": text}


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _clip(score: float, low: float = -0.5, high: float = 1.25) -> float:
    """Return the position of a score on a bar, 0 to 100 for ``low`` to ``high``."""
    return float(100 * (min(max(score, low), high) - low) / (high - low))


def get_gauge(data: ReportData) -> dict[str, Any] | None:
    """Return the positions on the verdict's scale."""
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
            "own_is_nearest": int((np.diagonal(p.distance_pp) <= p.distance_pp.min(axis=1)).sum()),
        }
    return out


def _get_scatter(p: Panel, k: int, kind: str) -> dict[str, Any]:
    """Return one small plot of predicted against true log2 fold changes, in a 100 × 100 box."""
    assert p.real_lfc_ph is not None
    assert p.pred_lfc_ph is not None
    assert p.real_padj_ph is not None
    x, y = p.real_lfc_ph[k], p.pred_lfc_ph[k]
    ok = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
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
    }


def _get_limit(x: np.ndarray, y: np.ndarray) -> float:
    """Return how far the axes go: a gene that one side never saw is infinitely far, and must not decide."""
    size = np.abs(np.concatenate([x, y]))
    size = size[size < 10]
    return max(float(np.quantile(size, 0.995)), 0.5) if len(size) else 1.0


def _thin(ok: np.ndarray, size: np.ndarray, always: np.ndarray, n: int) -> np.ndarray:
    """Keep at most ``n`` points: the significant (largest first), and a fair sample of the others."""
    if len(ok) <= n:
        return ok
    sig, rest = ok[always[ok]], ok[~always[ok]]
    sig = sig[np.argsort(-size[sig], kind="stable")[:n]]
    few = max(n - len(sig), min(n // 5, len(rest)))
    some = np.random.default_rng(0).choice(rest, min(few, len(rest)), replace=False)
    return np.sort(np.concatenate([sig[: n - len(some)], some]))


def _get_volcano(p: Panel, order: np.ndarray, budget: int) -> dict[str, Any]:
    """Return the points of every perturbation, small integers: hundredths of log2 fold change, tenths of −log10 p."""
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
        ok = np.flatnonzero(np.isfinite(x) | np.isfinite(y))
        known = (px < 0.05) | (py < 0.05)
        ok = _thin(ok, np.maximum(np.abs(np.nan_to_num(x, posinf=0, neginf=0)), 0), known, per)
        rows = []
        for g in ok:
            name = used.setdefault(int(g), len(used))
            rows += [name, _hundredths(x[g]), _tenths(px[g]), _hundredths(y[g]), _tenths(py[g])]
        seen = ok[np.isfinite(x[ok]) & np.isfinite(y[ok])]
        limit = _hundredths(_get_limit(x[seen], y[seen]))
        counts = {"n": int((px < 0.05).sum()), "m": int((py < 0.05).sum())}
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


# Dark to light blue-green-yellow, told apart in every common form of colour blindness (viridis, by its anchors).
_ANCHORS = np.array(
    [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
     [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]], float
)  # fmt: skip


def _make_png(distance_pp: np.ndarray) -> str:
    """Return a matrix as a data URI: near is bright. Large ones are halved until they fit a screen."""
    m = np.nan_to_num(distance_pp, nan=np.nanmax(distance_pp) if np.isfinite(distance_pp).any() else 1.0)
    while max(m.shape) > 600:
        n = len(m) // 2 * 2
        m = m[:n, :n].reshape(n // 2, 2, n // 2, 2).min(axis=(1, 3))
    low, high = np.quantile(m, [0.01, 0.99])
    share = 1 - np.clip((m - low) / (high - low if high > low else 1.0), 0, 1)
    at = share * (len(_ANCHORS) - 1)
    i = np.minimum(at.astype(int), len(_ANCHORS) - 2)
    part = (at - i)[..., None]
    rgb = np.round(_ANCHORS[i] * (1 - part) + _ANCHORS[i + 1] * part).astype(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rgb)
    head = struct.pack(">2I5B", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()
