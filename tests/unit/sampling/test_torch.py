"""The PyTorch interface: every cell occurs once with any number of workers, in batches of tensors."""

from __future__ import annotations

import numpy as np
import pytest

from tests.atlases import make_experiment, make_ids

torch = pytest.importorskip("torch", reason="the extra torch is not installed")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "x.h5ad"
    make_experiment(0, 83, make_ids(12)).write_h5ad(path)
    return path


def cells_of(loader) -> list[int]:
    return [int(i) for _, about in loader for i in np.atleast_1d(about["local_idx"])]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_cell_comes_once(path, workers):
    from torch.utils.data import DataLoader

    from vcelltools.torch import ShuffledCells, create_dataloader

    spawn = {"multiprocessing_context": "spawn"} if workers else {}
    loader = create_dataloader(path, batch_size=10, num_workers=workers, **spawn)
    assert sorted(cells_of(loader)) == list(range(83))
    stream = ShuffledCells(path, block=4, window=3)
    found = cells_of(DataLoader(stream, batch_size=7, num_workers=workers, **spawn))
    assert sorted(found) == list(range(83)) and found != sorted(found)


def test_batches_are_tensors_of_the_right_values(path):
    import anndata as ad

    from vcelltools.torch import HVGDataset, ShuffledCells, create_hvg_dataloader

    X = ad.read_h5ad(path).to_df()
    info = type("Info", (), {"names": X.columns[[4, 1]].tolist(), "indices": np.array([4, 1])})()
    for batch, about in create_hvg_dataloader(path, info, batch_size=16):
        assert batch.dtype == torch.float32 and batch.shape[1] == 2
        assert np.array_equal(batch.numpy(), X.iloc[about["local_idx"].numpy(), [4, 1]].to_numpy())
    assert len(HVGDataset(path, info)) == 83
    stream = ShuffledCells(path)
    first = [a["local_idx"] for _, a in stream]
    stream.set_epoch(1)
    assert first != [a["local_idx"] for _, a in stream]
