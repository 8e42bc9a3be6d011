"""Checkpoints: safetensors beside a JSON manifest with hashes; no pickle.

``step-00000200.safetensors`` holds every array of the state under its path (``params/cell/0/w``), and
``step-00000200.json``, written after it, its SHA-256, the SHA-256 of the parameters and what the run must agree on.
A checkpoint without its manifest does not exist. The last two are kept, so that a damaged one leaves another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vcelltools.errors import DataError

FORMAT = 2
Writer = Callable[..., AbstractContextManager[Path]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes hold."""

    step: int
    state: Any
    meta: dict[str, Any]
    params_sha256: str
    skipped: tuple[str, ...]
    """Damaged checkpoints that were passed over, with the reason."""


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves by path, as host arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def hash_params(params: Any) -> str:
    """Return the SHA-256 of the parameters: names, shapes and little-endian bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, a in sorted(flatten(params).items()):
        digest.update(f"{name} {a.dtype.str} {a.shape}\n".encode())
        digest.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def hash_file(fpath: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(fpath, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Checkpointer:
    """Writes and reads the checkpoints of one folder.

    Parameters
    ----------
    dpath
        The folder; made on the first save.
    writer
        ``writer(path, force=True)``: a context manager that yields a temporary path and renames it into place
        (``vcelltools.io.atomic.atomic_file``).
    keep
        How many to keep.
    """

    def __init__(self, dpath: Path, writer: Writer, keep: int = 2) -> None:
        self.dpath, self._writer, self._keep = Path(dpath), writer, keep

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, oldest first."""
        found = (p.stem.removeprefix("step-") for p in self.dpath.glob("step-*.json"))
        return sorted(int(s) for s in found if s.isdigit())

    def _paths(self, step: int) -> tuple[Path, Path]:
        stem = self.dpath / f"step-{step:08d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> str:
        """Write the state (a pytree with ``params``) and its manifest; return the parameters' hash."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        self.dpath.mkdir(parents=True, exist_ok=True)
        tensors_fpath, manifest_fpath = self._paths(step)
        state = jax.device_get(state)
        arrays = {k: np.array(a, order="C") for k, a in flatten(state).items()}
        params_sha256 = hash_params(state.params)
        with self._writer(tensors_fpath, force=True) as tmp:
            try:
                save_file(arrays, tmp)
            except SafetensorError as e:  # a full disk has no type of its own there
                raise OSError(str(e)) from e
            digest = hash_file(tmp)
        manifest = {
            "format": FORMAT,
            "step": step,
            "sha256": digest,
            "params_sha256": params_sha256,
            "meta": meta,
        }
        manifest["manifest_sha256"] = _hash_manifest(manifest)
        with self._writer(manifest_fpath, force=True) as tmp:
            tmp.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for old in self.steps()[: -self._keep]:
            for fpath in reversed(self._paths(old)):  # the manifest first: never one without its tensors
                fpath.unlink(missing_ok=True)
        return params_sha256

    def load(self, template: Any, *, step: int | None = None) -> Checkpoint | None:
        """Return the newest whole checkpoint (or the one of ``step``); None where the folder has none.

        Parameters
        ----------
        template
            A pytree of the state's structure, with arrays or ``jax.ShapeDtypeStruct`` leaves.

        Raises
        ------
        DataError
            When every checkpoint is damaged, or their arrays are not those of the template.
        """
        candidates = [step] if step is not None else list(reversed(self.steps()))
        skipped: list[str] = []
        for number in candidates:
            tensors_fpath, manifest_fpath = self._paths(number)
            try:
                manifest = read_manifest(manifest_fpath)
                arrays = _read_tensors(tensors_fpath, manifest["sha256"])
            except DataError as e:
                skipped.append(e.message)
                continue
            state = _fill(template, arrays, tensors_fpath)
            return Checkpoint(number, state, manifest["meta"], manifest["params_sha256"], tuple(skipped))
        if skipped:
            raise DataError(
                "; ".join(skipped), hint="no whole checkpoint is left: train again with --no-resume --force"
            )
        return None

    def newest_meta(self) -> dict[str, Any] | None:
        """Return what the newest readable manifest says of its run; None where there is none."""
        for number in reversed(self.steps()):
            try:
                return read_manifest(self._paths(number)[1])["meta"]
            except DataError:
                continue
        return None


def _hash_manifest(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(fpath: Path) -> dict[str, Any]:
    """Return a manifest, or raise a DataError that says what is wrong with it."""
    try:
        manifest = json.loads(fpath.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{fpath}: unreadable: {e}") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{fpath}: not a checkpoint manifest of format {FORMAT}")
    if not {"step", "sha256", "params_sha256", "meta"} <= manifest.keys():
        raise DataError(f"{fpath}: keys are missing")
    if manifest.get("manifest_sha256") != _hash_manifest(manifest):
        raise DataError(f"{fpath}: damaged: its SHA-256 is not the one it states")
    return manifest


def _read_tensors(fpath: Path, sha256: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not fpath.exists():
        raise DataError(f"{fpath}: missing")
    if hash_file(fpath) != sha256:
        raise DataError(f"{fpath}: damaged: its SHA-256 is not the manifest's")
    try:
        return load_file(fpath)
    except SafetensorError as e:
        raise DataError(f"{fpath}: {e}") from e


def _fill(template: Any, arrays: dict[str, np.ndarray], fpath: Path) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if lacking := sorted(set(names) - arrays.keys()):
        raise DataError(f"{fpath}: lacks {lacking[0]} ({len(lacking)} in all)", hint="it belongs to another model")
    if extra := sorted(arrays.keys() - set(names)):
        raise DataError(f"{fpath}: has {extra[0]} too many ({len(extra)} in all)", hint="it belongs to another model")
    for name, (_, leaf) in zip(names, leaves, strict=True):
        a = arrays[name]
        if a.shape != leaf.shape or a.dtype != leaf.dtype:
            raise DataError(
                f"{fpath}: {name} is {a.dtype}{list(a.shape)}, the model has {leaf.dtype}{list(leaf.shape)}",
                hint="it belongs to another model",
            )
    return jax.tree_util.tree_unflatten(tree, [arrays[name] for name in names])
