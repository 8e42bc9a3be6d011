"""Check what this machine has and lacks: versions, threads, caches, HDF5 filters, disk, accelerators."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcelltools.errors import VcellError
from vcelltools.io.results import Result

_PACKAGES = (
    "vcelltools", "numpy", "numba", "h5py", "deflate", "zstandard", "scikit-misc", "scipy", "statsmodels", "pandas",
    "pyarrow", "anndata", "mudata", "jax", "jaxlib", "optax", "safetensors", "typer", "rich", "igraph",
)  # fmt: skip
_OPTIONAL = {"zarr": "zarr", "hdf5plugin": "filters", "dask": "dask", "libtpu": "tpu"}
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_CHIPS_PER_HOST_BOUNDS")
_PROBE_BYTES = 64 << 20
_LOW_DISK_BYTES = 5 << 30
_ACCELERATOR_SECONDS = 60

_ASK_JAX = """
import json, jax
devices = jax.devices()
memory = [((d.memory_stats() or {}).get("bytes_limit") if d.platform != "cpu" else None) for d in devices]
kinds = [str(d.device_kind) for d in devices]
print(json.dumps({"backend": jax.default_backend(), "devices": kinds, "memory": memory}))
"""


@dataclass(frozen=True, kw_only=True)
class DoctorReport(Result):
    """The result of :func:`check_machine`.

    Attributes
    ----------
    versions
        Package to version; None if an optional package is missing.
    system
        Python, platform, cores, usable cores, threads that commands use, memory in bytes.
    cache
        Folder of compiled kernels (None if no folder is private), and whether it is writable.
    filters
        HDF5 filter to whether it is available.
    disk
        Folder, free bytes, and bytes per second of writing and reading (bypassing the page cache if possible).
    accelerators
        What JAX reports (``backend``, ``devices``, ``memory``), or ``error``; TPU hardware and library.
    problems
        (what is wrong, remedy).
    """

    versions: dict[str, str | None]
    system: dict[str, Any]
    cache: dict[str, Any]
    filters: dict[str, bool]
    disk: dict[str, Any]
    accelerators: dict[str, Any]
    problems: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        problems = [{"problem": p, "remedy": r} for p, r in self.problems]
        return {"ok": not self.problems, **super().to_json(), "problems": problems}


def check_machine(folder: str | os.PathLike = ".", *, accelerators: bool = True) -> DoctorReport:
    """Check this machine.

    Parameters
    ----------
    folder
        Folder whose disk is timed, by writing and removing a file of 64 MB.
    accelerators
        Start JAX (in a separate process, for at most a minute) and list its devices.
    """
    problems: list[tuple[str, str]] = []
    versions = _get_versions(problems)
    return DoctorReport(
        versions=versions,
        system=_get_system(problems),
        cache=_get_cache(problems),
        filters=_get_filters(problems),
        disk=_get_disk(Path(folder), problems),
        accelerators=_get_accelerators(problems, ask=accelerators),
        problems=tuple(problems),
    )


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _get_versions(problems: list[tuple[str, str]]) -> dict[str, str | None]:
    out = {name: _find_version(name) for name in (*_PACKAGES, *_OPTIONAL)}
    absent = [name for name in _PACKAGES if out[name] is None]
    problems += [(f"the package {name} is missing", f"pip install {name}") for name in absent]
    from vcelltools.io.hdf5.safe import HDF5_VERSION

    return {**out, "HDF5": HDF5_VERSION}


def _get_system(problems: list[tuple[str, str]]) -> dict[str, Any]:
    from vcelltools.runtime.threads import get_threads

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads: int | None
    try:
        threads = get_threads()
    except VcellError as e:
        threads = None
        problems.append((e.message, "unset VCELLTOOLS_THREADS, or set it to a whole number"))
    quota = _get_cpu_quota()
    if quota is not None and threads is not None and threads > max(1, round(quota)):
        problems.append(
            (
                f"{threads} threads would run, but this container may use {quota:.1f} cores",
                f"export VCELLTOOLS_THREADS={max(1, round(quota))}",
            )
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "cpu_quota": quota,
        "threads": threads,
        "memory_bytes": memory,
    }


def _get_cpu_quota() -> float | None:
    """Return the number of cores that the container may use (cgroup 2), or None."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _get_cache(problems: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the folder of compiled kernels, and whether there is one."""
    from vcelltools.kernels.cache import choose_folder

    folder, refused = choose_folder()
    if refused is not None:
        problems.append((f"{refused}: compiled kernels are not cached there", "chmod go-w, or NUMBA_CACHE_DIR=FOLDER"))
    if folder is None:
        remedy = "export NUMBA_CACHE_DIR=FOLDER, a folder that only you can write to"
        problems.append(
            ("there is no private folder for compiled kernels, so every command compiles them again", remedy)
        )
    return {"folder": None if folder is None else str(folder), "writable": folder is not None}


