"""Count histograms per gene and batch, the mergeable accumulator behind every gene statistic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Histograms:
    """Histograms of counts, per batch (k) and gene (g); zeros are implied by ``n_cells_k``.

    Attributes
    ----------
    offsets
        (g + 1,) int64: gene g owns the bins ``offsets[g]:offsets[g + 1]``; bin v counts the value v.
    counts
        (k, offsets[-1]) int64.
    over_batch, over_gene, over_value, over_count
        (m,) int64: values beyond the bins of a gene with their numbers of cells, sorted.
    n_cells_k
        (k,) int64: number of cells in each batch.
    single
        Whether the counts are stored as float32, by rows. Squares of values above 4,096 are then rounded to float32,
        as in scanpy's variance (except for CSC), because loess turns the last digit of one
        variance into differences of 1e-5 in many others.
    """

    offsets: np.ndarray
    counts: np.ndarray
    over_batch: np.ndarray
    over_gene: np.ndarray
    over_value: np.ndarray
    over_count: np.ndarray
    n_cells_k: np.ndarray
    single: bool = False

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.offsets) - 1

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.n_cells_k)

    def _bin_values(self) -> np.ndarray:
        """(bins,) the count of each bin."""
        return np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def _reduce(self, per_bin: np.ndarray) -> np.ndarray:
        return np.add.reduceat(per_bin, self.offsets[:-1])

    def expressing(self, k: int) -> np.ndarray:
        """(g,) int64: number of cells in batch ``k`` with a non-zero count."""
        out = self._reduce(self.counts[k])
        mine = self.over_batch == k
        np.add.at(out, self.over_gene[mine], self.over_count[mine])
        return out

    def moments(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (sum, sum of squares) of batch ``k``, each (g,) float64, rounded once from exact integers."""
        v = self._bin_values()
        s1 = self._reduce(self.counts[k] * v)
        s2 = self._reduce(self.counts[k] * v * v)  # below 4096**2 * 2**31 = 2**55
        mine = self.over_batch == k
        gene, value, count = self.over_gene[mine], self.over_value[mine], self.over_count[mine]
        np.add.at(s1, gene, value * count)
        if self.single:
            rounded = np.square(value.astype(np.float32)).astype(np.float64)
            squares = s2.astype(np.float64)
            np.add.at(squares, gene, rounded * count)
            return s1.astype(np.float64), squares
        if len(value) and float(value.max()) ** 2 * float(count.sum()) >= 2.0**62:
            exact = [int(x) for x in s2]  # Python integers, because squares may exceed 2**63
            for g, x, n in zip(gene.tolist(), value.tolist(), count.tolist(), strict=True):
                exact[g] += x * x * n
            return s1.astype(np.float64), np.array([float(x) for x in exact])
        np.add.at(s2, gene, value * value * count)
        return s1.astype(np.float64), s2.astype(np.float64)

    def clipped_moments(self, k: int, clip_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sum, sum of squares) over min(count, clip) of batch ``k``, each (g,) float64."""
        v = self._bin_values()
        clip = np.repeat(clip_g, np.diff(self.offsets))
        counts, below = self.counts[k], v <= clip
        s1 = self._reduce(np.where(below, counts * v, 0)).astype(np.float64)
        s2 = self._reduce(np.where(below, counts * v * v, 0)).astype(np.float64)
        n_clipped = self._reduce(np.where(below, 0, counts)).astype(np.float64)
        mine = self.over_batch == k
        gene, value, count = self.over_gene[mine], self.over_value[mine], self.over_count[mine]
        under = value <= clip_g[gene]
        x = value[under].astype(np.float64)
        np.add.at(s1, gene[under], x * count[under])
        np.add.at(s2, gene[under], x * x * count[under])
        np.add.at(n_clipped, gene[~under], count[~under])
        return s1 + n_clipped * clip_g, s2 + n_clipped * clip_g * clip_g

    def pooled(self) -> Histograms:
        """Return the merged histograms of all batches."""
        over = _pack_overflow(np.zeros_like(self.over_batch), self.over_gene, self.over_value, self.over_count)
        return Histograms(
            offsets=self.offsets,
            counts=self.counts.sum(axis=0, keepdims=True),
            n_cells_k=self.n_cells_k.sum(keepdims=True),
            single=self.single,
            **over,
        )

    def widened(self, widths: np.ndarray) -> Histograms:
        """Return the same histograms with at least ``widths`` bins per gene; overflow is moved into the new bins."""
        new_width = np.maximum(np.diff(self.offsets), widths)
        if np.array_equal(new_width, np.diff(self.offsets)):
            return self
        offsets = np.concatenate([[0], np.cumsum(new_width)])
        counts = np.zeros((self.n_batches, offsets[-1]), np.int64)
        to = self._bin_values() + np.repeat(offsets[:-1], np.diff(self.offsets))
        counts[:, to] = self.counts
        fits = self.over_value < new_width[self.over_gene]
        np.add.at(
            counts,
            (self.over_batch[fits], offsets[self.over_gene[fits]] + self.over_value[fits]),
            self.over_count[fits],
        )
        return Histograms(
            offsets=offsets,
            counts=counts,
            over_batch=self.over_batch[~fits],
            over_gene=self.over_gene[~fits],
            over_value=self.over_value[~fits],
            over_count=self.over_count[~fits],
            n_cells_k=self.n_cells_k,
            single=self.single,
        )

    def select_genes(self, genes: np.ndarray) -> Histograms:
        """Return the histograms of the genes at these positions, in this order."""
        widths = np.diff(self.offsets)[genes]
        offsets = np.concatenate([[0], np.cumsum(widths)])
        src = np.repeat(self.offsets[:-1][genes], widths) + np.arange(offsets[-1]) - np.repeat(offsets[:-1], widths)
        where = np.full(self.n_genes, -1, np.int64)
        where[genes] = np.arange(len(genes))
        keep = where[self.over_gene] >= 0
        over = _pack_overflow(
            self.over_batch[keep], where[self.over_gene[keep]], self.over_value[keep], self.over_count[keep]
        )
        return Histograms(
            offsets=offsets, counts=self.counts[:, src], n_cells_k=self.n_cells_k, single=self.single, **over
        )


def _pack_overflow(batch: np.ndarray, gene: np.ndarray, value: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    """Sort by (batch, gene, value) and sum equal entries."""
    order = np.lexsort((value, gene, batch))
    batch, gene, value, count = batch[order], gene[order], value[order], count[order]
    new = np.ones(len(batch), bool)
    new[1:] = (np.diff(batch) != 0) | (np.diff(gene) != 0) | (np.diff(value) != 0)
    starts = np.flatnonzero(new)
    total = np.add.reduceat(count, starts) if len(starts) else count
    return {
        "over_batch": batch[starts].astype(np.int64),
        "over_gene": gene[starts].astype(np.int64),
        "over_value": value[starts].astype(np.int64),
        "over_count": total.astype(np.int64),
    }


def make_histograms(
    offsets: np.ndarray,
    counts: np.ndarray,
    n_cells_k: np.ndarray,
    overflow: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    single: bool = False,
) -> Histograms:
    """Build histograms from bins and a list of (key, value, count) overflow, key = batch * g + gene."""
    n_genes = len(offsets) - 1
    if overflow:
        key, value, count = (np.concatenate(part) for part in zip(*overflow, strict=True))
    else:
        key = value = count = np.zeros(0, np.int64)
    over = _pack_overflow(key // n_genes, key % n_genes, value, count)
    return Histograms(offsets=offsets, counts=counts, n_cells_k=np.asarray(n_cells_k, np.int64), single=single, **over)


def add(parts: list[Histograms]) -> Histograms:
    """Add histograms of the same genes and batches (parts of one data set).

    Raises
    ------
    DataError
        If the parts differ in genes or batches.
    """
    first = parts[0]
    if any(p.n_genes != first.n_genes or p.n_batches != first.n_batches for p in parts):
        raise DataError("statistics of different genes or batches cannot be added")
    widths = np.max([np.diff(p.offsets) for p in parts], axis=0)
    wide = [p.widened(widths) for p in parts]
    over = _pack_overflow(
        *(
            np.concatenate([getattr(p, f) for p in wide])
            for f in ("over_batch", "over_gene", "over_value", "over_count")
        )
    )
    return Histograms(
        offsets=wide[0].offsets,
        counts=sum((p.counts for p in wide[1:]), start=wide[0].counts),
        n_cells_k=sum((p.n_cells_k for p in wide[1:]), start=wide[0].n_cells_k),
        single=all(p.single for p in wide),
        **over,
    )


def stack_batches(parts: list[Histograms]) -> Histograms:
    """Concatenate the batches of several histograms of the same genes."""
    widths = np.max([np.diff(p.offsets) for p in parts], axis=0)
    wide = [p.widened(widths) for p in parts]
    shift = np.cumsum([0] + [p.n_batches for p in wide[:-1]])
    over = _pack_overflow(
        np.concatenate([p.over_batch + s for p, s in zip(wide, shift, strict=True)]),
        *(np.concatenate([getattr(p, f) for p in wide]) for f in ("over_gene", "over_value", "over_count")),
    )
    return Histograms(
        offsets=wide[0].offsets,
        counts=np.concatenate([p.counts for p in wide]),
        n_cells_k=np.concatenate([p.n_cells_k for p in wide]),
        single=all(p.single for p in wide),
        **over,
    )
