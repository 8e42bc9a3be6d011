"""Resolve the options of ``score`` and print its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.cli.hints import find_config

if TYPE_CHECKING:
    from vcelltools.cli.output import Output
    from vcelltools.scoring.result import Component, Result


DEFAULTS = {"profile": "vcc", "compat": "ours", "pert_col": "target_gene", "control": "non-targeting"}


def get_defaults(given: dict[str, Any], pred: Path, truth_pack: Path | None) -> dict[str, Any]:
    """Fill in missing options from ``vcelltools.toml``, then from the defaults.

    Raises
    ------
    UsageError
        If no truth is given or configured.
    """
    from vcelltools.errors import UsageError

    out = dict(given)
    if (found := find_config()) is not None:
        config = found[0].score
        for key, value in out.items():
            default = getattr(config, key)
            if value is None and default is not None:
                out[key] = Path(default) if key in ("truth", "out", "report") else default
    out = {k: DEFAULTS.get(k) if v is None else v for k, v in out.items()}
    out["out"] = out["out"] or Path(f"score-{pred.stem}")
    if given["truth"] is None and truth_pack is not None and truth_pack.exists():
        out["truth"] = None
    elif out["truth"] is None:
        raise UsageError(
            "no truth to score against",
            hint="--truth real.h5ad, --truth-pack FILE, or [score] truth in vcelltools.toml",
        )
    return out


def run(
    o: Output,
    pred: Path,
    *,
    truth: Path | None,
    truth_pack: Path | None,
    out: Path,
    report: Path | None,
    force: bool,
    need_score: bool,
    reads: list[Path | None],
    **options: Any,
) -> None:
    """Score, write and print. Values without a scale are also written, before the error explains why."""
    from vcelltools.scoring import guard_score, score

    guard_score(out=out, report=report, truth_pack=truth_pack, reads=[pred, truth, *reads], force=force)
    result = score(pred, truth, truth_pack=truth_pack, out=out, force=force, progress=o.progress, **options)
    o.warn(result.warnings)
    if report is not None:
        from vcelltools.scoring.report.data import write_report

        write_report(result, report, force=force, prediction=pred.name, truth=(truth or truth_pack or Path()).name)
    o.table(*_make_table(result), grey=[i for i, c in enumerate(result.components.values()) if _is_weak(c)])
    for context in result.contexts:
        for check in context.checks:
            if check.flagged:
                o.note(f"flag{f' in context {context.context}' if context.context else ''}: {check.text}")
    if need_score:
        result.require(f"the values are in {out}")
    body = result.to_json()
    o.result({**body, "out": str(out)})
    average = "no score" if body["avg_score"] is None else f"average score {body['avg_score']:.4f}"
    also = f", {report}" if report is not None else ""
    rules = "our rules" if result.compat == "ours" else f"the rules of {result.compat}"
    ends = "the mean response, 1 is a replicate of the experiment" if need_score else "the mean baseline, 1 is the best"
    if result.profile == "calibrated":
        ends = "the negative control of a metric, 1 is the best"
    o.done(
        f"wrote {out}{also}: {average} over {len(result.components)} metrics and {len(result.table.names):,} "
        f"perturbations by {rules} (0 is {ends}); results.csv lists every perturbation"
    )


def _interval(ci: tuple[float, float] | None) -> str | None:
    return None if ci is None or ci[0] != ci[0] else f"{ci[0]:.4g} to {ci[1]:.4g}"


def _is_weak(c: Component) -> bool:
    return c.calibration is not None and not c.calibration.discriminates


def _make_table(result: Result) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the metrics; what a metric tells on the data stands where it was looked at."""
    columns = ["metric", "value", "95 % interval", "baseline"]
    parts = result.components.items()
    if not any(c.calibration for _, c in parts):
        return [*columns, "ceiling", "score", "unclipped", "n"], [
            [m, c.value, _interval(c.ci95), c.baseline, c.ceiling, c.score, c.score_unclipped, c.n] for m, c in parts
        ]
    rows = []
    for m, c in parts:
        k = c.calibration
        told = [None] * 3 if k is None else [k.drf, k.bds, "" if k.discriminates else "little"]
        rows.append([m, c.value, _interval(c.ci95), c.baseline, c.score, c.n, *told])
    return [*columns, "score", "n", "DRF", "BDS", "range"], rows
