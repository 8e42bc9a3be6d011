"""Open a fitted run with its tissue, for tables of interactions, fields and screens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from vcelltools.errors import DataError, UsageError, checked
from vcelltools.spatial._opened import FittedRun, Table
from vcelltools.spatial.field import FIELD_OPTIONS, Field, make_field
from vcelltools.spatial.files import find_run
from vcelltools.spatial.interactions import list_interactions
from vcelltools.spatial.screen import ScreenResult, read_job, work
from vcelltools.spatial.screen import screen as run_screen
from vcelltools.spatial.settings import Loaded, Options, make_settings
from vcelltools.spatial.tissue import Tissue, open_tissue

if TYPE_CHECKING:
    from anndata import AnnData


class Run(FittedRun):
    """A fitted run and its tissue, with tables, fields and screens, opened by :func:`open_run`."""

    def interactions(
        self,
        *,
        by: str | None = None,
        how: str = "mean",
        cell: str | None = None,
        neighbors: int | None = None,
    ) -> Table:
        """Return the coefficients of all targets by cell type, with one row per interaction, gene and cell type.

        Parameters
        ----------
        by
            obs column of the cell types; by default the clusters of the run.
        how
            ``mean``, ``min``, ``max`` or ``sum`` over the cells of a type.
        cell, neighbors
            Use only this cell and its nearest neighbours.
        """
        return Table(list_interactions(self, by=by, how=how, cell=cell, neighbors=neighbors))

    def field(self, desired: Mapping[str, float], *, basis: str, **options: Any) -> Field:
        """Perturb genes; return transition vectors on an embedding (:func:`vcelltools.spatial.field.make_field`)."""
        ours = {k: options.pop(k) for k in list(options) if k in FIELD_OPTIONS}
        return make_field(self.perturb(desired, **options), basis=basis, **ours)

    def screen(self, genes: Sequence[str], output_dir: str | os.PathLike, **options: Any) -> ScreenResult:
        """Perturb many genes, one at a time; see :func:`vcelltools.spatial.screen.screen`."""
        return run_screen(self, genes, output_dir, help_screen=self.help_screen, **options)

    @staticmethod
    def help_screen(folder: str) -> int:
        """Work on a screen that another process has started, and return the number of perturbations done here."""
        job = read_job(Path(folder))
        settings = {k: v for k, v in job["settings"].items() if v is not None}
        return work(open_run(job["run"], job["data"], threads=1, **settings), Path(folder), job)


@checked
def open_run(
    path: str | os.PathLike,
    adata: AnnData | str | os.PathLike | None = None,
    *,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Run:
    """Open a fitted run of this package, or a folder of betadata from SpaceTravLR.

    Parameters
    ----------
    path
        The run folder or its TOML file.
    adata
        The data, if the TOML file does not name them or they have moved.
    **options
        Settings that override those of the TOML file; see :class:`~vcelltools.spatial.settings.Settings`.

    Raises
    ------
    DataError
        If the run and the data do not match.
    """
    p = Path(path)
    _, loaded, folder = find_run(p)
    settings = make_settings(options, loaded)
    source = adata if adata is not None else loaded.command.get("data.adata_path") if loaded else None
    if source is None:
        raise UsageError(f"{p} does not name its data", hint="pass the data too")
    tissue = open_tissue(source, **settings.tissue)
    if loaded is not None and settings.tissue == make_settings({}, loaded).tissue:  # others are set on purpose
        _compare_data(p, tissue, loaded)
    if loaded is not None and loaded.condition is not None:
        codes, labels = tissue.column(loaded.condition[0]).factorize()
        tissue = tissue.take(np.flatnonzero(codes == labels.index(loaded.condition[1])))
    return Run(folder, tissue, settings, loaded, threads)


def _compare_data(path: Path, tissue: Tissue, loaded: Loaded) -> None:
    """Raise a DataError if the data are not those of the run."""
    kept = loaded.command.get("identity.data")
    if not isinstance(kept, str):  # a run of another program
        return
    now = tissue.get_fingerprint()
    if now.partition(":")[0] == kept.partition(":")[0] and now != kept:
        raise DataError(
            f"{path} was fitted to other data than {tissue.where}: its content has changed",
            hint="pass the original data, or fit again",
        )
