"""Find the matrices of a source that hold counts, and suggest one if the opened matrix does not."""

from __future__ import annotations

from typing import Any

from vcelltools.errors import NotCountsError, VcellError, spell
from vcelltools.io.counts import CountEvidence, get_count_evidence
from vcelltools.io.dataset import list_choices, open_dataset
from vcelltools.io.opened import Dataset


def require_counts(
    dataset: Dataset, *, whole: bool = True, small: bool = False, fractions: str | None = None
) -> CountEvidence:
    """Return the evidence that the matrix of the data set holds counts.

    Parameters
    ----------
    whole
        Whether fractional counts (corrected for ambient RNA, or estimated) are rejected.
    small
        Whether fractional values below 15 are accepted too, which may be log1p values; a note says so.
    fractions
        The hint to show if they are.

    Raises
    ------
    NotCountsError
        If it does not; the message gives the evidence and names the layers and modalities that do.
    """
    evidence = get_count_evidence(dataset.matrix)
    if evidence.is_counts or (evidence.looks_like == "fractions" and not whole):
        return evidence
    if evidence.looks_like == "log1p" and small:
        dataset.notes.append(
            f"{dataset.matrix.where}: small fractional values, which may be log1p, were read as counts"
        )
        return evidence
    hint = suggest_counts(dataset)
    if evidence.looks_like in ("fractions", "log1p") and fractions is not None:
        hint = f"{hint}; {fractions}"
    raise NotCountsError(f"{dataset.matrix.where} holds {evidence.describe()}", hint=hint)


def suggest_counts(dataset: Dataset) -> str:
    """Return the hint: the options that open a matrix of the same source that looks like counts."""
    here = (dataset.modality, dataset.layer)
    found = []
    for modality, layer, evidence in survey_counts(dataset.source):
        if evidence is None or not evidence.is_counts or evidence.looks_like == "empty" or (modality, layer) == here:
            continue
        options = [spell("modality", modality)] if modality is not None and modality != dataset.modality else []
        if layer != "X" or not options:
            options.append(spell("layer", layer))
        found.append((modality != dataset.modality, " ".join(options)))
    if not found:
        return "no other layer, raw or modality looks like counts; pass the file with the raw counts"
    return "to read the counts in the file, pass " + ", or ".join(text for _, text in sorted(found))


def survey_counts(source: Any) -> list[tuple[str | None, str, CountEvidence | None]]:
    """Return (modality, layer, evidence) of every matrix of a source; the evidence is None if it cannot be read."""
    out: list[tuple[str | None, str, CountEvidence | None]] = []
    for modality, layer in list_choices(source):
        try:
            with open_dataset(source, modality=modality, layer=layer) as ds:
                out.append((modality, layer, get_count_evidence(ds.matrix)))
        except VcellError:
            out.append((modality, layer, None))
    return out
