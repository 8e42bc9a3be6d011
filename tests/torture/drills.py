"""The drills: each runs for a number of seconds and returns counts, and what it found wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.torture.common import LEAST, ROOT, Drill, rounds, run_command, write_source
from tests.torture.kinds import damage_caches, give_options, name_things, overwrite, swap_sources
from tests.torture.spatial import damage_runs, kill_spatial


def mutate_files(work: Path, seconds: float, seed: int) -> Drill:
    """Damage data files; the readers and hvg answer as a naive reader does, or refuse."""
    from tests.fuzz.harness import run

    report = run(seed=seed, seconds=seconds, least=LEAST)
    drill = Drill("damaged files", {"files mutated": report.n, **dict(report.outcomes)})
    drill.failures = report.list_failures()
    return drill


def kill_builds(work: Path, seconds: float, seed: int) -> Drill:
    """SIGKILL build-store at its steps: what stands at the name is whole, and a resume gives the same bytes."""
    drill = Drill("build-store, SIGKILL at steps")
    began, stride = time.monotonic(), 40 if seconds < 30 else 9
    for layout in ("csr", "csc"):
        if layout == "csc" and time.monotonic() - began > seconds / 2:
            break
        folder = work / f"kills-{layout}"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.kill_walk", layout, str(folder), str(seed % stride), str(stride)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
        if done.returncode:
            drill.failures.append(f"{layout}: {done.stderr[-500:]}")
            continue
        said = json.loads(done.stdout)
        drill.add("kills", said["kills"])
        for what in ("wrong", "half", "left"):
            drill.failures += [f"{layout}: {what} after a kill at step {x}" for x in said[what]]
    return drill


def _write_old(work: Path) -> bytes:
    """Put a small HDF5 file where a command will write, and return its bytes; outputs replace files of a kind alone."""
    import h5py

    kept = work.parent / f"{work.name}-old.h5ad"
    if not kept.exists():
        with h5py.File(kept, "w") as f:
            f["mine"] = np.arange(5)
    raw = kept.read_bytes()
    (work / "out.h5ad").write_bytes(raw)
    return raw


COMMANDS = {
    "normalize": ("normalize", "source.h5ad", "--out", "out.h5ad"),
    "convert": ("convert", "source.h5ad", "--layout", "csc", "--out", "out.h5ad"),
    "sample": ("sample", "source.h5ad", "-n", "2500", "--out", "out.h5ad"),
    "simulate": ("simulate", "--cells", "3000", "--genes", "400", "--perturbations", "5", "--out", "out.h5ad"),
}


def _run(work: Path, name: str, *, kill_after: float | None = None, limit: int | None = None) -> tuple[int, str]:
    """Run a command over an output; return its exit status (negative: the signal) and stderr."""
    code, _, err = run_command(work, [*COMMANDS[name], "--force", "-q"], kill_after=kill_after, limit=limit)
    return code, err


def kill_commands(work: Path, seconds: float, seed: int) -> Drill:
    """SIGKILL commands that overwrite a file: it is the old one or the new one, never anything else."""
    drill = Drill("overwriting, SIGKILL at random moments")
    rng = np.random.default_rng(seed)
    write_source(work)
    took, good = {}, {}
    for number in rounds(seconds):
        name = list(COMMANDS)[number % len(COMMANDS)]
        out = work / "out.h5ad"
        if name not in good:
            began = time.monotonic()
            code, err = _run(work, name)
            took[name], good[name] = time.monotonic() - began, _read(out)
            if code:
                drill.failures.append(f"{name}: {err[-300:]}")
        old = _write_old(work)
        code, err = _run(work, name, kill_after=float(rng.uniform(0.3, 1.05)) * took[name])
        if code == -signal.SIGKILL:
            drill.add("kills")
        elif code:
            drill.failures.append(f"{name}: exit status {code} without a kill: {err[-300:]}")
        if out.read_bytes() != old and _read(out) != good[name]:
            drill.failures.append(f"{name}: after a kill {out.name} is neither the old file nor the new one")
    return drill


def _read(path: Path) -> str:
    """Return a digest of what a file says: matrix, obs and var."""
    import anndata as ad

    adata = ad.read_h5ad(path)
    h = hashlib.sha256(adata.X.toarray().tobytes())
    for frame in (adata.obs, adata.var):
        h.update(frame.to_csv().encode())
    return h.hexdigest()


def fill_disks(work: Path, seconds: float, seed: int) -> Drill:
    """Let the disk run full at any size: exit code 4, the old file untouched, nothing left behind."""
    drill = Drill("full disks")
    rng = np.random.default_rng(seed)
    write_source(work)
    out = work / "out.h5ad"
    for number in rounds(seconds):
        name = list(COMMANDS)[number % len(COMMANDS)]
        old = _write_old(work)
        before = set(os.listdir(work))
        code, err = _run(work, name, limit=int(2 ** rng.uniform(10, 21)))
        if code == 0:
            continue  # the output was smaller than the limit
        drill.add("full disks")
        if code != 4:
            drill.failures.append(f"{name}: exit status {code}, not 4: {err[-300:]}")
        if out.read_bytes() != old:
            drill.failures.append(f"{name}: the old file is gone")
        left = {p for p in set(os.listdir(work)) - before if not p.startswith("out.")}
        if left:
            drill.failures.append(f"{name}: left {sorted(left)}")
    return drill


def _flip_one(files: list[Path], rng: np.random.Generator) -> tuple[Path, bytes, str]:
    """Flip one bit of one of the files: (the file, its bytes before, which bit)."""
    path = files[int(rng.integers(len(files)))]
    raw = path.read_bytes()
    at, bit = int(rng.integers(len(raw))), int(rng.integers(8))
    damaged = bytearray(raw)
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)
    return path, raw, f"{path.name}, byte {at}, bit {bit}"


def flip_bits(work: Path, seconds: float, seed: int) -> Drill:
    """Flip one bit of a store: verify finds it and names the file."""
    import vcelltools as vc
    from tests.screens import BUILD, make_screen, write

    drill = Drill("flipped bits in stores")
    rng = np.random.default_rng(seed)
    source = write(make_screen(), work / "screen.h5ad")
    vc.build_store(source, basis=[f"GENE{i}" for i in range(20)], out=work / "flips", name="s", **BUILD)
    store = work / "flips" / "s"
    files = sorted(p for p in store.iterdir() if p.is_file())
    for _ in rounds(seconds):
        path, raw, where = _flip_one(files, rng)
        drill.add("bit flips")
        found = vc.verify_store(store)
        path.write_bytes(raw)
        if found.ok or not any(path.name in p for p in found.problems):
            drill.failures.append(f"{where}: not found ({found.problems})")
    if not vc.verify_store(store).ok:
        drill.failures.append("the restored store is not whole")
    return drill


def flip_statistics(work: Path, seconds: float, seed: int) -> Drill:
    """Flip one bit of saved statistics: they are refused, or say the same as before."""
    from vcelltools.errors import DataError
    from vcelltools.io import open_dataset
    from vcelltools.selection.statistics import load_statistics, save_statistics, scan

    drill = Drill("flipped bits in statistics")
    rng = np.random.default_rng(seed)
    saved = work / "statistics"
    with open_dataset(write_source(work)) as ds:
        save_statistics(scan(ds, batch_key="batch"), saved)
    files = sorted(saved.iterdir())
    for _ in rounds(seconds):
        path, raw, where = _flip_one(files, rng)
        drill.add("bit flips")
        try:
            load_statistics(saved)
            drill.failures.append(f"{where}: read as if whole")
        except DataError:
            drill.add("refused")
        except Exception as e:
            drill.failures.append(f"{where}: {type(e).__name__}: {e}")
        path.write_bytes(raw)
    load_statistics(saved)
    return drill


def fill_disk_of_builds(work: Path, seconds: float, seed: int) -> Drill:
    """Let the disk run full while a store is replaced: exit code 4, the old store whole."""
    import vcelltools as vc

    drill = Drill("full disks under build-store")
    rng = np.random.default_rng(seed)
    source = write_source(work)
    (work / "basis.txt").write_text("".join(f"GENE{i:05d}\n" for i in range(300)))
    build = ("build-store", source.name, "--basis", "basis.txt", "--name", "s", "--pert-col", "target_gene")
    COMMANDS["build-store"] = (*build, "--control", "non-targeting")
    try:
        code, err = _run(work, "build-store")
        if code:
            drill.failures.append(f"without a limit: exit status {code}: {err[-300:]}")
            return drill
        before = vc.open_store(work / "stores" / "s").sha256
        for _ in rounds(seconds):
            code, err = _run(work, "build-store", limit=int(2 ** rng.uniform(10, 21)))
            if code == 0:
                before = vc.open_store(work / "stores" / "s").sha256
                continue
            drill.add("full disks")
            if code != 4:
                drill.failures.append(f"exit status {code}, not 4: {err[-300:]}")
            if vc.open_store(work / "stores" / "s").sha256 != before or not vc.verify_store(work / "stores" / "s").ok:
                drill.failures.append("the old store is not whole")
    finally:
        del COMMANDS["build-store"]
    return drill


def mutate_containers(work: Path, seconds: float, seed: int) -> Drill:
    """Damage .vcc files: lint always answers."""
    from tests.unit.challenge.test_vcc_container import GENES, make
    from vcelltools.challenge.vcc import lint, prep
    from vcelltools.errors import VcellError

    drill = Drill("damaged containers")
    rng = np.random.default_rng(seed)
    box = work / "vcc"
    box.mkdir()
    (box / "genes.csv").write_text("\n".join(GENES))
    prep(make(box / "p.h5ad"), box / "p.vcc", genes=box / "genes.csv")
    data = (box / "p.vcc").read_bytes()
    for _ in rounds(seconds):
        raw = bytearray(data)
        for at in rng.integers(0, 1024 if rng.random() < 0.5 else len(raw), int(rng.integers(1, 12))):
            raw[at] = rng.integers(0, 256)
        if rng.random() < 0.3:
            raw = raw[: rng.integers(0, len(raw))]
        (box / "x.vcc").write_bytes(bytes(raw))
        drill.add("containers mutated")
        try:
            result = lint(box / "x.vcc", max_bytes=1 << 26)
            drill.add("problems found" if result.problems else "still good")
        except VcellError:
            drill.add("refused")
        except Exception as e:
            (box / "x.vcc").rename(box / f"bug-{drill.counts['containers mutated']}.vcc")
            drill.failures.append(f"container {drill.counts['containers mutated']}: {type(e).__name__}: {e}")
    return drill


# drill -> its share of the time
DRILLS = {
    mutate_files: 0.19,
    kill_builds: 0.10,
    kill_commands: 0.06,
    fill_disks: 0.06,
    fill_disk_of_builds: 0.06,
    flip_bits: 0.05,
    flip_statistics: 0.03,
    mutate_containers: 0.05,
    swap_sources: 0.06,
    overwrite: 0.06,
    name_things: 0.05,
    damage_caches: 0.05,
    give_options: 0.06,
    kill_spatial: 0.06,
    damage_runs: 0.06,
}


def run_all(work: Path, *, seconds: float, seed: int, say=lambda _: None) -> list[Drill]:
    """Run every drill for its share of the time."""
    out = []
    for drill, share in DRILLS.items():
        folder = work / drill.__name__
        folder.mkdir(parents=True)
        began = time.monotonic()
        done = drill(folder, seconds * share, seed)
        done.seconds = time.monotonic() - began
        say(
            f"{done.name}: {', '.join(f'{v:,} {k}' for k, v in done.counts.items())}; "
            f"{len(done.failures)} failures, {done.seconds:.0f} s"
        )
        for line in done.failures[:20]:
            say(f"  {line}")
        if not done.failures:
            shutil.rmtree(folder)
        out.append(done)
    return out
