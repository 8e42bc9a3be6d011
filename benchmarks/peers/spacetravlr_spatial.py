"""SpaceTravLR's received ligands, splash and perturb on the files of bench_spatial; prints seconds, of the clock and of
the processor, as JSON.

    python spacetravlr_spatial.py FOLDER TARGET KNOCKED HOPS

With 0 hops, it times only the derivatives, with expression in place of received ligands.

Its modules import torch and others at the top; stand-ins take their place, and nothing that is timed calls them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path

ABSENT = ("torch", "torchvision", "group_lasso", "pyro", "commot", "magic", "pqdm", "genomepy", "pybedtools",
          "enlighten", "wordcloud", "igraph", "pysal")  # fmt: skip


def _answer(self, *args, **kwargs):
    return args[0] if args else self


class _Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name)

    def __call__(cls, *args, **kwargs):
        if len(args) == 1 and callable(args[0]) and not isinstance(args[0], type):
            return args[0]
        return object.__new__(cls)

    def __or__(cls, other):
        return cls


def _make(name):
    return _Meta(name, (), {"__call__": _answer, "__getattr__": lambda self, n: _make(n)})


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _make(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec):
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def main() -> None:
    folder, gene, knocked, hops = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    sys.meta_path.append(_Finder())
    import anndata as ad
    import pandas as pd
    import SpaceTravLR_data

    adata = ad.read_h5ad(folder / "x.h5ad")
    x = adata.to_df(layer="imputed_count")
    ligands = [g for g in x if g.startswith("Lig")]
    known = Path(SpaceTravLR_data.__file__).parent / "cellchat_mouse.csv"  # it is read at import and not in the wheel
    known.write_text(
        ",ligand,receptor,pathway,signaling\n"
        + "".join(f"{i},{g},Rec0,P,Secreted Signaling\n" for i, g in enumerate(ligands))
    )
    from SpaceTravLR.beta import BetaFrame
    from SpaceTravLR.gene_factory import GeneFactory
    from SpaceTravLR.models.parallel_estimators import received_ligands

    seconds = {}

    def clock(name, call):
        wall, cpu = time.perf_counter(), time.process_time()
        out = call()
        seconds[f"{name}_seconds"], seconds[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        return out

    info = pd.DataFrame({"ligand": ligands, "receptor": ligands, "radius": 200.0})
    received_ligands(adata.obsm["spatial"][:50], x[ligands].iloc[:50], info, 1)  # its compiler, once
    if hops:
        W = clock("received", lambda: received_ligands(adata.obsm["spatial"], x[ligands], info, 1))
        W.to_parquet(folder / "peer_received.parquet")
    else:
        W = x[ligands]
    (folder / "cells").mkdir(exist_ok=True)
    for p in sorted((folder / "betas").glob("*_betadata.feather" if hops else f"{gene}_betadata.feather")):
        rows = pd.read_feather(p).set_index("Cluster").loc[adata.obs["cell_type_int"]]
        rows.index = adata.obs_names
        rows.to_parquet(folder / "cells" / f"{p.stem}.parquet")
    frame = BetaFrame.from_path(str(folder / "cells" / f"{gene}_betadata.parquet"))
    frame.splash(W, W, x, scale_factor=1, beta_cap=None)
    clock("splash", lambda: frame.splash(W, W, x, scale_factor=1, beta_cap=None)).to_parquet(
        folder / "peer_splash.parquet"
    )
    if not hops:
        print(json.dumps(seconds))
        return
    adata.layers["normalized_count"] = adata.layers["imputed_count"]
    adata.uns["received_ligands"], adata.uns["received_ligands_tfl"] = W, W
    factory = GeneFactory(adata, str(folder / "cells"), radius=200, contact_distance=200)
    factory.load_betas()
    out = clock("perturb", lambda: factory.perturb(knocked, n_propagation=hops, gene_expr=0))
    out.to_parquet(folder / "peer_perturb.parquet")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
