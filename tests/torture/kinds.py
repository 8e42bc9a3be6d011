"""Drills on kinds of faults that no damaged byte shows: identity, overwriting, names, caches, options."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import typing
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.torture.common import Drill, rounds, run_command, write_source

G = 24  # genes of the small sources


def _make_cells(rng: np.random.Generator, n: int = 90) -> Any:
    """Return a small screen."""
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    obs = pd.DataFrame(
        {"pert": np.resize(["ctrl", "A", "B"], n), "line": np.resize(["L1", "L2"], n)},
        index=[f"c{i}" for i in range(n)],
    )
    X = sparse.csr_matrix(rng.poisson(rng.gamma(1.0, 2.0, G), (n, G)).astype(np.float32))
    adata = ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(G)]))
    adata.layers["other"] = sparse.csr_matrix(rng.poisson(3.0, (n, G)).astype(np.float32))
    return adata


def _give(adata: Any, path: Path, kind: str) -> Any:
    """Write the cells as a source of a kind; return what is opened."""
    if kind == "memory":
        return adata
    if path.is_dir():
        shutil.rmtree(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(path) if kind == "zarr" else adata.write_h5ad(path)
    return path


def _change(adata: Any, rng: np.random.Generator) -> str:
    """Change the content of a source, its shape and its names kept where that can be; return what was done."""
    what = str(rng.choice(["values", "order", "labels", "genes"]))
    if what == "values":
        adata.X = adata.X.copy()
        adata.X.data = rng.permutation(adata.X.data)
    elif what == "order":
        order = rng.permutation(adata.n_obs)
        adata.X = adata.X[order]
        adata.obs = adata.obs.iloc[order]
    elif what == "labels":
        adata.obs["pert"] = rng.permutation(adata.obs["pert"].to_numpy())
    else:
        adata.X = adata.X[:, rng.permutation(G)]
    return what


def swap_sources(work: Path, seconds: float, seed: int) -> Drill:
    """Change a source between two steps: what is derived is that of the source that is there, or refused."""
    import vcelltools as vc
    from vcelltools.errors import VcellError
    from vcelltools.selection.hvg import compute_hvg

    drill = Drill("sources changed between two steps")
    rng = np.random.default_rng(seed)
    build = {"pert_col": "pert", "control": "ctrl", "cell_line_col": "line", "basis": [f"G{i}" for i in range(10)]}
    for number in rounds(seconds):
        here = work / f"swap-{number}"
        here.mkdir()
        kind = str(rng.choice(["h5ad", "zarr", "memory"]))
        adata = _make_cells(rng)
        source = _give(adata, here / f"x.{kind}", kind)
        what = "nothing"
        step = str(rng.choice(["statistics", "store", "library sizes", "prediction", "truth pack"]))
        try:
            compute_hvg(source, top=8, stats_dpath=here / "S")
            vc.build_store(source, out=here, name="s", **build)
            vc.score(_log(adata), _log(adata), pert_col="pert", control="ctrl", profile="minimal",
                     truth_pack=here / "t.pack")  # fmt: skip
            what = _change(adata, rng)
            source = _give(adata, here / f"x.{kind}", kind)
            drill.add("changes")
            said = _use(step, source, adata, here, build)
        except VcellError as e:
            said = None if drill.counts.get("changes", 0) > number else f"before the change: {e}"
            drill.add("refused")
        except Exception as e:
            said = f"{type(e).__name__}: {e}"
        if said:
            drill.failures.append(f"round {number} ({kind}, {what} changed, {step}): {said}")
        shutil.rmtree(here)
    return drill


def _log(adata: Any) -> Any:
    out = adata.copy()
    del out.layers["other"]
    dense = out.X.toarray()
    out.X = np.log1p(1e4 * dense / np.maximum(dense.sum(1, keepdims=True), 1)).astype(np.float32)
    return out


def _use(step: str, source: Any, adata: Any, here: Path, build: dict[str, Any]) -> str | None:
    """Use what was derived from the source before it changed; return what is wrong with the result."""
    import vcelltools as vc
    from vcelltools.prediction.genes_outside import make_panel, open_source, read_cells
    from vcelltools.selection.hvg import compute_hvg

    if step == "statistics":
        got = compute_hvg(source, top=8, stats_dpath=here / "S")
        want = compute_hvg(adata, top=8)
        return None if list(got.order) == list(want.order) else "the genes are those of the first data"
    if step == "truth pack":
        pack, truth, pred = here / "t.pack", _log(adata), _log(adata)
        vc.score(pred, truth, pert_col="pert", control="ctrl", profile="minimal", truth_pack=pack)
        return "a pack of another truth was used"
    if step == "prediction":
        store = vc.open_store(here / "s")
        with open_source(store, None) as opened:
            read_cells(store, opened, make_panel(store, opened), np.arange(20))
        return "cells of another source were read for a prediction"
    more = {"stats": here / "S"} if step == "library sizes" else {}
    vc.build_store(source, out=here, name="s", force=True, **more, **build)
    store = vc.open_store(here / "s")
    rows = store.source_rows
    if not vc.verify_store(store.path).ok:
        return "the store is not whole"
    if not np.array_equal(store.counts(np.arange(store.n_cells)).toarray(), adata.X.toarray()[rows, :10]):
        return "the store mixes two sources"
    if not np.array_equal(np.asarray(store.library_size), np.asarray(adata.X.sum(1)).ravel()[rows]):
        return "the library sizes are those of another source"
    labels = store.runs.loc[np.searchsorted(store.runs["start"], np.arange(store.n_cells), "right") - 1, "perturbation"]
    return None if labels.tolist() == adata.obs["pert"].iloc[rows].tolist() else "labels of another source"


def overwrite(work: Path, seconds: float, seed: int) -> Drill:
    """Name inputs and the user's own files as outputs, with and without --force: none of them changes."""
    drill = Drill("outputs that name inputs or foreign files")
    rng = np.random.default_rng(seed)
    write_source(work)
    _make_cells(rng).write_h5ad(work / "small.h5ad")
    (work / "basis.txt").write_text("".join(f"G{i}\n" for i in range(10)))
    (work / "perts.csv").write_text("target_gene,n_cells\nA,5\n")
    (work / "thesis").mkdir()
    heads = {"thesis/ch1.txt": b"mine", "photo.png": b"\x89PNG\r\n\x1a\n", "settings.toml": b"[mine]",
             "old.h5ad": b"\0", "page.html": b"<!doctype html>", "data.parquet": b"\0"}  # fmt: skip
    for name, head in heads.items():
        (work / name).write_bytes(head + b"\nmine\n")
    (work / "link.h5ad").symlink_to("small.h5ad")
    os.link(work / "small.h5ad", work / "hard.txt")
    labels = ("--pert-col", "pert", "--control", "ctrl")
    commands = [
        (("hvg", "small.h5ad", "--top", 5), "--out"), (("hvg", "small.h5ad", "--top", 5), "--plot"),
        (("hvg", "small.h5ad", "--top", 5), "--stats"), (("normalize", "small.h5ad"), "--out"),
        (("convert", "small.h5ad"), "--out"), (("sample", "small.h5ad", "-n", 9), "--out"),
        (("basis", "small.h5ad", "--top", 5), "--out"), (("de", "small.h5ad", *labels), "--out"),
        (("qc", "small.h5ad"), "--out"), (("qc", "small.h5ad"), "--write"), (("init", "."), "--out"),
        (("build-store", "small.h5ad", "--basis", "basis.txt", *labels, "--name", "thesis"), "--out"),
        (("build-store", "small.h5ad", "--basis", "basis.txt", *labels, "--name", "x"), "--out"),
        (("baseline", "--truth", "small.h5ad", *labels), "--out"),
        (("simulate", "--cells", 50, "--genes", 100), "--out"), (("demo", "--quick"), "--dir"),
    ]  # fmt: skip
    # with --force a file is replaced by one of its kind, where the command does not read it: that is what it is for
    own = ("small.h5ad", "link.h5ad", "hard.txt", "thesis", "thesis/ch1.txt", "photo.png", "settings.toml", "page.html",
           "old.h5ad", "data.parquet", ".", "./thesis/../small.h5ad")  # fmt: skip
    for number in rounds(seconds, 2):
        words, option = commands[number] if number < len(commands) else commands[rng.integers(len(commands))]
        path = str(rng.choice(own))
        force = ["--force"] if rng.random() < 0.8 else []
        before = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
        json_ = [] if words[0] == "demo" else ["--json"]
        code, _, err = run_command(work, [*words, option, path, *force, *json_])
        drill.add("outputs")
        after = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
        changed = sorted(p.name for p in before if after.get(p) != before[p])
        alike = {"thesis/ch1.txt": {"ch1.txt"}, "photo.png": {"photo.png"} if option == "--plot" else set()}
        if words[0] == "simulate":  # the one command here that writes an h5ad and reads none
            both = {"small.h5ad", "link.h5ad"}
            alike |= dict.fromkeys(("small.h5ad", "link.h5ad", "./thesis/../small.h5ad"), both)
        if not set(changed) <= (alike.get(path, set()) if force else set()):
            drill.failures.append(f"{words} {option} {path} {force}: exit status {code}, changed {changed}")
        if code not in (0, 2, 3, 4):
            drill.failures.append(f"{words} {option} {path} {force}: exit status {code}: {err[-300:]}")
        for p in set(after) - set(before):
            p.unlink()
        for p, raw in before.items():
            if after.get(p) != raw:
                p.parent.mkdir(exist_ok=True)
                p.write_bytes(raw)
    return drill


