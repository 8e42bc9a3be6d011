"""Folds benchmark runs into committed results, writes the tables of the documentation from them, and compares two runs.

python -m benchmarks.report fold PYTEST_BENCHMARK.json   # -> results/kernels.json
python -m benchmarks.report tables                       # README.md and docs/benchmarks.md
python -m benchmarks.report compare DIR                  # ratios in DIR against results/: a loss of 20 % fails
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

from benchmarks.harness import ROOT, save

RESULTS = ROOT / "benchmarks" / "results"
LOSS = 0.8
METRICS = ("pds", "pearson_delta", "mae")
KOLF_CELLS, KOLF_NON_ZEROS = 5_386_783, 2e10


def fold(path: str) -> None:
    """Turn pytest-benchmark's output into one row a group: our median and each peer's, and the ratios."""
    groups: dict[str, dict[str, float]] = {}
    for bench in json.loads(Path(path).read_text())["benchmarks"]:
        name = re.sub(r"^test_", "", bench["name"].split("[")[0])
        param = f" ({bench['param']})" if bench.get("param") else ""
        groups.setdefault(f"{bench['group']}{param}", {})[name] = statistics.median(bench["stats"]["data"])
    rows = []
    for group, medians in sorted(groups.items()):
        ours = medians.pop("ours")
        rows.append(
            {
                "case": group,
                "ours_ms": round(1e3 * ours, 2),
                "peers_ms": {k: round(1e3 * v, 2) for k, v in medians.items()},
                "ratios": {k: round(v / ours, 2) for k, v in medians.items()},
            }
        )
    print(save("kernels", rows))


def get_ratios(folder: Path) -> dict[str, float]:
    """Every ratio to a peer in a folder of results, by a name that stays the same from run to run."""
    out: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            for key, value in row.items():
                if key.startswith("ratio") and isinstance(value, int | float):
                    out[f"{path.stem}: {row['case']}: {key}"] = float(value)
                elif key == "ratios":
                    out |= {f"{path.stem}: {row['case']}: {k}": float(v) for k, v in value.items()}
    return out


def compare(folder: str) -> int:
    """Hold the ratios of a new run against the committed ones; return 1 where one lost more than 20 %."""
    old, new = get_ratios(RESULTS), get_ratios(Path(folder))
    lost = 0
    for name in sorted(old.keys() & new.keys()):
        change = new[name] / old[name] if old[name] else 1.0
        bad = change < LOSS
        lost += bad
        print(f"{'LOST ' if bad else '     '}{name}: {old[name]:.2f} -> {new[name]:.2f} ({change - 1:+.0%})")
    if not old.keys() & new.keys():
        print("no case in common: nothing was compared")
        return 1
    print(f"{lost} of {len(old.keys() & new.keys())} ratios lost more than {1 - LOSS:.0%}")
    return int(lost > 0)


def make_hvg_table() -> str:
    """Return the table of whole commands."""
    body = json.loads((RESULTS / "hvg.json").read_text())
    lines = [
        "| file (cells × genes) | `vcelltools hvg` | peak | whole scanpy 1.11.5 script | peak | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for r in body["rows"]:
        if "scanpy_s" not in r:
            continue
        lines.append(
            f"| {r['case']} ({r['cells']:,} × {r['genes']:,}) | {r['ours_s']:.2f} s | {r['ours_peak_mb']:,} MB "
            f"| {r['scanpy_s']:.1f} s | {r['scanpy_peak_mb']:,} MB | **{r['ratio']:.1f}×** |"
        )
    scaling = [r for r in body["rows"] if r["case"].startswith("scaling")]
    if scaling:
        lines += ["", "| raw CSR, cells | size | 1 thread | 2 threads | peak |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['cells']:,} | {r['bytes'] / 1e9:.2f} GB | {r['one_thread_s']:.2f} s | {r['two_threads_s']:.2f} s "
            f"| {r['peak_mb']:,} MB |"
            for r in scaling
        ]
    machine = body["machine"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; medians, files in the page cache.",
    ]
    return "\n".join(lines)


def make_kolf_projection() -> str:
    """What KOLF_Pan_Genome_Aggregate.h5mu would take, from the smallest and the largest run of the scaling."""
    body = json.loads((RESULTS / "hvg.json").read_text())
    runs = sorted((r for r in body["rows"] if r["case"].startswith("scaling")), key=lambda r: r["cells"])
    if len(runs) < 2:
        return "(run `python -m benchmarks.bench_hvg --scaling`)"
    small, large = runs[0], runs[-1]
    rate = (large["non_zeros"] - small["non_zeros"]) / (large["two_threads_s"] - small["two_threads_s"])
    per_value = large["bytes"] / large["non_zeros"]
    size = KOLF_NON_ZEROS * per_value
    cold = next((r for r in body["rows"] if r["case"] == "cold hvg"), None)
    if cold is None:
        return "(run `python -m benchmarks.bench_hvg --cold`)"
    cached, pace = KOLF_NON_ZEROS / rate, cold["bytes"] / cold["ours_s"] / 1e9
    memory = large["peak_mb"] + 24 * (KOLF_CELLS - large["cells"]) / 1e6
    return (
        f"From {small['cells']:,} to {large['cells']:,} cells the command gains "
        f"{rate / 1e6:,.0f} M non-zeros a second on two threads. KOLF_Pan_Genome_Aggregate.h5mu "
        f"({KOLF_CELLS:,} cells × 38,606 genes) holds about {KOLF_NON_ZEROS / 1e9:.0f} billion. Stored raw at "
        f"{per_value:.1f} bytes each it is {size / 1e9:,.0f} GB: {cached:,.0f} s if it came from the page cache, and "
        f"**{size / pace / 1e9:,.0f} s** from this disk at the {pace:.2f} GB/s of the cold run above, in about "
        f"{memory:,.0f} MB. Assumed: time linear in non-zeros, no compression, the same density of non-zeros as above; "
        "nobody has run it on the file itself here."
    )


def make_cold_table() -> str:
    """Return the table of commands on a file that is not in the page cache."""
    rows = [r for r in json.loads((RESULTS / "hvg.json").read_text())["rows"] if r["case"].startswith("cold")]
    lines = ["| cold, cells | size | `dd iflag=direct` | ours | rate of dd | peak |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['case'].removeprefix('cold ')}, {r['cells']:,} | {r['bytes'] / 1e9:.1f} GB | {r['dd_s']:.1f} s | "
        f"{r['ours_s']:.1f} s | {r['rate_of_dd']:.0%} | {r['ours_peak_mb']} MB |"
        for r in rows
    ]
    return "\n".join(lines)


def make_atlas_table() -> str:
    """Return the table of merging an atlas and reading its cells."""
    rows = json.loads((RESULTS / "atlas.json").read_text())["rows"]
    lines = ["| case | time | peak |", "|---|---|---|"]
    lines += [f"| {r['case']} | {r['seconds']:.1f} s | {r['peak_mb']:,} MB |" for r in rows if "seconds" in r]
    lines += ["", "| reading random cells | cells/s |", "|---|---|"]
    lines += [f"| {r['case']} | {r['cells_per_second']:,.0f} |" for r in rows if "cells_per_second" in r]
    return "\n".join(lines)


def make_kernel_table() -> str:
    """Return the table of kernels."""
    body = json.loads((RESULTS / "kernels.json").read_text())
    lines = ["| warm, in memory | ours | peer | ratio |", "|---|---|---|---|"]
    for r in body["rows"]:
        for peer, ms in r["peers_ms"].items():
            lines.append(f"| {r['case']} | {r['ours_ms']:.1f} ms | {peer} {ms:.0f} ms | {r['ratios'][peer]:.1f}× |")
    return "\n".join(lines)


def make_score_table() -> str:
    """Return the table of scoring."""
    body = json.loads((RESULTS / "score.json").read_text())
    lines = ["| scoring, whole commands | ours | peak | official | peak | ratio |", "|---|---|---|---|---|---|"]
    de = []
    for r in body["rows"]:
        if r["case"].startswith("score26"):
            lines += _list_2026(r)
            continue
        perts, cells, controls, genes, density = r["size"]
        what = f"{perts} × {cells:,} + {controls:,} controls × {genes:,} genes, {density:.0%} non-zero"
        if r["case"].startswith("de "):
            pause = f"{r['ours_first_seconds']:.2f} s, {r['peer_first_seconds']:.2f} s"
            times = f"{r['ours_seconds']:.2f} s | {r['peer_seconds']:.2f} s | **{r['ratio']:.1f}×**"
            de.append(f"| {what} | {times} | {pause} |")
            continue
        profile = r["case"].split()[-1]
        peer = " | – | – | – |"
        if "peer_seconds" in r:
            peer = f" | cell-eval 0.8.2: {r['peer_seconds']:.0f} s | {r['peer_peak_mb']:,} MB | **{r['ratio']:.0f}×** |"
        lines.append(f"| `{profile}`, {what} | {r['ours_seconds']:.1f} s | {r['ours_peak_mb']:,} MB{peer}")
    if de:
        head = "| differential expression of one file in memory, warm | ours | illico 0.6.0 | ratio | after a pause |"
        lines += ["", head, "|---|---|---|---|---|", *de]
    return "\n".join(lines)


def _list_2026(r: dict) -> list[str]:
    """The rows of a scoring by the 2026 rules; where a peer stands, both sides compute the same."""
    _, cells, genes = r["size"]
    both = r["case"].endswith("both ends")
    out = []
    for kind, words in (
        ("ours", "values and both ends of the scale" if both else "values alone"),
        ("from_pack", "values from a truth pack, scaled"),
        ("with_both_ends", "values and both ends of the scale"),
    ):
        if f"{kind}_seconds" not in r:
            continue
        peer = " | – | – | – |"
        if kind == "ours" and "peer_seconds" in r:
            peer = (
                f" | cell-eval2 0.20.0: {r['peer_seconds']:.0f} s | {r['peer_peak_mb']:,} MB | **{r['ratio']:.3g}×** |"
            )
        head = f"| 2026 rules, {words}, {cells:,} cells × {genes:,} genes"
        out.append(f"{head} | {r[f'{kind}_seconds']:.1f} s | {r[f'{kind}_peak_mb']:,} MB{peer}")
    return out


def make_store_table() -> str:
    """Return the table of sampling and building."""
    body = json.loads((RESULTS / "store.json").read_text())
    rows = body["rows"]
    sampling = [r for r in rows if not r["case"].startswith(("building", "memory"))]
    building = [r for r in rows if r["case"].startswith("building")]
    memory = [r for r in rows if r["case"].startswith("memory")]
    lines = [
        f"| reading sets from a store of {body['cells']:,} cells × 2,000 genes | cells/s | ratios |",
        "|---|---|---|",
    ]
    for r in sampling:
        ratios = ", ".join(f"{v:,.0f}× {k}" if v >= 100 else f"{v:.3g}× {k}" for k, v in r.get("ratios", {}).items())
        lines.append(f"| {r['case']} | {r['cells_per_s']:,} | {ratios} |")
    if building:
        lines += [
            "",
            "| building, 60,000 cells × 18,000 genes, 3,600 non-zeros a cell | cells/s of the passes | of the whole "
            "process | reading alone | peak |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['case'].removeprefix('building, ')} CSR | {r['cells_per_s']:,} | {r['whole_process_cells_per_s']:,} "
            f"| {r['reading_alone_cells_per_s']:,} | {r['peak_mb']:,} MB |"
            for r in building
        ]
    if memory:
        lines += ["", "| memory of building | peak |", "|---|---|"]
        lines += [f"| {r['case'].removeprefix('memory of building, ')} | {r['peak_mb']:,} MB |" for r in memory]
    return "\n".join([*lines, "", f"The exact counts take {body['counts_bytes_per_cell']} bytes a cell."])


def make_spatial_table() -> str:
    """Return the tables of the spatial commands."""
    rows = {r["case"]: r for r in json.loads((RESULTS / "spatial.json").read_text())["rows"]}
    lines = ["| one thread, seconds of the processor | ours | peer | ratio |", "|---|---|---|---|"]

    def add(what: str, ours: float, peer: float | None, name: str = "SpaceTravLR") -> None:
        theirs = "– | –" if peer is None else f"{name} {peer:.3g} s | **{peer / ours:.1f}×**"
        lines.append(f"| {what} | {ours:.2g} s | {theirs} |")

    for size in (1000, 10_000, 100_000):
        if (r := rows.get(f"spatial {size}")) is None:
            continue
        cells = f"{size:,} cells"
        add(f"derivatives of a target with 421 modulators, {cells}", r["splash_cpu"], r.get("peer_splash_cpu"))
        if "received_exact_cpu" in r:
            add(f"100 received ligands, `exact`, {cells}", r["received_exact_cpu"], r["peer_received_cpu"])
            add(f"100 received ligands, `fast`, {cells}", r["received_fast_cpu"], r["peer_received_cpu"])
        if "perturb_derivative_cpu" in r:
            kind = "exact sums" if r["kernel_error_bound"] == 0 else "fast sums"
            for response in ("derivative", "exact"):
                peer = r.get("peer_perturb_cpu") if response == "derivative" else None
                what = f"a knockout, 3 hops, 50 targets, 468 genes, `{response}`, {kind}, {cells}"
                add(what, r[f"perturb_{response}_cpu"], peer)
        if "perturb_fast_cpu" in r:
            what = f"a knockout, 3 hops, 50 targets, 468 genes, `derivative`, fast sums, {cells}"
            add(what, r["perturb_fast_cpu"], r["peer_perturb_cpu"])
    r = rows["spatial received"]
    add("16 received ligands, `fast`, 100,000 cells", r["ours_cpu"], None)
    r = rows["spatial fit"]
    add("`fit` of 200 targets × 2,000 cells × 5 clusters, whole command", r["ours_cpu"], None)
    r = rows["spatial solver"]
    add("the regressions of 20 targets × 5 clusters alone", r["ours_cpu"], r.get("peer_cpu"), "group-lasso")
    screens = sorted((r for c, r in rows.items() if c.startswith("spatial screen")), key=lambda r: r["size"][1])
    lines += [
        "",
        "| screen of 10,000 cells, 50 targets, 4 hops | wall | processor | a knockout | cores in use "
        "| peak of a process |",
        "|---|---|---|---|---|---|",
        *(
            f"| {s['size'][1]:,} knockouts, {w} worker{'s' if w > 1 else ''} | {s[f'seconds_{w}']:.0f} s "
            f"| {s[f'cpu_{w}']:.0f} s | {1e3 * s[f'cpu_{w}'] / s['size'][1]:.0f} ms | {s[f'processors_{w}']:.2f} "
            f"| {s[f'peak_mb_{w}']:.0f} MB |"
            for s in screens
            for w in (1, 2)
        ),
    ]
    return "\n".join(lines)


def make_train_table() -> str:
    """Return the table of training speed."""
    body = json.loads((RESULTS / "train.json").read_text())
    lines = [
        "| training on this CPU, float32, 2 threads | ours | STATE | ratio (lowest to highest) |",
        "|---|---|---|---|",
    ]
    notes = []
    memory = [r for r in body["rows"] if "peak_mb" in r]
    for r in body["rows"]:
        if "spread" not in r:
            continue
        low, high = r["spread"]
        if "ours_ms" in r:
            ours, peer = f"{r['ours_ms']:.0f} ms", f"{r['peer_ms']:.0f} ms"
        else:
            ours, peer = f"{r['ours_cells_per_s']:,} cells/s", f"{r['peer_cells_per_s']:,} cells/s"
            notes.append(
                f"From files: first step after {r['ours_first_step_s']} s and {r['peer_first_step_s']} s, peak memory "
                f"{r['ours_peak_mb']:,} MB and {r['peer_peak_mb']:,} MB; {r['peer']}."
            )
        lines.append(f"| {r['case']} | {ours} | {peer} | **{r['ratio']:.2f}×** ({low:.2f} to {high:.2f}) |")
    if memory:
        notes += ["", "| whole process, imports and compilation included | peak memory | wall |", "|---|---|---|"]
        notes += [f"| {r['case']} | {r['peak_mb']:,} MB | {r['seconds']:.0f} s |" for r in memory]
    for r in body["rows"]:
        if "wait_share" in r:
            notes += ["", f"Share of a step that waits for cells, {r['case']}: {r['wait_share']:.1%}."]
    return "\n".join([*lines, "", *notes])


def make_models_table() -> str:
    """Return the table of models on held-out groups."""
    body = json.loads((RESULTS / "models.json").read_text())
    lines: list[str] = []

    def show(row: dict, metric: str) -> str:
        half = row[f"{metric}_half"]
        return f"{row[metric]:.3f}" + (f" ± {half:.3f}" if half is not None else "")

    for table in dict.fromkeys(r["table"] for r in body["rows"]):
        rows = [r for r in body["rows"] if r["table"] == table]
        lines += [
            "",
            f"**{table[0].upper()}{table[1:]}** ({rows[0]['rounds']} rounds):",
            "",
            "| model | PDS | Pearson Δ | MAE | PDS gained over perturbation-mean, round by round |",
            "|---|---|---|---|---|",
        ]
        for r in rows:
            gain = f"{r['pds_gain']:+.3f} ± {r['pds_gain_half']:.3f}" if r.get("pds_gain_half") is not None else ""
            lines.append(f"| {r['model']} | {' | '.join(show(r, m) for m in METRICS)} | {gain} |")
    return "\n".join(lines[1:])


def make_summary() -> str:
    """Return the README's table: one row for each thing that people ask about, from the committed results."""

    def read(name: str) -> list[dict]:
        return json.loads((RESULTS / f"{name}.json").read_text())["rows"]

    lines = ["| | vcelltools | peer | ratio |", "|---|---|---|---|"]
    for r in read("hvg"):
        if r["case"] in ("csr", "gzip", "dense"):
            size = f"{r['case']}, {r['cells']:,} × {r['genes']:,}"
            ours = f"{r['ours_s']:.1f} s, {r['ours_peak_mb']:,} MB"
            peer = f"scanpy 1.11.5: {r['scanpy_s']:.0f} s, {r['scanpy_peak_mb']:,} MB"
            lines.append(f"| `hvg`, {size} | {ours} | {peer} | **{r['ratio']:.1f}×** |")
    for r in read("score"):
        if "ratio" not in r or r["case"].endswith("both ends"):
            continue
        if r["case"].startswith("score26"):
            what, peer = f"`score`, 2026 rules, {r['size'][1]:,} × {r['size'][2]:,}", "cell-eval2 0.20.0"
        elif r["case"].startswith("de "):
            what, peer = f"`de`, {r['size'][0]} perturbations × {r['size'][3]:,} genes, in memory", "illico 0.6.0"
        else:
            what = f"`score`, profile {r['case'].split()[-1]}, {r['size'][0]} perturbations × {r['size'][3]:,} genes"
            peer = "cell-eval 0.8.2"
        ours, theirs = f"{r['ours_seconds']:.1f} s", f"{peer}: {r['peer_seconds']:.0f} s"
        lines.append(f"| {what} | {ours} | {theirs} | **{r['ratio']:.1f}×** |")
    for r in read("store"):
        if r["case"] in ("vcelltools: runs, warm, fresh arrays", "vcelltools: blocks, cold"):
            ratios = r["ratios"]
            name, ratio = next((k, v) for k, v in ratios.items() if k == "annbatch")
            what = r["case"].removeprefix("vcelltools: ")
            lines.append(
                f"| reading a store, {what} | {r['cells_per_s']:,} cells/s | {name} 0.3.1 | **{ratio:.1f}×** |"
            )
    for r in read("train"):
        if r["case"].startswith("from files"):
            ours, peer = f"{r['ours_cells_per_s']:,} cells/s", f"{r['peer']}: {r['peer_cells_per_s']:,} cells/s"
            lines.append(f"| training {r['case']} | {ours} | {peer} | **{r['ratio']:.1f}×** |")
    return "\n".join(lines)


TABLES = {
    "atlas": make_atlas_table,
    "summary": make_summary,
    "models": make_models_table,
    "train": make_train_table,
    "spatial": make_spatial_table,
    "hvg": make_hvg_table,
    "cold": make_cold_table,
    "kernels": make_kernel_table,
    "kolf": make_kolf_projection,
    "score": make_score_table,
    "store": make_store_table,
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def write_tables() -> None:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in the README and the docs."""
    for page in PAGES:
        text = page.read_text()
        for name, make in TABLES.items():
            start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
            if start in text:
                before, _, rest = text.partition(start)
                _, _, after = rest.partition(end)
                text = f"{before}{start}{make()}\n{end}{after}"
        page.write_text(text)


def main() -> None:
    """Dispatch."""
    match sys.argv[1:]:
        case ["fold", path]:
            fold(path)
        case ["tables"]:
            write_tables()
        case ["compare", folder]:
            sys.exit(compare(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
