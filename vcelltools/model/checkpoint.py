"""Checkpoints: safetensors files with a JSON manifest of hashes, without pickle.

``step-00000200.safetensors`` holds every array of the state under its path (``params/cell/0/w``).
``step-00000200.json`` is written afterwards. It holds the SHA-256 of that file and of the parameters, and the settings
that a resumed run must share. A checkpoint without a manifest is ignored. The last two checkpoints are kept, in case
one is damaged.
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

from vcelltools.errors import DataError, spell

FORMAT = 2
Writer = Callable[..., AbstractContextManager[Path]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes match."""

    step: int
    state: Any
    meta: dict[str, Any]
    params_sha256: str
    skipped: tuple[str, ...]
    """Damaged checkpoints that were skipped, with the reasons."""


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves as host arrays, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def hash_params(params: Any) -> str:
    """Return the SHA-256 of the names, shapes and little-endian bytes of the parameters, in the order of the names."""
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
        The folder, which the first save creates.
    writer
        A context manager ``writer(path, force=True)`` that yields a temporary path and renames it to ``path`` at the
        end (``vcelltools.io.write.atomic.atomic_file``).
    keep
        Number of checkpoints to keep.
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
        """Write the state (a pytree with ``params``) and its manifest, and return the hash of the parameters."""
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
            except SafetensorError as e:  # safetensors raises no OSError on a full disk
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
            for fpath in reversed(self._paths(old)):  # the manifest first, so that none is left without its tensors
                fpath.unlink(missing_ok=True)
        return params_sha256

    def read_meta(self) -> dict[str, Any] | None:
        """Return what :meth:`save` was given beside the newest state; None if the folder has none.

        Raises
        ------
        DataError
            If its manifest is damaged.
        """
        steps = self.steps()
        return read_manifest(self._paths(steps[-1])[1])["meta"] if steps else None

    def load(self, template: Any, *, step: int | None = None) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or that of ``step``; None if the folder has none.

        Parameters
        ----------
        template
            A pytree with the structure of the state, with arrays or ``jax.ShapeDtypeStruct`` leaves.

        Raises
        ------
        DataError
            If every checkpoint is damaged, or its arrays do not match the template.
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
                "; ".join(skipped),
                hint=f"every checkpoint is damaged: train again with {spell('resume', False)} {spell('force', True)}",
            )
        return None


def _hash_manifest(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(fpath: Path) -> dict[str, Any]:
    """Return a manifest, or raise a DataError that describes its fault."""
    try:
        manifest = json.loads(fpath.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{fpath} cannot be read: {e}") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{fpath} is not a checkpoint manifest of format {FORMAT}")
    if not {"step", "sha256", "params_sha256", "meta"} <= manifest.keys():
        raise DataError(f"{fpath} lacks keys")
    if manifest.get("manifest_sha256") != _hash_manifest(manifest):
        raise DataError(f"{fpath} is damaged: its SHA-256 differs from the one that it states")
    return manifest


def _read_tensors(fpath: Path, sha256: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not fpath.exists():
        raise DataError(f"{fpath} is missing")
    if hash_file(fpath) != sha256:
        raise DataError(f"{fpath} is damaged: its SHA-256 differs from the one in the manifest")
    try:
        return load_file(fpath)
    except SafetensorError as e:
        raise DataError(f"{fpath}: {e}") from e


def _fill(template: Any, arrays: dict[str, np.ndarray], fpath: Path) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if lacking := sorted(set(names) - arrays.keys()):
        raise DataError(
            f"{fpath} lacks {lacking[0]} ({len(lacking)} arrays in all)", hint="it belongs to another model"
        )
    if extra := sorted(arrays.keys() - set(names)):
        raise DataError(
            f"{fpath} has {extra[0]}, which the model lacks ({len(extra)} arrays in all)",
            hint="it belongs to another model",
        )
    for name, (_, leaf) in zip(names, leaves, strict=True):
        a = arrays[name]
        if a.shape != leaf.shape or a.dtype != leaf.dtype:
            raise DataError(
                f"{fpath}: {name} is {a.dtype}{list(a.shape)}, but the model has {leaf.dtype}{list(leaf.shape)}",
                hint="it belongs to another model",
            )
    return jax.tree_util.tree_unflatten(tree, [arrays[name] for name in names])