PIECES = [
    "TP53", "tp53", "A", "a", " A", "A ", "nan", "", "ctrl ", "a|b", "a | b", "x/y", "..", "#h", '"q"', "l\nb", "\x85",
    "\u2028x", "\x1b[31m", "\u202e", "é", "e\u0301", "µ", "μ", "日本", "🧬", "\u200b", "[1]", "a,b", "a=b", "0",
    "1.0", "x" * 300, "'", "\\", "%s", "{}", "_index", "source_row", "None", "True",
]  # fmt: skip


def name_things(work: Path, seconds: float, seed: int) -> Drill:
    """Give labels, genes, cells and columns odd and nearly equal names: they come back as they are, or are refused."""
    from vcelltools.errors import VcellError

    drill = Drill("odd and nearly equal names")
    rng = np.random.default_rng(seed)
    for number in rounds(seconds):
        here = work / f"names-{number}"
        here.mkdir()
        adata = _make_cells(rng)
        labels = ["ctrl", *rng.choice(PIECES, 3).tolist()]
        adata.obs["pert"] = np.resize(np.array(labels, object), adata.n_obs)
        genes = [*rng.choice([p for p in PIECES if p], 5, replace=False).tolist(), *(f"G{i}" for i in range(G - 5))]
        adata.var_names = genes
        column = str(rng.choice([p for p in PIECES if p and "/" not in p and p != "_index"]))
        adata.obs[column] = np.arange(adata.n_obs)
        drill.add("names", len(labels) + 6)
        try:
            adata.write_h5ad(here / "x.h5ad")
        except Exception:  # anndata's own limits
            drill.add("not written by anndata")
            continue
        try:
            said = _carry(adata, here, labels, genes, column)
        except VcellError as e:
            drill.add("refused")
            said = None if str(e).strip() else "an error without a word"
        except Exception as e:
            said = f"{type(e).__name__}: {e}"
        if said:
            drill.failures.append(f"round {number} ({labels!r}, {genes[:5]!r}, {column!r}): {said}")
        shutil.rmtree(here)
    return drill


