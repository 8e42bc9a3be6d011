"""What ``score`` does with its options, and how its result looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcelltools.cli.output import Output
    from vcelltools.scoring.result import Result


DEFAULTS = {"profile": "vcc", "compat": "ours", "pert_col": "target_gene", "control": "non-targeting"}


def get_defaults(given: dict[str, Any], pred: Path, truth_pack: Path | None) -> dict[str, Any]:
    """Fill options that were not given from ``vcelltools.toml``, then from the defaults.

    Raises
    ------
    UsageError
        Where nothing says which cells are the truth.
    """
    from vcelltools.errors import UsageError

    out = dict(given)
    if Path("vcelltools.toml").exists():
        from vcelltools.config import load_config

        config = load_config()[0].score
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
            "which cells are the truth?",
            hint="--truth real.h5ad, --truth-pack FILE, or [score] truth in vcelltools.toml",
        )
    return out


def run_2025(
    o: Output,
    pred: Path,
    *,
    truth: Path | None,
    truth_pack: Path | None,
    out: Path,
    report: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Score by ours, cell-eval's or the 2025 rules; write; print."""
    from vcelltools.io.atomic import check_output
    from vcelltools.scoring import score
    from vcelltools.scoring.evaluate import Options

    Options(**options).check()
    names = ("score.json", "results.csv", "agg_results.csv", "pred_de.csv", "real_de.csv")
    for path in (report, *(out / n for n in names)):
        if path is not None:
            check_output(path, force=force)
    result = score(pred, truth, truth_pack=truth_pack, progress=o.progress, **options)
    result.write(out, force=force)
    if report is not None:
        from vcelltools.scoring.report import write_report

        write_report(result, report, force=force)
    show_score(o, result, out, report)


def run_2026(
    o: Output,
    pred: Path,
    *,
    truth: Path | None,
    truth_pack: Path | None,
    out: Path,
    report: Path | None,
    force: bool,
    profile: str,
    compat: str,
    target_gene_map: Path | None,
    **options: Any,
) -> None:
    """Score by the 2026 rules; write; print. Values without a scale are written too, before the error says why."""
    from vcelltools.io.atomic import check_output
    from vcelltools.scoring.run26 import read_gene_map, run_vcc2026

    if profile != "vcc":
        from vcelltools.errors import UsageError

        raise UsageError(f"the 2026 rules have no profile {profile!r}", hint="leave --profile out")
    for path in (report, out / "score.json"):
        if path is not None:
            check_output(path, force=force)
    result = run_vcc2026(
        pred, truth, truth_pack=truth_pack, out=out, force=force, target_gene_map=read_gene_map(target_gene_map),
        progress=o.progress, **options,
    )  # fmt: skip
    o.warn(result.warnings)
    if report is not None:
        from vcelltools.scoring.report import write_report

        name = (truth or truth_pack or Path()).name
        write_report(result, report, force=force, prediction=pred.name, truth=name)
    body = result.to_json()
    o.table(
        ["metric", "value", "95 % interval", "baseline", "ceiling", "score", "unclipped", "n"],
        [
            [m, c.value, _interval(list(c.ci95)), c.baseline, c.ceiling, c.score, c.score_unclipped, c.n]
            for m, c in result.components.items()
        ],
    )
    for check in result.contexts[0].checks:
        if check.flagged:
            o.note(f"flag: {check.text}")
    if options["anchors"]:
        result.require(f"the values are in {out}")
    o.result({**body, "out": str(out)})
    average = f"score {result.avg_score:.4f}" if result.avg_score == result.avg_score else "no score was asked for"
    also = f", {report}" if report is not None else ""
    o.done(f"wrote {out}{also}: {average} by the 2026 rules (0 is the mean response, 1 a replicate of the experiment)")


def show_score(o: Output, result: Result, folder: Path, report: Path | None) -> None:
    """Print the components, the verdict, and what was written."""
    body = result.to_json()
    o.warn(result.warnings)
    o.table(
        ["metric", "value", "95 % interval", "baseline", "ceiling", "score", "unclipped", "n"],
        [
            [
                name,
                c["value"],
                _interval(c["ci95"]),
                c["baseline"],
                c["ceiling"],
                c["score"],
                c["score_unclipped"],
                c["n"],
            ]
            for name, c in body["components"].items()
        ],
    )
    o.result({**body, "out": str(folder)})
    also = f", {report}" if report is not None else ""
    rules = "our own rules" if result.compat == "ours" else f"the rules of {result.compat}"
    average = "undefined" if result.avg_score is None else f"{result.avg_score:.4f}"
    o.done(
        f"wrote {folder}{also}: average score {average} over {len(result.components)} metrics and "
        f"{len(result.table.names):,} perturbations by {rules} "
        "(0 is the mean baseline, 1 the best); next: results.csv tells which perturbations are missed"
    )


def _interval(ci: list[float] | None) -> str | None:
    return None if ci is None or ci[0] != ci[0] else f"{ci[0]:.4g} to {ci[1]:.4g}"
