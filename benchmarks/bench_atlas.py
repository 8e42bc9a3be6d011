"""Merging an atlas, dense batch files and single cells, beside what public scripts do, in one run.

    python -m benchmarks.bench_atlas [--rounds 1] [--files 8] [--cells 2676] [--four-times]

The files are made of the cells of the stand-in's first release (36,601 genes, 2,156 genes a cell), drawn with
replacement: 8 files of 2,676 cells, 46 M non-zeros. Every case is a process of its own, timed from outside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import DATA, OURS, ROOT, save, take_turns, touch

STANDIN = ROOT.parent / "shared" / "data" / "scbasecount_standin" / "bucket" / "arc-scbasecount" / "2025-02-25"
SEED = 0


def make_atlas(dpath: Path, n_files: int, n_cells: int, layout: str) -> Path:
    """Write the layout of scBaseCount and fetch it, so that ``dpath/a`` is what ``atlas merge`` takes."""
    import anndata as ad
    from scipy import sparse

    from tests.atlases import write_atlas
    from vcelltools.atlas import Choice, fetch, open_source

    done = dpath / "a" / "manifest.json"
    if done.exists():
        return dpath
    parts = [ad.read_h5ad(p) for p in sorted(STANDIN.rglob("*.h5ad"))]
    parts = [p for p in parts if p.n_vars == max(q.n_vars for q in parts)]
    X = sparse.vstack([p.X.tocsr() for p in parts]).tocsr()
    rng = np.random.default_rng(SEED)
    experiments = {}
    for k in range(n_files):
        cells = X[np.sort(rng.integers(0, X.shape[0], n_cells))]
        cells = sparse.csr_matrix(cells) if layout == "csr" else sparse.csc_matrix(cells)
        obs = {"gene_count": np.diff(cells.tocsr().indptr), "umi_count": np.asarray(cells.sum(1)).ravel()}
        names = [f"BC{i:06d}" for i in range(n_cells)]
        import pandas as pd

        experiments[f"SRX{k:04d}"] = ad.AnnData(cells, pd.DataFrame(obs, index=names), parts[0].var[["gene_symbols"]])
    write_atlas(dpath / "src", experiments, compression="gzip")  # as the public files are
    fetch(open_source(str(dpath / "src")), Choice(all=True), dpath / "a")
    return dpath


PEERS = {
    "concat": """
import sys, anndata as ad, warnings
warnings.simplefilter("ignore")
out, *files = sys.argv[1:]
parts = [ad.read_h5ad(f) for f in files]
ad.concat(parts, join="outer", fill_value=0, index_unique=":").write_h5ad(out)
""",
    "concat_on_disk": """
import sys, warnings
warnings.simplefilter("ignore")
from anndata.experimental import concat_on_disk
out, *files = sys.argv[1:]
concat_on_disk(dict(enumerate(files)), out, join="outer", fill_value=0, index_unique=":")
""",
    "dense": """
import sys, anndata as ad, h5py, numpy as np, warnings
warnings.simplefilter("ignore")
out, *files = sys.argv[1:]
genes = sorted(set().union(*(ad.read_h5ad(f, backed="r").var_names for f in files)))
parts = [ad.read_h5ad(f) for f in files]
X = ad.concat(parts, join="outer", fill_value=0)[:, genes].X.toarray().astype(np.int16)
with h5py.File(out, "w") as f:
    f.create_dataset("X", data=X, compression="gzip", compression_opts=4)
    f.create_dataset("genes", data=np.array(genes, "S"))
""",
}
ONE_OPEN_A_CELL = """
import sys, h5py, numpy as np, time
path, n = sys.argv[1], int(sys.argv[2])
with h5py.File(path) as f:
    total = f["X"].shape[0]
at = np.random.default_rng(0).integers(0, total, n)
began = time.perf_counter()
for i in at:
    with h5py.File(path) as f:
        f["X"][i].astype(np.float32)