def _carry(adata: Any, here: Path, labels: list[str], genes: list[str], column: str) -> str | None:
    """Take a file with odd names through convert, hvg, build-store and de; return what is lost."""
    import anndata as ad

    import vcelltools as vc
    from vcelltools.io.table import tidy
    from vcelltools.names import read_lines, write_lines
    from vcelltools.selection.hvg import compute_hvg

    vc.convert(here / "x.h5ad", here / "c.h5ad", layout="csc")
    back = ad.read_h5ad(here / "c.h5ad")
    if back.var_names.tolist() != genes or back.obs["pert"].tolist() != adata.obs["pert"].tolist():
        return "convert changed names"
    if column not in back.obs or back.obs[column].tolist() != adata.obs[column].tolist():
        return "convert lost a column"
    ranked = compute_hvg(here / "x.h5ad", top=G)
    (here / "h.txt").write_text(write_lines(str(ranked.genes[j]) for j in ranked.order), encoding="utf-8")
    if sorted(read_lines((here / "h.txt").read_text(encoding="utf-8"))) != sorted(genes):
        return "a list of genes does not give the names back"
    want = sorted({t for v in labels if (t := tidy(v)) is not None and t != "ctrl"})
    if sorted(vc.de(here / "x.h5ad", pert_col="pert", control="ctrl").perturbations) != want:
        return "de tests other perturbations than there are"
    vc.build_store(here / "x.h5ad", basis=here / "h.txt", out=here, name="s", pert_col="pert", control="ctrl")
    store = vc.open_store(here / "s")
    if not vc.verify_store(here / "s").ok:
        return "the store is not whole"
    if sorted(set(store.runs["perturbation"]) - {"ctrl"}) != want:
        return "the store has other perturbations"
    order = [genes.index(g) for g in store.genes]
    rows = store.source_rows
    if not np.array_equal(store.counts(np.arange(store.n_cells)).toarray(), adata.X.toarray()[rows][:, order]):
        return "the store has other counts"
    return None


