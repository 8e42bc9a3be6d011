"""Sources of public cells: presets of the atlases, their tables, and the paths that a table may contain.

Tables are untrusted. Their ids become names of local files, and their paths become URLs to read, so both are checked
here: an id must be a plain name, and a path must be in the source's own folder, bucket or host.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from vcelltools.atlas._remote import (
    SCHEMES,
    Access,
    Remote,
    check_segments,
    get_name,
    get_place,
    get_scheme,
    join_url,
    open_remote,
    show_url,
)
from vcelltools.errors import DataError, UsageError, checked, spell

if TYPE_CHECKING:
    import pandas as pd

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
INDEX_ENDINGS = (".parquet", ".csv", ".tsv", ".json")
FEATURES = ("GeneFull_Ex50pAS", "Gene", "GeneFull", "GeneFull_ExonOverIntron", "Velocyto")
TABLE_BYTES = 1 << 30
_ID_COLUMNS = ("srx_accession", "dataset_id", "id", "experiment", "sample", "accession")
_COLUMN_ARGUMENTS = {"id": "id_col", "path": "path_col", "cells": "count_col"}
_PATH_COLUMNS = ("file_path", "path", "url", "uri", "file")
_COUNT_COLUMNS = ("obs_count", "cell_count", "n_cells", "cells", "n_obs")
_CLOUD = "gs://arc-institute-virtual-cell-atlas"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A public atlas.

    Attributes
    ----------
    base
        Folder of its files, or address of its index; ``{release}`` is replaced by the release.
    release
        The default release, or None if there are no releases.
    hosts
        Further hosts of its files.
    """

    base: str
    release: str | None = None
    hosts: tuple[str, ...] = ()


