"""Print the results of the commands on stores."""

from __future__ import annotations

from typing import Any

from vcelltools.cli.hints import find_building
from vcelltools.cli.output import Output


def show_built(o: Output, outcomes: list[Any]) -> int:
    """Print what was built and what failed; return the exit code of the first failure, or 0.

    Raises
    ------
    VcellError
        The error of the data set, if it was the only one.
    """
    failed = [x for x in outcomes if x.error is not None]
    if failed and len(outcomes) == 1:
        raise failed[0].error
    results = [x.result for x in outcomes if x.result is not None]
    errors = [
        {"name": x.name, "kind": e.kind, "message": e.message, "hint": e.hint, "exit_code": e.exit_code}
        for x in failed
        if (e := x.error) is not None
    ]
    o.result({"stores": [r.to_json() for r in results], "failed": errors})
    if results:
        o.table(
            ["store", "cells", "genes", "runs", "perturbations", "MB", "seconds", "kept"],
            [
                [
                    str(r.path),
                    r.n_cells,
                    r.n_genes,
                    r.n_runs,
                    r.n_perturbations,
                    round(r.bytes / 1e6, 1),
                    r.seconds,
                    r.kept,
                ]
                for r in results
            ],
        )
    for r in results:
        for w in r.warnings:
            o.note(f"{r.path.name}: {w}")
    for x in failed:
        o.error(f"{x.name}: {x.error}")
    paths = ", ".join(str(r.path) for r in results)
    cells = sum(r.n_cells for r in results)
    if failed:
        o.done(
            f"{_count(len(results), 'store')} built, {len(failed)} failed; run the same command again, which keeps "
            "complete stores"
        )
        return failed[0].error.exit_code
    o.done(f"wrote {paths}: {cells:,} cells", ("verify", *(r.path for r in results)))
    return 0


def show_store_plans(o: Output, plans: list[dict[str, Any]]) -> None:
    """Print what would be built."""
    o.result({"plans": plans})
    for p in plans:
        o.table(["plan", p["name"]], [[k.replace("_", " "), _say(v)] for k, v in p.items() if k != "name"])
    o.done("nothing was written; run the command without --plan to build")


def _say(v: Any) -> Any:
    """Return a list or the entries of a table in words, and anything else unchanged."""
    if isinstance(v, dict):
        v = [f"{k}: {n:,}" if isinstance(n, int) else f"{k}: {n}" for k, n in v.items()]
    return (", ".join(str(x) for x in v) or "none") if isinstance(v, list) else v


def show_verified(o: Output, found: list[Any]) -> int:
    """Print the problems of each store; return the exit code."""
    from vcelltools.errors import DataError

    ok = all(v.ok for v in found)
    lines = [f"{v.path}: {'ok' if v.ok else _count(len(v.problems), 'problem')}" for v in found]
    for v in found:
        lines += [p if p.startswith(str(v.path)) else f"{v.path}: {p}" for p in v.problems]
    o.result({"ok": ok, "stores": [v.to_json() for v in found]}, *lines)
    if ok:
        words = [w for v in found for w in ("--store", v.path)]
        o.done(f"{_count(len(found), 'store')} checked, every byte unchanged", ("train", *words))
    else:
        bad = _count(sum(not v.ok for v in found), "store")
        o.note(f"error: {bad} damaged (the build-store command that made it, with --force, builds it again)")
    return 0 if ok else DataError.exit_code


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def show_basis(o: Output, result: Any, paths: tuple[Any, Any]) -> None:
    """Print the reconciliation of genes and the head of the basis."""
    body = {
        "out": str(paths[0]),
        "json": str(paths[1]),
        "n_genes": len(result.genes),
        "report": list(result.report),
        "excluded": list(result.excluded),
        "settings": dict(result.settings),
        "warnings": list(result.warnings),
    }
    o.result(body)
    o.table(
        ["gene", "id", "mean rank", "HVG in", "forced"],
        [[g.label, g.id, g.mean_rank, g.n_hvg, g.forced] for g in result.genes[:10]],
        title="the first ten",
    )
    for line in result.report:
        o.note(line)
    o.warn(list(result.warnings))
    sources = [s["path"] for s in result.sources if "path" in s]
    o.done(f"wrote {paths[0]} ({len(result.genes):,} genes) and {paths[1]}", find_building(paths[0], sources))