def damage_caches(work: Path, seconds: float, seed: int) -> Drill:
    """Cut, empty, fill and lock files of numba's cache: the same genes, and never an error."""
    drill = Drill("damaged caches of compiled kernels")
    rng = np.random.default_rng(seed)
    _make_cells(rng, 300).write_h5ad(work / "x.h5ad")
    whole = work / "whole"
    env = {"NUMBA_CACHE_DIR": str(whole)}
    _copy_cache(whole)
    words = ("hvg", "x.h5ad", "--top", 8, "--out", "h.txt", "--force", "-q")
    code, _, err = run_command(work, words, env=env)
    want = (work / "h.txt").read_text() if not code else err
    if code:
        drill.failures.append(f"without damage: exit status {code}: {want[-300:]}")
        return drill
    used = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file() and p.stat().st_atime_ns]
    if not used:
        drill.failures.append("no file of the cache was read")
        return drill
    for number in rounds(seconds, 2):
        cache = work / f"cache-{number}"
        shutil.copytree(whole, cache)
        files = [cache / p for p in used]
        how = str(rng.choice(["empty", "cut", "bits", "junk", "other file", "folder", "owner", "open", "read-only"]))
        for path in rng.choice(np.array(files, object), min(len(files), int(rng.integers(1, 9))), replace=False):
            _damage_cache(path, how, files, rng)
        drill.add("caches damaged")
        (work / "h.txt").unlink()
        for again in range(2):
            code, _, err = run_command(work, words, env={"NUMBA_CACHE_DIR": str(cache)})
            if code or (work / "h.txt").read_text() != want:
                drill.failures.append(f"{how}, run {again + 1}: exit status {code}: {err[-300:]}")
                break
        for p in (cache, *cache.rglob("*")):
            p.chmod(0o700)
        shutil.rmtree(cache)
        if not (work / "h.txt").exists():
            (work / "h.txt").write_text("")
    return drill


def _copy_cache(whole: Path) -> None:
    """Start with the kernels that are compiled already; a file that is read afterwards has a time of access."""
    from vcelltools.kernels import cache

    with mock.patch.dict(os.environ, NUMBA_CACHE_DIR=str(whole)):
        target, _ = cache.choose_folder()
    known = cache.get_folder()
    if target is None or known is None:
        return
    for path in known.iterdir():
        if path.is_file() and path.suffix != ".pyc":
            copy = Path(shutil.copy2(path, target))
            os.utime(copy, ns=(0, path.stat().st_mtime_ns))


