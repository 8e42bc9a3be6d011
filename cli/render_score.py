"""What ``score`` does with its options, and how its result looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcelltools.cli.output import Output

    from vcelltools.scoring.result import Result


def find_truth(truth: Path | None) -> Path:
    """Return the truth of the options or of ``vcelltools.toml``; a :class:`UsageError` says what is needed."""
    from vcelltools.errors import UsageError

    if truth is not None:
        return truth
    config = Path("vcelltools.toml")
    if config.exists():
        import tomllib

        try:
            found = tomllib.loads(config.read_text(encoding="utf-8")).get("score", {}).get("truth")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise UsageError(f"{config}: {e}") from e
        if isinstance(found, str):
            return Path(found)
    raise UsageError(
        "which cells are the truth?", hint="--truth real.h5ad, --truth-pack FILE, or [score] truth in vcelltools.toml"
    )


def run_2025(
    o: Output,
    pred: Path,
    *,
    truth: Path | None,
    truth_pack: Path | None,
    out: Path | None,
    report: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Score by ours, cell-eval's or the 2025 rules; write; print."""
    from vcelltools.io.atomic import check_output
    from vcelltools.scoring import score
    from vcelltools.scoring.evaluate import Options

    Options(**options).check()
    folder = out or Path(f"score-{pred.stem}")
    from_pack = truth_pack is not None and truth_pack.exists() and truth is None
    for path in (report, folder / "score.json", folder / "results.csv"):
        if path is not None:
            check_output(path, force=force)
    real = None if from_pack else find_truth(truth)
    result = score(pred, real, truth_pack=truth_pack, progress=o.progress, **options)
    result.write(folder, force=force)
    if report is not None:
        from vcelltools.scoring.report import write_report

        write_report(result, report, force=force)
    show_score(o, result, folder, report)


def run_2026(
    o: Output, pred: Path, *, truth: Path | None, out: Path | None, report: Path | None, force: bool, **options: Any
) -> None:
    """Score by the 2026 rules; write; print."""
    from vcelltools.io.atomic import check_output, write_json
    from vcelltools.scoring.vcc2026 import score_vcc2026

    folder = out or Path(f"score-{pred.stem}")
    check_output(folder / "score.json", force=force)
    result = score_vcc2026(pred, find_truth(truth), progress=o.progress, **options)
    write_json(folder / "score.json", result.to_json(), force=force)
    o.result(result.to_json())
    o.done(f"{folder}: score.json")


def show_score(o: Output, result: Result, folder: Path, report: Path | None) -> None:
    """Print the components, the verdict, and what was written."""
    body = result.to_json()
    o.warn(result.warnings)
    o.table(
        ["metric", "value", "95 % interval", "baseline", "ceiling", "score", "unclipped", "n"],
        [
            [name, c["value"], _interval(c["ci95"]), c["baseline"], c["ceiling"], c["score"], c["score_unclipped"], c["n"]]
            for name, c in body["components"].items()
        ],
    )
    o.result({**body, "out": str(folder)})
    also = f", {report}" if report is not None else ""
    average = "undefined" if result.avg_score is None else f"{result.avg_score:.4f}"
    o.done(
        f"{folder}{also}: average score {average} over {len(result.components)} metrics and "
        f"{len(result.table.names):,} perturbations by the rules of {result.compat} "
        "(0 is the mean baseline, 1 the best). Next: results.csv tells which perturbations are missed"
    )


def _interval(ci: list[float] | None) -> str | None:
    return None if ci is None else f"{ci[0]:.4g} to {ci[1]:.4g}"