print(n / (time.perf_counter() - began))
"""
OUR_CELLS = """
import sys, numpy as np, time, vcelltools as vc
path, n, genes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cells = vc.CellDataset(path)
if genes:
    cells = vc.CellDataset(path, genes=cells.genes[:: max(1, len(cells.genes) // genes)][:genes])
rng = np.random.default_rng(0)
batches = [rng.integers(0, len(cells), 256) for _ in range(n // 256)]
cells.__getitems__(batches[0].tolist())
began = time.perf_counter()
for b in batches:
    cells.take(b, threads=2) if len(sys.argv) > 4 else cells.__getitems__(b.tolist())
print(256 * len(batches) / (time.perf_counter() - began))
"""


def clean(path: Path) -> str:
    return f"rm -rf {path}; "


def run_rate(code: str, *args: object) -> float:
    touch()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--cells", type=int, default=2676)
    parser.add_argument("--layout", default="csr", choices=["csr", "csc"])
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--four-times", action="store_true", help="merge four times the cells too: its memory")
    a = parser.parse_args()
    d = DATA / f"atlas_{a.files}x{a.cells}_{a.layout}"

    def make(folder: Path, cells: int) -> None:  # in a process of its own: what this one holds would count as a peak
        code = (
            f"from benchmarks.bench_atlas import *; make_atlas(Path({str(folder)!r}), {a.files}, {cells}, {a.layout!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

    make(d, a.cells)
    files = sorted(str(p) for p in (d / "a" / "raw").glob("*.h5ad"))
    shell = ["bash", "-c"]

    def ours(fmt: str, out: Path, source: Path = d) -> list[str]:
        words = " ".join([*OURS, "atlas", "merge", str(source / "a"), "--format", fmt, "--out", str(out), "-q"])
        return [*shell, clean(out) + "exec " + words]

    def peer(name: str, out: Path) -> list[str]:
        script = d / f"{name}.py"
        script.write_text(PEERS[name])
        return [*shell, clean(out) + "exec " + " ".join([sys.executable, str(script), str(out), *files])]

    commands = {
        "peer concat": peer("concat", d / "p1.h5ad"),
        "peer concat_on_disk": peer("concat_on_disk", d / "p2.h5ad"),
        "ours h5ad": ours("h5ad", d / "m.h5ad"),
    }
    if not a.skip_dense:
        commands |= {"peer dense": peer("dense", d / "p3.h5"), "ours batches": ours("batches", d / "batches")}
    if a.four_times:
        large = DATA / f"atlas_{a.files}x{4 * a.cells}_{a.layout}"
        make(large, 4 * a.cells)
        commands["ours h5ad, four times the cells"] = ours("h5ad", large / "m.h5ad", large)
    timings = take_turns(commands, a.rounds)
    case = f"{a.files} files × {a.cells:,} cells, {a.layout}"
    rows = []
    for name, t in timings.items():
        rows.append({"case": f"{case}: {name}", "seconds": round(t.wall, 2), "peak_mb": round(t.peak_mb)})
    if not a.skip_dense:
        first = sorted((d / "batches").glob("*.h5"))[0]
        rates = {
            "peer one open a cell (batch file)": run_rate(ONE_OPEN_A_CELL, d / "p3.h5", 48),
            "ours batch file": run_rate(OUR_CELLS, first, 2048, 0),
            "ours h5ad, all genes": run_rate(OUR_CELLS, d / "m.h5ad", 8192, 0),
            "ours h5ad, 2,000 genes": run_rate(OUR_CELLS, d / "m.h5ad", 1 << 17, 2000),
            "ours h5ad, 2,000 genes, take": run_rate(OUR_CELLS, d / "m.h5ad", 1 << 17, 2000, "take"),
        }
        rows += [{"case": f"{case}: {k}", "cells_per_second": round(v, 1)} for k, v in rates.items()]
    save("atlas", rows, measured=time.strftime("%Y-%m-%d"))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
