"""The layout of a store, which follows from the plan before any count is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from vcelltools.io import Dataset
from vcelltools.io.fingerprint import hash_text
from vcelltools.io.table import RANGE
from vcelltools.io.write.atomic import dump_json
from vcelltools.runtime.threads import get_threads
from vcelltools.stores.building.plan import StorePlan
from vcelltools.stores.building.sums import SPILL_SHARE
from vcelltools.stores.files import hash_array, hash_parts
from vcelltools.stores.format import CODING, SCHEMA, get_frame_starts, get_stride
from vcelltools.version import __version__

BUCKET_BYTES = 4 << 20
CHUNK_VALUES = 1 << 20
CHECKPOINT_SECONDS = 10.0
MEMORY_BYTES = 500_000_000
_LEAST_SUMS = 32 << 20  # sums up to this size always stay in memory
_BASE_BYTES = 260 << 20  # memory of the interpreter, its libraries, and tables of a fixed size


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The positions of all rows, genes and sums, and how the work is divided.

    Attributes
    ----------
    source
        The identity of the source (:func:`vcelltools.io.fingerprint.identify`).
    threads, chunk_values, bucket_bytes, checkpoint_seconds, memory_bytes
        How the work is divided; the bytes of the store do not depend on them.
    """

    plan: StorePlan
    ds: Dataset
    source: dict[str, Any] = field(default_factory=dict)
    threads: int = field(default_factory=lambda: get_threads(None))
    chunk_values: int = CHUNK_VALUES
    bucket_bytes: int = BUCKET_BYTES
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    memory_bytes: float = MEMORY_BYTES

    @property
    def n(self) -> int:
        """Number of cells in the store."""
        return self.plan.order.n

    @property
    def n_basis(self) -> int:
        """Number of genes in the basis."""
        return self.plan.n_basis

    @property
    def stride(self) -> int:
        """Row stride of X.f16, in values."""
        return get_stride(self.n_basis)

    @property
    def row_bytes(self) -> int:
        """Size of a row of X.f16, and of a work row, in bytes."""
        return 2 * self.stride

    @property
    def single(self) -> bool:
        """Whether values are computed in float32."""
        return np.dtype(self.ds.matrix.dtype) != np.float64

    @property
    def by_column(self) -> bool:
        """Whether the matrix is read gene by gene."""
        m = self.ds.matrix
        return m.by_gene

    # -- rows ----------------------------------------------------------------------------------------------------

    @cached_property
    def frame_starts(self) -> np.ndarray:
        """(frames + 1,) int64: first row of each frame."""
        return get_frame_starts(self.plan.order.runs["length"].to_numpy())

    @cached_property
    def edges(self) -> np.ndarray:
        """(buckets + 1,) int64: first row of each bucket, where a frame starts; buckets hold about ``bucket_bytes``."""
        rows = max(16, self.bucket_bytes // self.row_bytes)
        at = np.searchsorted(self.frame_starts, np.arange(0, self.n, rows))
        return np.unique(np.append(self.frame_starts[at], self.n))

    def get_slots(self) -> np.ndarray:
        """(cells,) int32: the work row of each source cell, by bucket and source order; -1 for dropped cells."""
        slots = np.full(len(self.plan.order.row_of_cell), -1, np.int32)
        for a, b in zip(self.edges[:-1], self.edges[1:], strict=True):
            slots[np.sort(self.plan.order.source[a:b])] = np.arange(a, b)
        return slots

    def get_ranks(self, start: int, stop: int) -> np.ndarray:
        """(cells,) int32: the rank of each cell's work row among those of the cells ``start:stop``."""
        slots = self.get_slots()[start:stop]
        kept = np.flatnonzero(slots >= 0)
        out = np.full(self.ds.n_cells, -1, np.int32)
        out[start + kept[np.argsort(slots[kept])]] = np.arange(len(kept), dtype=np.int32)
        return out

    # -- genes ---------------------------------------------------------------------------------------------------

    @property
    def sums_mode(self) -> str:
        """The genes whose sums are stored: ``all`` or ``basis``."""
        mode = self.plan.spec.sums
        return ("basis" if self.by_column else "all") if mode == "auto" else mode

    @cached_property
    def basis_of_column(self) -> np.ndarray:
        """(columns,) int32: position in the basis of each column of the file, or -1."""
        return self.plan.basis_of_column

    @cached_property
    def measured(self) -> np.ndarray:
        """(Merged) genes of the file whose sums are stored, in order."""
        match = self.plan.match
        if self.sums_mode == "basis":
            return match.gene_of[match.present].astype(np.int64)
        return np.arange(len(match.merged.ids), dtype=np.int64)

    @cached_property
    def measured_of_column(self) -> np.ndarray:
        """(columns,) int32: the column of the sums of each column of the file, or -1."""
        merged = self.plan.match.merged
        of_gene = np.full(len(merged.ids), -1, np.int32)
        of_gene[self.measured] = np.arange(len(self.measured))
        return of_gene[merged.of_column]

    @cached_property
    def measured_is_plain(self) -> bool:
        """Whether no two columns with sums belong to the same gene."""
        some = self.measured_of_column[self.measured_of_column >= 0]
        return len(np.unique(some)) == len(some)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def sums_shape(self) -> tuple[int, int]:
        """(groups, measured genes)."""
        return self.plan.order.n_groups, len(self.measured)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums of all groups over all measured genes."""
        return 8 * self.sums_shape[0] * self.sums_shape[1]

    @property
    def disk_bytes(self) -> int:
        """Approximate size on disk of the finished store and of the work files, in bytes."""
        work = 2 * self.n_basis if self.by_column else 0
        sums = 4 if self.sums_fit else 4 + SPILL_SHARE
        return self.n * (work + self.row_bytes + self.n_basis // 3 + 300) + sums * self.sums_bytes

    @property
    def work_bytes(self) -> int:
        """Approximate memory of a build without the sums, in bytes."""
        per_thread = 30 * self.chunk_values + 6 * (self.edges[1] - self.edges[0]) * self.row_bytes
        return int(_BASE_BYTES + self.threads * per_thread + (56 if self.by_column else 26) * self.ds.n_cells)

    @property
    def sums_fit(self) -> bool:
        """Whether the sums stay in memory; sums on disk take a detour through a file of counts."""
        return self.sums_bytes <= max(_LEAST_SUMS, self.memory_bytes - self.work_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the bytes of the store; a journal with another hash is not resumed."""
        import zstandard

        plan, order = self.plan, self.plan.order
        parts = {
            "schema": SCHEMA,
            "version": __version__,
            "coding": CODING,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            "source": self.source.get("fingerprint"),
            "labels": plan.describe_labels(),
            "runs": hash_text(map(str, order.runs.itertuples(index=False, name=None))),
            "basis": plan.basis.sha256,
            "target_sum": plan.target_sum,
            "single": self.single,
            "sums": self.sums_mode,
            "order": hash_array(order.source),
            "groups": hash_parts(order.get_groups(a, a + RANGE) for a in range(0, self.ds.n_cells, RANGE)),
            "columns": hash_array(self.basis_of_column),
            "measured": hash_array(plan.match.merged.of_column),
            "library_size": plan.libsize_from,
            "known": None if plan.libsize is None else hash_array(plan.libsize),
        }
        if plan.spec.non_integer == "round":
            parts["rounded"] = plan.seed
        return hashlib.sha256(dump_json(parts).encode()).hexdigest()
