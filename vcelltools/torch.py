"""PyTorch data sets and loaders of single cells, on top of :class:`vcelltools.CellDataset`.

This module needs ``pip install "vcelltools[torch]"``; no other module imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.sampling.single_cells import CellDataset

try:
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
except ImportError as e:
    raise EnvironmentFault("vcelltools.torch needs PyTorch", hint='pip install "vcelltools[torch]"') from e

Source = str | os.PathLike | Sequence[str | os.PathLike] | CellDataset
Item = tuple[torch.Tensor, dict[str, Any]]


def _open(source: Source, genes: Any, values: str) -> CellDataset:
    if isinstance(source, CellDataset):
        if genes is not None:
            raise UsageError("the cells are already open, so their genes cannot change", hint="remove genes")
        return source
    return CellDataset(source, genes=genes, values=values)


class ScRNADataset(Dataset):
    """Cells by position: ``(values, {cell_id, experiment_id, gene_count, umi_count, batch_idx, local_idx})``.

    Parameters
    ----------
    source, genes, values
        As :class:`vcelltools.CellDataset` takes them; or a CellDataset.
    """

    def __init__(self, source: Source, genes: Any = None, values: str = "counts") -> None:
        self.cells = _open(source, genes, values)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return some cells; neighbours are read together. The loader requests one batch at a time."""
        return [(torch.from_numpy(x), about) for x, about in self.cells.__getitems__(indices)]


class HVGDataset(ScRNADataset):
    """Cells with the genes of a ``hvg_info.json``, in its order.

    Parameters
    ----------
    hvg_info
        The file, or the result of :func:`vcelltools.read_hvg_info`.
    """

    def __init__(self, source: Source, hvg_info: Any, values: str = "counts") -> None:
        if isinstance(hvg_info, str | os.PathLike):
            from vcelltools.selection.hvg_info import read_hvg_info

            hvg_info = read_hvg_info(hvg_info)
        super().__init__(source, genes=hvg_info, values=values)
        self.hvg_info = hvg_info


class ShuffledCells(IterableDataset):
    """All cells, each once, in a shuffled order that reads files in contiguous blocks.

    Blocks of neighbouring cells are put in random order, and cells are shuffled within a window of blocks. With several
    workers, each takes its own windows, so that no cell appears twice.

    Parameters
    ----------
    seed
        Random seed of the order; :meth:`set_epoch` changes it for every epoch.
    block, window
        Number of cells in a block, and of blocks in a window.
    """

    def __init__(
        self,
        source: Source,
        genes: Any = None,
        values: str = "counts",
        *,
        seed: int = 0,
        block: int = 32,
        window: int = 64,
    ) -> None:
        if min(block, window) < 1:
            raise UsageError("block and window must be at least 1")
        self.cells = _open(source, genes, values)
        self.seed, self.block, self.window, self.epoch = seed, block, window, 0

    def __len__(self) -> int:
        return len(self.cells)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = rng.permutation(-(-len(self.cells) // self.block))
        for k, first in enumerate(range(0, len(blocks), self.window)):
            order = np.random.default_rng([self.seed, self.epoch, k + 1])
            if k % workers != worker:
                continue
            chosen = np.sort(blocks[first : first + self.window])
            cells = np.concatenate(
                [np.arange(b * self.block, min((b + 1) * self.block, len(self.cells))) for b in chosen]
            )
            items = self.cells.__getitems__(cells)
            for i in order.permutation(len(items)).tolist():
                x, about = items[i]
                yield torch.from_numpy(x), about


def create_dataloader(
    source: Source, *, genes: Any = None, values: str = "counts", batch_size: int = 64, shuffle: bool = True,
    num_workers: int = 0, seed: int = 0, **options: Any,
) -> DataLoader:  # fmt: skip
    """Return a loader of cells; ``options`` are passed to the DataLoader."""
    generator = torch.Generator().manual_seed(seed)
    cells = ScRNADataset(source, genes, values)
    return DataLoader(
        cells, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers, generator=generator, **options
    )


def create_hvg_dataloader(
    source: Source, hvg_info: Any, *, values: str = "counts", batch_size: int = 64, shuffle: bool = True,
    num_workers: int = 0, seed: int = 0, **options: Any,
) -> DataLoader:  # fmt: skip
    """Return a loader of cells with the genes of a ``hvg_info.json``; ``options`` are passed to the DataLoader."""
    generator = torch.Generator().manual_seed(seed)
    cells = HVGDataset(source, hvg_info, values)
    return DataLoader(
        cells, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers, generator=generator, **options
    )
