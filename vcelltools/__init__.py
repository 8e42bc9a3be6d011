"""vcelltools: from raw single-cell perturbation atlases to a scored virtual-cell prediction.

The public names load on first use, so that ``import vcelltools`` costs almost nothing::

    import vcelltools as vc
    hvgs = vc.hvg("atlas.h5mu", top=2000)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vcelltools.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers, which cannot see what __getattr__ loads
    from vcelltools import pl as pl
    from vcelltools import spatial as spatial
    from vcelltools.challenge.vcc import lint as lint
    from vcelltools.challenge.vcc import prep as prep
    from vcelltools.descriptors.make import features as features
    from vcelltools.differential.de import de as de
    from vcelltools.differential.energy import energy as energy
    from vcelltools.differential.pseudobulk import pseudobulk as pseudobulk
    from vcelltools.evaluation.evaluate import evaluate as evaluate
    from vcelltools.files.convert import convert as convert
    from vcelltools.files.convert import sample as sample
    from vcelltools.files.inspect import inspect as inspect
    from vcelltools.files.normalize import normalize as normalize
    from vcelltools.files.qc import qc as qc
    from vcelltools.prediction.baseline import baseline as baseline
    from vcelltools.prediction.predict import predict as predict
    from vcelltools.sampling.sampler import Sampler as Sampler
    from vcelltools.sampling.single_cells import CellDataset as CellDataset
    from vcelltools.sampling.tokens import Tokenizer as Tokenizer
    from vcelltools.scoring import score as score
    from vcelltools.screens.assignment import guides as guides
    from vcelltools.screens.responding import responders as responders
    from vcelltools.selection.hvg import hvg as hvg
    from vcelltools.selection.hvg_info import read_hvg_info as read_hvg_info
    from vcelltools.simulation.simulate import simulate as simulate
    from vcelltools.stores.basis import basis as basis
    from vcelltools.stores.building.make import build_store as build_store
    from vcelltools.stores.store import open_store as open_store
    from vcelltools.stores.verify import verify_store as verify_store
    from vcelltools.training.request import train as train

# public name -> the module that defines it
_PUBLIC = {
    "hvg": "vcelltools.selection.hvg",
    "normalize": "vcelltools.files.normalize",
    "convert": "vcelltools.files.convert",
    "sample": "vcelltools.files.convert",
    "inspect": "vcelltools.files.inspect",
    "qc": "vcelltools.files.qc",
    "guides": "vcelltools.screens.assignment",
    "responders": "vcelltools.screens.responding",
    "simulate": "vcelltools.simulation.simulate",
    "basis": "vcelltools.stores.basis",
    "build_store": "vcelltools.stores.building.make",
    "open_store": "vcelltools.stores.store",
    "verify_store": "vcelltools.stores.verify",
    "Sampler": "vcelltools.sampling.sampler",
    "CellDataset": "vcelltools.sampling.single_cells",
    "Tokenizer": "vcelltools.sampling.tokens",
    "read_hvg_info": "vcelltools.selection.hvg_info",
    "features": "vcelltools.descriptors.make",
    "train": "vcelltools.training.request",
    "predict": "vcelltools.prediction.predict",
    "evaluate": "vcelltools.evaluation.evaluate",
    "baseline": "vcelltools.prediction.baseline",
    "de": "vcelltools.differential.de",
    "energy": "vcelltools.differential.energy",
    "pseudobulk": "vcelltools.differential.pseudobulk",
    "score": "vcelltools.scoring",
    "prep": "vcelltools.challenge.vcc",
    "lint": "vcelltools.challenge.vcc",
}

_ROOMS = ("pl", "spatial")  # with several verbs of their own: vc.spatial.fit, vc.pl.volcano

__all__ = ["__version__", *_PUBLIC, *_ROOMS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name])
        value = getattr(module, name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"vcelltools.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
