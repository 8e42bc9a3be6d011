"""The 2026 rules from files to files: truth packs, tables, ``score.json``."""

from __future__ import annotations

import csv
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.atomic import check_output, staged, write_json, write_text
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.frames import is_plain, load_ahead, numbers, texts, write_arrow_csv
from vcelltools.scoring.options26 import Options2026
from vcelltools.scoring.pack26 import get_settings, read_pack, write_pack
from vcelltools.scoring.result26 import Score2026
from vcelltools.scoring.vcc2026 import make_truth, score_vcc2026
from vcelltools.textfile import read_rows

if TYPE_CHECKING:
    from anndata import AnnData

    from vcelltools.scoring.sides26 import DeTable

_STATISTICS = ("count", "null_count", "mean", "std", "min", "25%", "50%", "75%", "max")


def run_vcc2026(
    pred: str | os.PathLike | AnnData,
    truth: str | os.PathLike | AnnData | None = None,
    *,
    truth_pack: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> Score2026:
    """Score by the 2026 rules, with a truth pack and output files where they are asked for.

    Parameters
    ----------
    truth_pack
        Read in place of ``truth`` where it exists; written where it does not.
    out
        A folder for ``results.csv``, ``agg_results.csv``, ``pred_de.csv``, ``real_de.csv`` and ``score.json``.
    **options
        See :class:`vcelltools.scoring.options26.Options2026`.

    Raises
    ------
    DataError, UsageError
        As :func:`vcelltools.scoring.vcc2026.score_vcc2026` does. Where there are values but no score (no ends to scale
        by), the result says so in ``problem``; nothing is raised.
    """
    settings = get_settings(Options2026(**options))
    if out is not None:
        check_output(Path(out) / "score.json", force=force)
        load_ahead()
    pack = None if truth_pack is None else Path(truth_pack)
    if pack is not None and pack.exists():
        truths = read_pack(pack, settings)
    else:
        if truth is None:
            raise UsageError("which cells are the truth?", hint="give the truth, or a truth pack that exists")
        if pack is not None:
            check_output(pack, force=force)
        truths = make_truth(truth, progress=progress, **options)
        if pack is not None:
            write_pack(pack, truths, settings, force=force)
    result = score_vcc2026(pred, truths, progress=progress, **options)
    if out is not None:
        write_result(result, out, with_real=pack is None or truth is not None, force=force)
    return result


def write_result(
    result: Score2026, folder: str | os.PathLike, *, with_real: bool = True, force: bool = False
) -> dict[str, Path]:
    """Write the tables and ``score.json``; return their paths by name.

    ``with_real`` adds ``real_de.csv`` (a pack does not hold every p of the truth).
    """
    names = ["results.csv", "agg_results.csv", "pred_de.csv", *(["real_de.csv"] if with_real else []), "score.json"]
    files = {n: Path(folder) / n for n in names}
    head, rows = result.to_rows()
    first = 2 if "context" in head else 1
    values = np.array([r[first:] for r in rows], float)
    with staged(list(files.values()), force=force, stale=[Path(folder) / "real_de.csv"]) as there:
        write_text(there / "results.csv", _to_csv(head, rows))
        write_text(there / "agg_results.csv", _to_csv(*_aggregate(head[first:], values, result)))
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda name: _write_de(there / name, result, name.removesuffix("_de.csv")),
                    [n for n in ("pred_de.csv", "real_de.csv") if n in files],
                )
            )
        write_json(there / "score.json", result.to_json())
    return files


def _to_csv(head: list[str], rows: list[list[Any]]) -> str:
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])
    return out.getvalue()


def _aggregate(columns: list[str], values: np.ndarray, result: Score2026) -> tuple[list[str], list[list[Any]]]:
    """Return the statistics of every column over the finite perturbations, and the ratio that is no mean of any."""
    table: dict[str, list[Any]] = {s: [s] for s in _STATISTICS}
    for j in range(len(columns)):
        some = values[:, j][np.isfinite(values[:, j])]
        table["count"].append(len(some))
        table["null_count"].append(int(len(values) - len(some)))
        table["mean"].append(float(some.mean()) if len(some) else math.nan)
        table["std"].append(float(some.std(ddof=1)) if len(some) > 1 else math.nan)
        points = np.percentile(some, [0, 25, 50, 75, 100]) if len(some) else [math.nan] * 5
        for s, v in zip(("min", "25%", "50%", "75%", "max"), points, strict=True):
            table[s].append(float(v))
    ratio = "expr_mse_unbiased_capped_norm"
    for s, row in table.items():
        row.append(result.components[ratio].value if s == "mean" else math.nan)
    return ["statistic", *columns, ratio], list(table.values())


def _write_de(path: Path, result: Score2026, side: str) -> None:
    tables, seen = [], []
    for c in result.contexts:
        de: DeTable = getattr(c, side).de
        p, h = de.lfc_ph.shape
        labels, genes = [str(v) for v in c.labels], [str(c.genes[g]) for g in de.genes]
        seen += [c.context, *labels, *genes]
        columns = {"context": texts([c.context], each=p * h)} if c.context else {}
        columns |= {
            "target": texts(labels, each=h),
            "feature": texts(genes, times=p),
            "log2_fold_change": numbers(de.lfc_ph.ravel()),
            "p_value": numbers(de.p_ph.ravel()),
            "fdr": numbers(de.padj_ph.ravel()),
        }
        tables.append(columns)
    write_arrow_csv(path, tables, plain=is_plain(seen))


def read_gene_map(path: str | os.PathLike | None) -> dict[str, str | None] | None:
    """Return {perturbation: its gene, or None} of a CSV with these two columns; an empty gene means that it has none.

    A perturbation ``*`` stands for all that are not listed.
    """
    if path is None:
        return None
    rows = read_rows(path, what="a table of perturbations and their genes", hint="--target-gene-map")
    rows = [r for r in rows if r[0].strip()]
    if rows and rows[0][0].strip().lower() in ("perturbation", "target", "target_gene", "label"):
        rows = rows[1:]
    if any(len(r) < 2 for r in rows) or not rows:
        raise DataError(f"{path}: two columns are expected, the perturbation and its gene", hint="--target-gene-map")
    return {r[0].strip(): r[1].strip() or None for r in rows}