def _get_filters(problems: list[tuple[str, str]]) -> dict[str, bool]:
    from vcelltools.io.hdf5.limits import list_filters

    found = list_filters()
    if not found["blosc"]:
        problems.append(("blosc, lz4, bitshuffle and other HDF5 filters are missing", "pip install hdf5plugin"))
    return found


def _get_disk(folder: Path, problems: list[tuple[str, str]]) -> dict[str, Any]:
    folder = folder.resolve()
    free = shutil.disk_usage(folder).free
    out: dict[str, Any] = {"folder": str(folder), "free_bytes": free, "write_per_s": None, "read_per_s": None}
    if free < _LOW_DISK_BYTES:
        problems.append((f"{folder} has {free / 1e9:.1f} GB free", "free some space, or use another disk"))
    if free < 4 * _PROBE_BYTES:
        return out
    from vcelltools.io.hdf5.direct import drop_pages

    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vcelltools-doctor-") as f:
            began = time.perf_counter()
            for _ in range(_PROBE_BYTES >> 20):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            out["write_per_s"] = _PROBE_BYTES / (time.perf_counter() - began)
            drop_pages(f.name)  # so that the disk is measured
            began = time.perf_counter()
            for at in range(0, _PROBE_BYTES, 1 << 20):
                os.pread(f.fileno(), 1 << 20, at)
            out["read_per_s"] = _PROBE_BYTES / (time.perf_counter() - began)
    except OSError as e:
        problems.append((f"{folder}: cannot write here ({e.strerror})", "work in a folder that you can write to"))
    return out


def _get_accelerators(problems: list[tuple[str, str]], *, ask: bool) -> dict[str, Any]:
    tpu_chips = sorted(str(p) for p in (*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")))
    out: dict[str, Any] = {
        "tpu_chips": tpu_chips,
        "libtpu": _find_version("libtpu"),
        "tpu_environment": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith("TPU_") and not {"TOKEN", "KEY"} & set(k.split("_"))
        },
        "nvidia_devices": sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*")),
    }
    if tpu_chips and out["libtpu"] is None:
        problems.append(("TPU chips are attached but libtpu is missing", "pip install 'vcelltools[tpu]'"))
    if not ask:
        return out
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_JAX],
            capture_output=True,
            text=True,
            timeout=_ACCELERATOR_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problems.append(
            (f"JAX does not start within {_ACCELERATOR_SECONDS} s", "another process may hold the accelerator")
        )
        return {**out, "error": "timeout"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        problems.append((f"JAX does not start: {last}", "pip install --upgrade jax, matching the accelerator"))
        return {**out, "error": last}
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    if seen["backend"] == "cpu" and out["nvidia_devices"]:
        problems.append(("there is a GPU but JAX runs on the CPU", "pip install 'jax[cuda13]'"))
    if seen["backend"] == "cpu" and tpu_chips and out["libtpu"] is not None:
        problems.append(
            ("there are TPU chips but JAX runs on the CPU", "unset JAX_PLATFORMS, or stop the process that uses them")
        )
    return {**out, **seen}