PRESETS = {
    "scbasecount": Preset(base=f"{_CLOUD}/scbasecount/{{release}}", release="2026-01-12"),
    "tahoe-100m": Preset(base=f"{_CLOUD}/tahoe100M/{{release}}", release="2025-02-25"),
    "vcc-2025": Preset(base=f"{_CLOUD}/virtual-cell-challenge/2025"),
    "cellxgene": Preset(
        base="https://api.cellxgene.cziscience.com/curation/v1/datasets",
        hosts=("datasets.cellxgene.cziscience.com",),
    ),
}
# closed buckets that public scripts still use, and the new places of their files
GONE = {"arc-scbasecount": f"{_CLOUD}/scbasecount/2026-01-12", "arc-ctc-tahoe100": f"{_CLOUD}/tahoe100M/2025-02-25"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source whose table has been read and checked.

    Attributes
    ----------
    name
        Name of the source, without secrets.
    settings
        Release, feature and organism, if the source has them.
    table
        One row per experiment, with the columns of the source in their order.
    ids, urls
        (n,) name and URL of each experiment's file.
    paths
        (n,) paths in the table, without queries.
    cells
        (n,) float64 number of cells in the table, NaN if missing.
    remote
        The reader of the files.
    """

    name: str
    settings: dict[str, str]
    table: pd.DataFrame
    ids: list[str]
    urls: list[str]
    paths: list[str]
    cells: np.ndarray
    remote: Remote

    def __len__(self) -> int:
        return len(self.ids)


@checked
def open_source(
    source: str,
    *,
    release: str | None = None,
    feature: str | None = None,
    organism: str | None = None,
    id_col: str | None = None,
    path_col: str | None = None,
    count_col: str | None = None,
    access: Access | None = None,
) -> Source:
    """Read and check the table of a source.

    Parameters
    ----------
    source
        A preset (``PRESETS``), the URL or folder of such a layout, a folder of h5ad files, or an index file
        (.parquet, .csv, .tsv, .json).
    release, feature, organism
        The table of scBaseCount; the newest release, ``GeneFull_Ex50pAS`` and ``Homo_sapiens`` by default.
    id_col, path_col, count_col
        Columns of an index file; by default found by their usual names.

    Raises
    ------
    UsageError
        If the preset or scheme is not known, or the source does not use an option.
    DataError
        If the source does not exist, or its table is damaged or contains ids or paths that are not allowed.
    EnvironmentFault
        If access is denied, or a library is missing.
    """
    preset = PRESETS.get(source)
    if preset is None and get_scheme(source) == "file" and "/" not in source and "." not in source:
        _check_name(source)
    if preset is not None and release and preset.release is None:
        raise UsageError(f"{source} has no releases", hint=f"remove {spell('release')}")
    if preset is None and release:
        raise UsageError(
            "releases can only be chosen for a preset", hint="pass the folder of the release as the source"
        )
    base = preset.base.format(release=release or preset.release) if preset else source
    if get_scheme(base) == "gs" and (moved := GONE.get(get_place(base)[1])) is not None:
        raise DataError(f"{show_url(base)}: this bucket is closed", hint=f"its files are now at {moved}")
    remote = open_remote(base, access)
    hosts = preset.hosts if preset else ()
    settings = {"release": str(release or preset.release)} if preset and preset.release else {}
    common: dict[str, Any] = {"name": show_url(source), "remote": remote}
    columns = {"id": id_col, "path": path_col, "cells": count_col}
    if source == "cellxgene":
        return _read_index(base, b"json", columns, hosts=hosts, settings=settings, **common)
    if show_url(base).lower().endswith(INDEX_ENDINGS):
        _refuse_options(feature=feature, organism=organism)
        ending = show_url(base).lower().rpartition(".")[2].encode()
        return _read_index(base, ending, columns, hosts=hosts, settings=settings, **common)
    _refuse_options(id_col=id_col, path_col=path_col, count_col=count_col)
    feature, organism = feature or FEATURES[0], (organism or "Homo_sapiens").replace(" ", "_")
    for name, value in (("feature", feature), ("organism", organism)):
        if not ID_PATTERN.fullmatch(value):
            raise UsageError(
                f"{name} {value!r} is not a valid name", hint=f"use a name such as {FEATURES[0]} or Homo_sapiens"
            )
    table = join_url(base, "metadata", feature, organism, "sample_metadata.parquet")
    if remote.exists(table):
        settings |= {"feature": feature, "organism": organism}
        return _read_table(table, base, settings=settings, hosts=hosts, **common)
    if have := remote.find_all(join_url(base, "metadata")):
        features = [get_name(u) for u in have if u.endswith("/")]
        if features:
            where = join_url(base, "metadata", feature) if feature in features else join_url(base, "metadata")
            names = [get_name(u) for u in remote.find_all(where) if u.endswith("/")]
            wanted = organism if feature in features else feature
            raise DataError(
                f"{show_url(base)} has no table of {feature}, {organism}", hint=_suggest(wanted, names, "it has")
            )
    index = join_url(base, "curation", "v1", "datasets.json")
    if remote.exists(index):
        columns = dict.fromkeys(columns)
        return _read_index(index, b"json", columns, hosts=hosts, settings=settings, base=base, **common)
    return _list_folder(base, settings=settings, **common)


def _check_name(source: str) -> None:
    from pathlib import Path

    if not Path(source).exists():
        raise UsageError(
            f"no source is named {source!r}",
            hint=_suggest(source, list(PRESETS), "sources") + "; you can also pass a URL, a folder or an index file",
        )


def _refuse_options(**given: str | None) -> None:
    names = [k for k, v in given.items() if v]
    if names:
        raise UsageError(f"{', '.join(map(spell, names))} cannot be used with this source", hint="remove it")


def _suggest(wanted: str, names: Iterable[str], what: str) -> str:
    names = [str(n) for n in names]
    near = difflib.get_close_matches(wanted, names, 1, 0.6)
    listed = f"{what}: {', '.join(names[:30]) or 'nothing'}"
    return f"did you mean {near[0]!r}? {listed}" if near else listed


def _read_table(url: str, base: str, *, remote: Remote, **rest: Any) -> Source:
    """Read the table of samples of scBaseCount."""
    table = _parse(remote.read_whole(url, TABLE_BYTES), b"parquet", show_url(url))
    columns: dict[str, str | None] = {"id": "srx_accession", "path": "file_path", "cells": "obs_count"}
    return _make_source(table, columns, base, where=show_url(url), remote=remote, **rest)


def _read_index(
    url: str, ending: bytes, columns: dict[str, str | None], *, remote: Remote, base: str | None = None, **rest: Any
) -> Source:
    """Read an index file; a JSON list with assets is that of CELLxGENE."""
    where = show_url(url)
    table = _parse(remote.read_whole(url, TABLE_BYTES), ending, where)
    if base is None:
        base = url.rpartition("/")[0] if get_scheme(url) not in ("http", "https") else join_url(url, "..")
        base = re.sub(r"/[^/?]*/\.\.(?=\?|$)", "", base)
    if "assets" in table.columns and "dataset_id" in table.columns:
        table = _flatten_cellxgene(table, where)
    for key, usual in (("id", _ID_COLUMNS), ("path", _PATH_COLUMNS), ("cells", _COUNT_COLUMNS)):
        wanted = columns[key]
        if wanted is not None and wanted not in table.columns:
            raise DataError(f"{where} has no column {wanted!r}", hint=_suggest(wanted, table.columns, "columns"))
        found = wanted or next((c for c in usual if c in table.columns), None)
        if found is None and key != "cells":
            raise DataError(
                f"{where}: the column of the {'ids' if key == 'id' else 'paths'} is not given",
                hint=f"set {spell(_COLUMN_ARGUMENTS[key])} to one of: {', '.join(map(str, table.columns))}",
            )
        columns = {**columns, key: found}
    return _make_source(table, columns, base, where=where, remote=remote, **rest)


def _parse(raw: bytes, ending: bytes, where: str) -> pd.DataFrame:
    """Parse a table, or raise a :class:`DataError` that names it."""
    import pandas as pd

    try:
        if ending == b"parquet":
            import pyarrow.parquet as pq

            frame = pq.read_table(io.BytesIO(raw)).to_pandas()
        elif ending == b"json":
            rows = json.loads(raw.decode("utf-8-sig"))
            if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
                raise DataError(f"{where} is not a list of objects", hint="use one object per experiment")
            frame = pd.DataFrame(rows)
        else:
            text = io.StringIO(raw.decode("utf-8-sig"))
            frame = pd.read_csv(text, sep="\t" if ending == b"tsv" else ",", dtype=object, keep_default_na=False)
    except DataError:
        raise
    except Exception as e:  # pyarrow and pandas raise many types of errors for damaged bytes
        raise DataError(f"{where} cannot be read as a table ({type(e).__name__})", hint="download it again") from None
    frame = frame.reset_index(drop=True)
    frame.columns = [str(c) for c in frame.columns]
    if frame.columns.duplicated().any():
        raise DataError(f"{where} has the column {frame.columns[frame.columns.duplicated()][0]!r} twice")
    if not len(frame):
        raise DataError(f"{where} lists no experiments")
    return frame


def _flatten_cellxgene(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the index of CELLxGENE with one text column per property, and the path and size of each h5ad file."""
    import pandas as pd

    rows = []
    for row in table.to_dict("records"):
        assets = row.get("assets") if isinstance(row.get("assets"), list) else []
        asset = next((a for a in assets if isinstance(a, dict) and a.get("filetype") == "H5AD"), None)
        if asset is None:
            continue
        flat: dict[str, Any] = {k: row.get(k) for k in ("dataset_id", "cell_count", "title", "collection_id")}
        for key in ("organism", "tissue", "disease", "assay", "cell_type"):
            terms = row.get(key) if isinstance(row.get(key), list) else []
            flat[key] = [str(t["label"]) for t in terms if isinstance(t, dict) and t.get("label")] or None
        primary = row.get("is_primary_data")
        flat["is_primary_data"] = [str(x).lower() for x in primary] if isinstance(primary, list) else None
        rows.append({**flat, "file_path": asset.get("url")})
    if not rows:
        raise DataError(f"{where} lists no h5ad files")
    return pd.DataFrame(rows)


def _make_source(
    table: pd.DataFrame,
    columns: dict[str, str | None],
    base: str,
    *,
    where: str,
    remote: Remote,
    name: str,
    settings: dict[str, str],
    hosts: tuple[str, ...] = (),
) -> Source:
    """Check the ids, paths and numbers of cells of a table."""
    import pandas as pd

    id_col, path_col, count_col = columns["id"], columns["path"], columns["cells"]
    for c in (id_col, path_col):
        if c not in table.columns:
            raise DataError(f"{where} has no column {c!r}", hint=f"columns: {', '.join(table.columns)}")
    ids = [_check_id(x, where) for x in table[id_col]]
    if len(set(ids)) < len(ids):
        twice = next(x for x in ids if ids.count(x) > 1)
        raise DataError(f"{where} lists {twice!r} twice", hint="an id must belong to one file")
    urls = [map_path(x, base, where=where, hosts=hosts) for x in table[path_col]]
    if count_col in table.columns:
        cells = pd.to_numeric(table[count_col], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        if (cells < 0).any() or np.isinf(cells).any():
            raise DataError(
                f"{where}: {count_col} holds {cells[(cells < 0) | np.isinf(cells)][0]:g}, which is not a number of "
                "cells"
            )
    else:
        cells = np.full(len(ids), np.nan)
    paths = [show_url(str(x)) for x in table[path_col]]
    table = table.assign(**{str(path_col): paths})
    return Source(
        name=name, settings=settings, table=table, ids=ids, urls=urls, paths=paths, cells=cells, remote=remote
    )


def _check_id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
        raise DataError(
            f"{where}: the id {value!r} is not allowed",
            hint="use only letters, digits and ._+-, starting with a letter or digit",
        )
    return value


def map_path(value: Any, base: str, *, where: str, hosts: tuple[str, ...] = ()) -> str:
    """Return the URL of a path in a table.

    A path in the source's own bucket, host or folder is used as it is. Any other path is mapped onto the base from
    ``h5ad/`` on. A relative path is below the base.

    Raises
    ------
    DataError
        For all other paths: another scheme, ``..``, or a path outside the folder.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a path is missing ({value!r})")
    scheme = get_scheme(value)
    check_segments(value, where)  # before parsing, because a URL parser drops line breaks
    if scheme not in SCHEMES or (":" in value.partition("/")[0] and "://" not in value):
        raise DataError(f"{where}: the path {show_url(value)!r} is not allowed", hint=f"schemes: {', '.join(SCHEMES)}")
    own, theirs = get_place(base), get_place(value)
    absolute = "://" in value or value.startswith("/")
    if not absolute:
        return join_url(base, value)
    if scheme == "file":
        root, path = show_url(base).rstrip("/") + "/", show_url(value)
        if own[0] == "file" and path.startswith(root):
            return value
    elif scheme == "memory":
        if own[0] == "memory" and value.startswith(base.rstrip("/") + "/"):
            return value
    elif own == theirs or (theirs[0] == "https" and theirs[1] in hosts):
        return value
    inside = re.search(r"/(h5ad/.+)$", show_url(value))
    if inside:
        return join_url(base, inside.group(1))
    if "datasets" in theirs[1].split(".")[0] and own[0] in ("file", "memory"):  # a mirror of CELLxGENE
        return join_url(base, "files", unquote(get_name(value)))
    raise DataError(
        f"{where}: the path {show_url(value)!r} is not allowed",
        hint="it is outside the folder, bucket or host of the source",
    )


def _list_folder(base: str, *, remote: Remote, name: str, settings: dict[str, str]) -> Source:
    """Make a source from the h5ad files in a folder, in its folder ``h5ad``, or one level below."""
    import pandas as pd

    found: list[str] = []
    todo = remote.find_all(base)
    inner = [u for u in todo if u.endswith("/") and not get_name(u).startswith(".")]
    found = [u for u in todo if u.endswith(".h5ad")]
    if not found:
        h5ad = [u for u in inner if get_name(u) == "h5ad"]
        found = [f for u in (h5ad or inner) for f in remote.find_all(u) if f.endswith(".h5ad")]
    if not found:
        raise DataError(
            f"{show_url(base)}: no table of experiments and no h5ad file was found", hint="check the address"
        )
    names = [get_name(u).removesuffix(".h5ad") for u in found]
    table = pd.DataFrame({"id": names, "file_path": found})
    columns: dict[str, str | None] = {"id": "id", "path": "file_path", "cells": None}
    return _make_source(table, columns, base, where=show_url(base), remote=remote, name=name, settings=settings)
