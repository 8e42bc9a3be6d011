"""A truth pack of the 2026 rules: everything that scoring needs from the truth, so that it is read only once.

It holds the counts summed over groups, the DE table, both ends of the scale, and the control cells. The rank test
needs them, and they determine the size of the pack (about five bits per stored control value). Scores from a pack equal
those from the file, to the bit, because fold changes are kept in full precision if a metric reads their size.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from vcelltools.scoring.pack_format import code_p, decode_p, narrow
from vcelltools.scoring.rules import RULES_2026
from vcelltools.scoring.vcc2026.counts import GeneMajor
from vcelltools.scoring.vcc2026.profiles import ALPHA, DeTable, Profiles, get_profiles
from vcelltools.scoring.vcc2026.truth import Options, Truth, get_name_ranks

MAGIC = b"vctru26d"


def get_settings(o: Options) -> dict[str, Any]:
    """Return the settings on which a pack depends."""
    digest = None
    if o.target_gene_map:
        text = json.dumps(sorted(o.target_gene_map.items()), default=str).encode()
        digest = hashlib.sha256(text).hexdigest()[:16]
    return {
        "rules": RULES_2026.version,
        "pert_col": o.pert_col,
        "control": o.control,
        "context_col": o.context_col,
        "continuity": o.continuity,
        "target_gene_map": digest,
    }


def pack_truth(t: Truth) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the arrays of a truth."""
    head = {
        "context": t.context, "genes": list(t.genes), "labels": list(t.labels), "baseline": t.baseline,
        "ceiling": t.ceiling, "problem": t.problem, "warnings": list(t.warnings), "library": t.library,
        "dense": t.controls.dense, "copied_share": t.copied_share,
    }  # fmt: skip
    de = t.side.de
    significant = de.padj_ph < ALPHA
    n_g = np.diff(t.controls.indptr)
    # cells ascend within a gene, so their differences are small and compress well
    gaps = np.diff(t.controls.cells, prepend=0)
    first = t.controls.indptr[:-1][n_g > 0]
    gaps[first] = t.controls.cells[first]
    arrays = {
        "target_p": t.target_p,
        "size_k": t.side.size_k,
        "spread_k": t.side.spread_k,
        "sum_kg": narrow(t.sum_kg),
        "genes": de.genes,
        "significant": np.packbits(significant.ravel()),
        "lfc_full": de.lfc_ph[significant],
        "lfc_ph": de.lfc_ph.astype(np.float32),
        "padj_ph": code_p(de.padj_ph),
        "n_g": narrow(n_g),
        "gaps": narrow(gaps),
        "values": narrow(t.controls.values),
    }
    return head, arrays


def unpack_truth(head: dict[str, Any], a: dict[str, np.ndarray]) -> Truth:
    """Return the truth from a header and arrays; invalid content raises a ValueError, KeyError or TypeError."""
    genes, labels = np.array(head["genes"], dtype=object), np.array(head["labels"], dtype=object)
    n_genes, k, h = len(genes), len(labels) + 1, len(a["genes"])
    shapes = {"sum_kg": (k, n_genes), "size_k": (k,), "spread_k": (k,), "target_p": (k - 1,), "lfc_ph": (k - 1, h),
              "padj_ph": (k - 1, h), "n_g": (n_genes,)}  # fmt: skip
    for name, shape in shapes.items():
        if a[name].shape != shape:
            raise ValueError(f"the array {name!r} is {a[name].shape}, not {shape}")
    significant = np.unpackbits(a["significant"], count=(k - 1) * h).astype(bool).reshape(k - 1, h)
    lfc = a["lfc_ph"].astype(np.float64)
    lfc[significant] = a["lfc_full"]
    padj = decode_p(a["padj_ph"], significant, ALPHA)
    sum_kg = a["sum_kg"].astype(np.float64)
    indptr = np.concatenate([[0], np.cumsum(a["n_g"], dtype=np.int64)])
    n_cells = int(a["size_k"][0])
    if not indptr[-1] == len(a["gaps"]) == len(a["values"]):
        raise ValueError("the numbers of positions and values of the controls differ")
    values = a["values"].astype(np.float32)
    reached = np.cumsum(a["gaps"], dtype=np.int64)
    before = np.concatenate([[0], reached])[indptr[:-1]]
    cells = (reached - np.repeat(before, a["n_g"])).astype(np.int32)
    inside = not len(cells) or 0 <= int(cells.min()) <= int(cells.max()) < n_cells
    known = ((a["target_p"] >= -1) & (a["target_p"] < n_genes)).all() and (
        (a["genes"] >= 0) & (a["genes"] < n_genes)
    ).all()
    if not (inside and known):
        raise ValueError("positions are outside of its arrays")
    library = np.bincount(cells, weights=values, minlength=n_cells)
    de = DeTable(genes=a["genes"].astype(np.int64), lfc_ph=lfc, p_ph=padj, padj_ph=padj)
    side = Profiles(size_k=a["size_k"], profile_kg=get_profiles(sum_kg), spread_k=a["spread_k"], de=de)
    controls = GeneMajor(indptr=indptr, cells=cells, values=values, library=library, dense=bool(head["dense"]))
    return Truth(
        context=str(head["context"]),
        genes=genes,
        labels=labels,
        target_p=a["target_p"].astype(np.int64),
        name_rank_g=get_name_ranks(genes),
        side=side,
        controls=controls,
        library=float(head["library"]),
        sum_kg=sum_kg,
        baseline={str(m): _number(v) for m, v in head["baseline"].items()},
        ceiling={str(m): _number(v) for m, v in head["ceiling"].items()},
        problem=str(head["problem"]),
        warnings=tuple(map(str, head["warnings"])),
        copied_share=float(head["copied_share"]),
        from_pack=True,
    )


def _number(v: float | None) -> float:
    return float("nan") if v is None else float(v)
