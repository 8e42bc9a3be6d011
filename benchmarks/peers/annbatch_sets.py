"""annbatch on the rows of a workload: python annbatch_sets.py prepare|run WORK [STEPS]; the last line is JSON."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import zarr
import zarrs  # noqa: F401  its codec pipeline, which annbatch recommends
from annbatch import Loader, abc, write_sharded

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
warnings.simplefilter("ignore")


class Rows(abc.Sampler):
    """Asks for given rows, a batch a request."""

    def __init__(self, rows, runs: bool, set_size: int):
        self.rows, self.runs, self.set_size = rows, runs, set_size

    @property
    def batch_size(self):
        return self.rows.shape[1]

    @property
    def shuffle(self):
        return False

    def n_batches(self, n_obs):
        return len(self.rows)

    def validate(self, n_obs):
        assert self.rows.max() < n_obs

    def _sample(self, n_obs):
        for rows in self.rows:
            starts = rows[:: self.set_size].tolist()
            requests = [slice(a, a + self.set_size) for a in starts] if self.runs else rows
            yield {"requests": requests, "splits": [np.arange(len(rows))]}


def forget(path: Path) -> None:
    """Ask the page cache to drop a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    what, work = sys.argv[1], Path(sys.argv[2])
    if what == "prepare":
        X = np.load(work / "X.npy", mmap_mode="r")
        group = zarr.open_group(work / "annbatch.zarr", mode="w", zarr_format=3)
        write_sharded(group, ad.AnnData(X=np.asarray(X)), n_obs_per_chunk=64)
        return
    out = {}
    expected = np.load(work / "check.npz")
    for path in (work / "annbatch.zarr").rglob("*"):  # an earlier run made the page cache forget them
        if path.is_file():
            path.read_bytes()
    for kind in ("runs", "scattered"):
        steps = int(sys.argv[3]) if kind == "runs" else max(2, int(sys.argv[3]) // 10)
        rows = np.load(work / f"{kind}.npy")[:steps]
        loader = Loader(
            batch_sampler=Rows(rows, kind == "runs", int(expected["set_size"])), preload_to_gpu=False, to=None
        )
        loader.add_dataset(zarr.open_group(work / "annbatch.zarr", mode="r")["X"])
        first = next(iter(loader))["X"]
        assert np.array_equal(np.asarray(first), expected[kind]), f"annbatch's {kind} differ"
        loader = Loader(
            batch_sampler=Rows(rows, kind == "runs", int(expected["set_size"])), preload_to_gpu=False, to=None
        )
        loader.add_dataset(zarr.open_group(work / "annbatch.zarr", mode="r")["X"])
        began = time.perf_counter()
        n = sum(b["X"].shape[0] for b in loader)
        out[kind] = n / (time.perf_counter() - began)
    rows = np.load(work / "runs.npy")[:20]
    for path in (work / "annbatch.zarr").rglob("*"):
        if path.is_file():
            forget(path)
    began = time.perf_counter()
    loader = Loader(batch_sampler=Rows(rows, True, int(expected["set_size"])), preload_to_gpu=False, to=None)
    loader.add_dataset(zarr.open_group(work / "annbatch.zarr", mode="r")["X"])
    out["runs, cold"] = sum(b["X"].shape[0] for b in loader) / (time.perf_counter() - began)
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