def _damage_cache(path: Path, how: str, files: list[Path], rng: np.random.Generator) -> None:
    if not path.is_file():
        return
    raw = bytearray(path.read_bytes())
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(raw[: int(rng.integers(len(raw) + 1))])
    elif how == "bits" and raw:
        for _ in range(3):
            raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
    elif how == "junk":
        path.write_bytes(rng.bytes(200))
    elif how == "other file":
        other = files[int(rng.integers(len(files)))]
        path.write_bytes(other.read_bytes() if other.is_file() else b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "owner" and os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    elif how == "open":
        path.chmod(0o666)
        path.parent.chmod(0o777)
    elif how == "read-only":
        path.chmod(0o400)
        path.parent.chmod(0o500)


VALUES = [
    "nan", "inf", "-inf", "1e300", "-1", "0", "1e-320", "", " ", "1e400", "18446744073709551616", "٣", "1_0", "0x10",
    "x",
]  # fmt: skip


def give_options(work: Path, seconds: float, seed: int) -> Drill:
    """Give every number of every command odd values: a clean refusal, or a result of finite numbers."""
    drill = Drill("odd values of options")
    rng = np.random.default_rng(seed)
    _make_cells(rng).write_h5ad(work / "x.h5ad")
    (work / "basis.txt").write_text("".join(f"G{i}\n" for i in range(10)))
    labels = ("--pert-col", "pert", "--control", "ctrl")
    base = {
        "hvg": ("hvg", "x.h5ad", "--top", 5, "--out", "h.txt"),
        "normalize": ("normalize", "x.h5ad", "--out", "o.h5ad"),
        "sample": ("sample", "x.h5ad", "-n", 5, "--out", "o.h5ad"),
        "simulate": ("simulate", "--cells", 50, "--genes", 100, "--out", "o.h5ad"),
        "basis": ("basis", "x.h5ad", "--top", 5, "--out", "b.txt"),
        "build-store": ("build-store", "x.h5ad", "--basis", "basis.txt", *labels, "--name", "s"),
        "de": ("de", "x.h5ad", *labels, "--out", "d.csv"),
        "score": ("score", "x.h5ad", "--truth", "x.h5ad", *labels, "--out", "sc"),
        "qc": ("qc", "x.h5ad", "--out", "q.parquet"),
    }
    options = [(c, flag) for c in base for flag in _list_numbers(c)]
    for _ in rounds(seconds):
        command, flag = options[int(rng.integers(len(options)))]
        value = str(rng.choice(VALUES))
        code, out, err = run_command(work, [*base[command], f"{flag}={value}", "--force", "--json"])
        drill.add("options")
        drill.add("refused" if code else "taken")
        if code not in (0, 2, 3, 4) or "Traceback" in err:
            drill.failures.append(f"{command} {flag}={value!r}: exit status {code}: {err[-300:]}")
        try:
            body = json.loads(out)
        except ValueError:
            drill.failures.append(f"{command} {flag}={value!r}: --json gave {out[:100]!r}")
            continue
        if (code != 0) != ("error" in body):
            drill.failures.append(f"{command} {flag}={value!r}: exit status {code} with {out[:100]!r}")
    return drill


def _list_numbers(command: str) -> list[str]:
    """Return the flags of a command that take a number."""
    from typer.main import get_command

    from vcelltools.cli.main import COMMANDS, make_app

    module, function, _ = COMMANDS[command]
    found = getattr(importlib.import_module(f"vcelltools.cli.{module}"), function)
    hints = typing.get_type_hints(found)
    numbers = set()
    for name in inspect.signature(found).parameters:
        kinds = {hints[name], *typing.get_args(hints[name])}
        if kinds & {float, int} and bool not in kinds:
            numbers.add(name)
    app: Any = get_command(make_app(command))
    params = (app.commands[command] if hasattr(app, "commands") else app).params
    return [max(p.opts, key=len) for p in params if p.name in numbers and p.opts[0].startswith("-")]
