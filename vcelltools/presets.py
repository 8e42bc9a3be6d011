"""Column names of public atlases, so that a data set needs only a path and a preset.

The names come from public pages and public code that reads the files (``checked`` names these sources). Every key can
be overridden, and ``build-store --plan`` shows what the names find in a file before anything is built.
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
    """The columns of a public atlas.

    Attributes
    ----------
    title, source
        Name of the atlas, and its publication and repository.
    values
        Keys of :class:`vcelltools.config.DatasetConfig`.
    notes
        Advice for the user.
    checked
        Sources that show the column names, and names that no source shows.
    """

    title: str
    source: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    checked: str = ""


# The files of Replogle et al. and of Nadig et al. share one layout: var indexed by Ensembl id.
_REPLOGLE: dict[str, Any] = {
    "pert_col": "gene",
    "control": ["non-targeting"],
    "group_by": ["gem_group"],
    "gene_id_col": "index",
    "gene_name_col": "gene_name",
    "direction": "crispri",
}
_FIGSHARE = "Replogle et al., Cell 2022, doi:10.1016/j.cell.2022.05.013; figshare+ 20029387"
_NADIG = "Nadig et al., Nature Genetics 2025, doi:10.1038/s41588-025-02169-3; GEO GSE264667"
_CHECKED_REPLOGLE = (
    "gene, gem_group and non-targeting as read from these files by public code, such as Arc Institute's State"
)

PRESETS: dict[str, Preset] = {
    "kolf": Preset(
        title="KOLF2.1J pan-genome CRISPRi atlas",
        source="Nourreddine, Doctor et al., doi:10.1101/2024.11.03.621734; figshare+ 27261219, "
        "KOLF_Pan_Genome_Aggregate.h5mu",
        checked="the modality and gene_ids in public code that opens the file; no public source shows the obs "
        "columns, so check build-store --plan first",
        values={
            "modality": "rna",
            "pert_col": "feature_call",
            "control": ["Non-Targeting"],
            "group_by": ["batch"],
            "cell_line": "KOLF2.1J",
            "direction": "crispri",
            "gene_id_col": "gene_ids",
            "gene_name_col": "index",
            "guides": Guides(sep="|", n_col="num_features", policy="single"),
        },
    ),
    "replogle-k562-essential": Preset(
        title="K562, essential genes (CRISPRi)",
        source=f"{_FIGSHARE}, K562_essential_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "K562"},
        checked=_CHECKED_REPLOGLE,
    ),
    "replogle-k562-gwps": Preset(
        title="K562, genome-wide (CRISPRi)",
        source=f"{_FIGSHARE}, K562_gwps_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "K562"},
        checked=_CHECKED_REPLOGLE,
    ),
    "replogle-rpe1": Preset(
        title="RPE1, essential genes (CRISPRi)",
        source=f"{_FIGSHARE}, rpe1_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "RPE1"},
        checked=_CHECKED_REPLOGLE,
    ),
    "nadig-hepg2": Preset(
        title="HepG2, essential genes (CRISPRi)",
        source=f"{_NADIG}, hepg2_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "HepG2"},
        checked=_CHECKED_REPLOGLE,
    ),
    "nadig-jurkat": Preset(
        title="Jurkat, essential genes (CRISPRi)",
        source=f"{_NADIG}, jurkat_raw_singlecell_01.h5ad",
        values={**_REPLOGLE, "cell_line": "Jurkat"},
        checked=_CHECKED_REPLOGLE,
    ),
    "vcc-2025": Preset(
        title="Virtual Cell Challenge 2025, H1 training set",
        source="Arc Institute, virtualcellchallenge.org, adata_Training.h5ad",
        checked="target_gene, batch and non-targeting on the data's card (Hugging Face, "
        "cyrilzakka/arc-institute-virtual-cell-dataset); gene_id in printed summaries of the file",
        values={
            "pert_col": "target_gene",
            "control": ["non-targeting"],
            "group_by": ["batch"],
            "cell_line": "H1",
            "direction": "crispri",
            "gene_name_col": "index",
            "gene_id_col": "gene_id",
        },
    ),
    "tahoe-100m": Preset(
        title="Tahoe-100M, drugs on 50 cell lines",
        source="Tahoe Therapeutics and Arc Institute, doi:10.1101/2025.02.20.639398, one h5ad per plate",
        checked="drugname_drugconc and its DMSO_TF label in the published sample_metadata and in public code that "
        "reads the plates; cell_line, plate and pass_filter in the same sources",
        values={
            "pert_col": "drugname_drugconc",
            "control": ["[('DMSO_TF', 0.0, 'uM')]"],
            "group_by": ["plate"],
            "cell_line_col": "cell_line",
            "direction": "treatment",
            "gene_name_col": "index",
        },
        notes="a perturbation is a drug at a dose; pass_filter ('full' or 'minimal') is text and does not filter cells",
    ),
    "x-atlas-orion": Preset(
        title="X-Atlas/Orion, HCT116 and HEK293T genome-wide CRISPRi",
        source="Xaira Therapeutics, 2025; Hugging Face, Xaira-Therapeutics/X-Atlas-Orion",
        checked="sample, gene_target and pass_guide_filter (0 or 1) on the data's card; "
        "Non-Targeting in public code that reads it",
        values={
            "pert_col": "gene_target",
            "control": ["Non-Targeting"],
            "group_by": ["sample"],
            "direction": "crispri",
            "keep": ["pass_guide_filter"],
        },
        notes="each cell line has its own file, so set cell_line",
    ),
    "gasperini": Preset(
        title="Gasperini et al. 2019, enhancers in K562 (CRISPRi, high multiplicity)",
        source="scPerturb, Zenodo 10044268, GasperiniShendure2019_atscale.h5ad",
        checked="perturbation and control in all files of scPerturb; public code reads the guides themselves from "
        "obs/barcode",
        values={"pert_col": "perturbation", "control": ["control"], "cell_line": "K562", "direction": "crispri"},
        notes="cells carry many guides; set guides to choose how such labels are read",
    ),
    "yao": Preset(
        title="Yao et al. 2024, compressed Perturb-seq in THP-1 (knockout)",
        source="GEO GSE221321, GSM6858447_KO_conventional (an R object, to be converted first)",
        checked="Guides_collapsed_by_gene, its separator --, Total_number_of_guides, non-targeting and safe-targeting "
        "in public code that reads the file",
        values={
            "pert_col": "Guides_collapsed_by_gene",
            "control": ["non-targeting"],
            "cell_line": "THP-1",
            "direction": "knockout",
            "guides": Guides(sep="--", n_col="Total_number_of_guides", policy="single"),
        },
        notes="safe-targeting guides are a second kind of control; add the label to control to pool them",
    ),
}


def get_preset(name: str) -> Preset:
    """Return a preset.

    Raises
    ------
    UsageError
        If no preset has this name; the message suggests the nearest one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no preset is named {name!r}", hint=f"{hint}presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def resolve_preset(spec: DatasetConfig) -> DatasetConfig:
    """Return the data set, with missing values filled in from its preset."""
    if spec.preset is None:
        return spec
    values = dict(get_preset(spec.preset).values)
    defaults = DatasetConfig(name=spec.name)
    own = {f: getattr(spec, f) for f in spec.__struct_fields__ if getattr(spec, f) != getattr(defaults, f)}
    if "cell_line_col" in own:
        values.pop("cell_line", None)
    if "cell_line" in own:
        values.pop("cell_line_col", None)
    if "direction_col" in own:
        values.pop("direction", None)
    return msgspec.structs.replace(spec, **{k: v for k, v in values.items() if k not in own})
