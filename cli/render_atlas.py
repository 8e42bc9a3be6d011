"""Print the results of the ``atlas`` commands."""

from __future__ import annotations

from typing import Any

from vcelltools.cli.output import Output

_MOST = 40


def show_listing(o: Output, listing: Any) -> None:
    """Print what a source holds."""
    cells = "cell counts missing from its table" if listing.cells is None else f"{listing.cells:,} cells"
    o.result(listing.to_json(), f"{listing.experiments:,} experiments, {cells}")
    o.table(["column", "values", "unknown"], [list(c) for c in listing.columns])
    if listing.values is not None:
        o.table(["value", "experiments", "cells"], [list(v) for v in listing.values[:_MOST]])
        if len(listing.values) > _MOST:
            o.note(f"{len(listing.values) - _MOST:,} more values; use --json to list all")


def show_plan(o: Output, plan: Any) -> int:
    """Print what a fetch would download."""
    o.result(plan.to_json(), plan.describe())
    o.table(
        ["experiment", "cells", "MB"],
        [[s["id"], s["cells"], None if s["bytes"] is None else s["bytes"] / 1e6] for s in plan.selected[:_MOST]],
    )
    if len(plan.selected) > _MOST:
        o.note(f"{len(plan.selected) - _MOST:,} more experiments; use --json to list all")
    o.warn(plan.warnings)
    return 0


def show_fetched(o: Output, done: Any) -> int:
    """Print what was fetched and what failed; return the exit code of the first failure, or 0."""
    o.result(
        done.to_json(),
        f"{done.out}: {done.experiments:,} experiments, {done.cells:,} cells; {done.bytes_fetched / 1e6:,.1f} MB "
        f"fetched, {done.bytes_reused / 1e6:,.1f} MB reused",
    )
    o.warn(done.warnings)
    for name, reason in done.failed:
        o.error(f"{name}: {reason}")
    if done.error is not None:
        if done.error.hint:
            o.note(done.error.hint)
        o.done(f"{len(done.failed):,} experiments failed; run the same command to retry them")
        return done.error.exit_code
    o.done(f"wrote {done.out}", ("atlas", "merge", done.out))
    return 0


def show_merge_plan(o: Output, plan: Any) -> None:
    """Print what a merge would write."""
    skipped = f", {len(plan.skipped):,} are missing" if plan.skipped else ""
    o.result(
        plan.to_json(),
        f"{plan.out} ({plan.format}): {plan.cells:,} cells of {plan.experiments:,} experiments{skipped}, "
        f"from {plan.bytes_raw / 1e6:,.1f} MB",
    )


def show_merged(o: Output, done: Any) -> None:
    """Print what was merged."""
    o.result(
        done.to_json(),
        f"{done.out}: {done.cells:,} cells × {done.genes:,} genes, {done.nnz:,} non-zeros as {done.dtype}, "
        f"largest {done.max:,}, {done.sparsity:.1%} zeros",
    )
    if done.skipped:
        o.warn([f"{len(done.skipped):,} chosen experiments are missing from it: {', '.join(done.skipped[:5])}"])
    o.warn(done.warnings)
    then = {"h5ad": ("hvg", done.out, "--batch-key", "experiment"), "store": ("verify", done.out)}
    o.done(f"wrote {done.out}", then.get("h5ad" if done.format == "zarr" else done.format, ()))


def show_folder_verified(o: Output, done: Any) -> int:
    """Print what verifying a fetched atlas found; return the exit code."""
    for name, why in done.bad:
        o.error(f"{name}: {why}")
    if done.missing:
        o.error(f"{len(done.missing):,} chosen experiments were not fetched: {', '.join(done.missing[:5])}")
    state = "whole" if done.ok else "incomplete"
    o.result(done.to_json(), f"{done.path}: {state}; {done.files:,} files, {done.bytes / 1e6:,.1f} MB hashed")
    return 0 if done.ok else 3
