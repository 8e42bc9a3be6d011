"""10x mtx folders for the fuzzer: written as text, damaged as text, read naively."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np


def write_folder(path: Path, counts: np.ndarray, rng: np.random.Generator) -> None:
    """Write a folder of version 2 (``genes.tsv``) or 3 (``features.tsv.gz``) with the counts, (n, g)."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    n, g = counts.shape
    cells, genes = np.nonzero(counts)
    lines = ["%%MatrixMarket matrix coordinate integer general", "%made for a test", f"{g} {n} {len(cells)}"]
    lines += [f"{j + 1} {i + 1} {counts[i, j]}" for i, j in zip(cells, genes, strict=True)]
    new = rng.random() < 0.5
    features = [f"E{j}\tgene{j}" + ("\tGene Expression" if new else "") for j in range(g)]
    barcodes = [f"AAAC{i}-1" for i in range(n)]
    texts = {"matrix.mtx": lines, "barcodes.tsv": barcodes, "features.tsv" if new else "genes.tsv": features}
    for name, rows in texts.items():
        raw = ("\n".join(rows) + "\n").encode()
        if new:
            (path / f"{name}.gz").write_bytes(gzip.compress(raw, mtime=0))
        else:
            (path / name).write_bytes(raw)


def _load(fpath: Path) -> bytes:
    raw = fpath.read_bytes()
    return gzip.decompress(raw) if fpath.suffix == ".gz" else raw


def _store(fpath: Path, raw: bytes) -> None:
    fpath.write_bytes(gzip.compress(raw, mtime=0) if fpath.suffix == ".gz" else raw)


TOKENS = ["0", "1", "-1", "99", "2147483648", "9223372036854775808", "nan", "inf", "1.5", "1e3", "x", "", "1 1", "%"]


def mutate_folder(path: Path, rng: np.random.Generator) -> list[str]:
    """Apply one to three mutations; return their names."""
    done = []
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        files = sorted(p for p in path.iterdir() if p.is_file())
        if not files:
            break
        fpath = files[int(rng.integers(len(files)))]
        if rng.random() < 0.5:
            fpath = next((p for p in files if p.name.startswith("matrix")), fpath)
        choice = str(rng.choice(["token", "token", "line", "bytes", "absent", "stored", "blank"]))
        done.append(f"mtx-{choice}")
        if choice == "absent":
            fpath.unlink()
            continue
        if choice == "stored":  # the file as it lies, gzip header and all
            fpath.write_bytes(_damage(fpath.read_bytes(), rng))
            continue
        try:
            raw = _load(fpath)
        except (OSError, EOFError, ValueError):
            continue
        except Exception:  # zlib.error, of an earlier mutation
            continue
        lines = raw.split(b"\n")
        at = min(int(rng.integers(min(len(lines), 8) if rng.random() < 0.4 else len(lines))), len(lines) - 1)
        if choice == "token":
            words = lines[at].split()
            if words:
                words[int(rng.integers(len(words)))] = str(rng.choice(TOKENS)).encode()
            lines[at] = (b"\t" if b"\t" in lines[at] else b" ").join(words)
        elif choice == "line":
            other = int(rng.integers(len(lines)))
            lines = lines[:at] + [lines[other]] * int(rng.integers(3)) + lines[at + 1 :]
        elif choice == "blank":
            lines.insert(at, [b"", b"   ", b"%", b"\xff\xfe"][int(rng.integers(4))])
        else:
            lines = _damage(raw, rng).split(b"\n")
        _store(fpath, b"\n".join(lines))
    return done


def _damage(raw: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(raw)
    if out and rng.random() < 0.5:
        out[int(rng.integers(len(out)))] = int(rng.integers(256))
    else:
        del out[int(rng.integers(len(out) + 1)) :]
    return bytes(out)


def read_folder(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return (dense (n, g) float64 values, gene names).

    Raises
    ------
    Exception
        For whatever is wrong.
    """
    found = {p.name.removesuffix(".gz").split(".")[0]: p for p in sorted(path.iterdir(), reverse=True)}
    features = _rows(found.get("features") or found["genes"])
    barcodes = _rows(found["barcodes"])
    lines = _load(found["matrix"]).decode("latin-1").splitlines()
    head = lines[0].lower().split()
    if head[:3] != ["%%matrixmarket", "matrix", "coordinate"] or head[4:] != ["general"]:
        raise ValueError("header")
    if head[3] not in ("integer", "real", "unsigned-integer"):
        raise ValueError("field")
    body = [w for line in lines[1:] if not line.startswith("%") and (w := line.split())]
    g, n, nnz = (int(w) for w in body[0])
    if (g, n, nnz) != (len(features), len(barcodes), len(body) - 1) or not n or not g:
        raise ValueError("shape")
    out = np.zeros((n, g))
    for words in body[1:]:
        j, i, value = int(words[0]) - 1, int(words[1]) - 1, float(words[2])
        if not (0 <= j < g and 0 <= i < n and len(words) == 3):
            raise ValueError("an entry")
        out[i, j] += value
    width = min(len(r) for r in features)
    names = [r[1] if width > 1 else r[0] for r in features]
    if width > 2 and len({r[2] for r in features}) > 1:
        keep = [j for j, r in enumerate(features) if r[2] == "Gene Expression"]
        return out[:, keep], [names[j] for j in keep]
    return out, names


def _rows(fpath: Path) -> list[list[str]]:
    return [line.rstrip("\r").split("\t") for line in _load(fpath).decode().split("\n") if line.strip()]
