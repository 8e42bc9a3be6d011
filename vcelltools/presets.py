"""Column names of the public atlases, so that a data set needs a path and a preset alone.

The names are those that the data's publishers document; every key can be overridden, and ``build-store --plan``
shows what they find in a file before anything is built.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vcelltools.config import DatasetConfig, Guides
from vcelltools.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is known of an atlas.

    Attributes
    ----------
    title, source
        What it is, and who publishes it where.
    values
        Keys of :class:`vcelltools.config.DatasetConfig`.
    notes
        What to look out for.
    """

    title: str
    source: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: str = ""


# The files of Replogle et al. and of Nadig et al. share one layout: var indexed by Ensembl id.
_REPLOGLE: dict[str, Any] = {
    "pert_col": "gene",
    "control": ["non-targeting"],
    "group_by": ["gem_group"],
    "gene_id_col": "index",
    "gene_name_col": "gene_name",
}
_FIGSHARE = "Replogle et al., Cell 2022; figshare+ 20029387"
_NADIG = "Nadig et al., Nature Genetics 2025; GEO GSE264667"

PRESETS: dict[str, Preset] = {
    "kolf": Preset(
        title="KOLF2.1J pan-genome CRISPRi atlas",
        source="KOLF_Pan_Genome_Aggregate.h5mu",
        values={
            "modality": "rna",
            "pert_col": "feature_call",
            "control": ["Non-Targeting"],
            "group_by": ["batch"],
            "cell_line": "KOLF2.1J",
            "gene_id_col": "gene_ids",
            "gene_name_col": "index",
            "guides": Guides(sep="|", n_col="num_features", policy="single"),
        },
    ),
    "replogle-k562-essential": Preset(
        title="K562, essential genes (CRISPRi)",
        source=f"{_FIGSHARE}, K562_essential_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "K562"},
    ),
    "replogle-k562-gwps": Preset(
        title="K562, genome-wide (CRISPRi)",
        source=f"{_FIGSHARE}, K562_gwps_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "K562"},
    ),
    "replogle-rpe1": Preset(
        title="RPE1, essential genes (CRISPRi)",
        source=f"{_FIGSHARE}, rpe1_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "RPE1"},
    ),
    "nadig-hepg2": Preset(
        title="HepG2, essential genes (CRISPRi)",
        source=f"{_NADIG}, hepg2_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "HepG2"},
    ),
    "nadig-jurkat": Preset(
        title="Jurkat, essential genes (CRISPRi)",
        source=f"{_NADIG}, jurkat_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "Jurkat"},
    ),
    "vcc-2025": Preset(
        title="Virtual Cell Challenge 2025, H1 training set",
        source="Arc Institute, adata_Training.h5ad",
        values={
            "pert_col": "target_gene",
            "control": ["non-targeting"],
            "group_by": ["batch"],
            "cell_line": "H1",
            "gene_name_col": "index",
            "gene_id_col": "gene_id",
        },
    ),
    "tahoe-100m": Preset(
        title="Tahoe-100M, drugs on 50 cell lines",
        source="Tahoe Therapeutics and Arc Institute, one h5ad a plate",
        values={
            "pert_col": "drugname_drugconc",
            "control": ["[('DMSO_TF', 0.0, 'uM')]"],
            "group_by": ["plate"],
            "cell_line_col": "cell_line",
            "gene_name_col": "index",
        },
        notes="a perturbation is a drug at a dose",
    ),
    "x-atlas-orion": Preset(
        title="X-Atlas/Orion, HCT116 and HEK293T genome-wide CRISPRi",
        source="Xaira Therapeutics, 2025",
        values={
            "pert_col": "gene_target",
            "control": ["Non-Targeting"],
            "group_by": ["sample"],
            "keep": ["pass_guide_filter"],
        },
        notes="one file a cell line: set cell_line",
    ),
    "gasperini": Preset(
        title="Gasperini et al. 2019, enhancers in K562 (CRISPRi, high multiplicity)",
        source="scPerturb's harmonised GasperiniShendure2019 files",
        values={"pert_col": "perturbation", "control": ["control"], "cell_line": "K562"},
        notes="cells carry many guides: set guides to choose how a label of several is read",
    ),
    "yao": Preset(
        title="Yao et al. 2024, compressed Perturb-seq in THP-1 (knock-out)",
        source="GEO GSE221321, KO_conventional",
        values={
            "pert_col": "Guides_collapsed_by_gene",
            "control": ["non-targeting"],
            "cell_line": "THP-1",
            "guides": Guides(sep="--", n_col="Total_number_of_guides", policy="single"),
        },
        notes="safe-targeting guides are a second control: add the label to control to pool them",
    ),
}


def get_preset(name: str) -> Preset:
    """Return a preset.

    Raises
    ------
    UsageError
        With the nearest name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no preset is named {name!r}", hint=f"{hint}presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def resolve_preset(spec: DatasetConfig) -> DatasetConfig:
    """Return the data set with its preset's values where it gives none itself."""
    if spec.preset is None:
        return spec
    values = dict(get_preset(spec.preset).values)
    defaults = DatasetConfig(name=spec.name)
    own = {f: getattr(spec, f) for f in spec.__struct_fields__ if getattr(spec, f) != getattr(defaults, f)}
    if "cell_line_col" in own:
        values.pop("cell_line", None)
    if "cell_line" in own:
        values.pop("cell_line_col", None)
    return msgspec.structs.replace(spec, **{k: v for k, v in values.items() if k not in own})
