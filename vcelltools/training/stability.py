"""An early stop once predicted effects no longer change between evaluations."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from vcelltools.io.write.atomic import atomic_file

STABLE = 2
"""Number of evaluations in a row that must change little."""


class Stability:
    """Compares the predicted effects of successive evaluations.

    Parameters
    ----------
    tolerance
        Relative change, ``|new - old| / |new|`` (Frobenius norms), below which effects count as unchanged; 0 turns the
        comparison off.
    warmup
        Evaluations are compared from this step on: earlier ones change little because the learning rate is low.
    """

    def __init__(self, tolerance: float, warmup: int = 0) -> None:
        self.tolerance, self._warmup = tolerance, warmup
        self.count = 0
        self._step, self._effect_kg = -1, np.zeros(0)

    @property
    def reached(self) -> bool:
        """Whether the last ``STABLE`` comparisons were below the tolerance."""
        return self.tolerance > 0 and self.count >= STABLE

    def add(self, effect_kg: np.ndarray, step: int) -> float | None:
        """Take the effects (k, g) of an evaluation, and return their relative change, or None if none is known."""
        before, since = self._effect_kg, self._step
        self._effect_kg, self._step = effect_kg, step
        if since < self._warmup:
            return None
        size = float(np.linalg.norm(effect_kg))
        change = float(np.linalg.norm(effect_kg - before)) / size if size else 0.0
        self.count = self.count + 1 if change < self.tolerance else 0
        return change

    def save(self, fpath: Path) -> None:
        """Write the last effects, for a resumed run."""
        with atomic_file(fpath, force=True) as tmp, open(tmp, "wb") as f:
            np.savez(f, effect=self._effect_kg, step=self._step, count=self.count)

    def load(self, fpath: Path, step: int) -> None:
        """Read the effects of the evaluation at ``step``; if the file has no such effects, comparisons begin anew."""
        try:
            with open(fpath, "rb") as f, np.load(f, allow_pickle=False) as found:
                if int(found["step"]) == step:
                    self._effect_kg, self._step, self.count = found["effect"], step, int(found["count"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return
