"""Read h5ad, h5mu, zarr and 10x files, and write h5ad; no other room opens these files.

:func:`open_dataset` validates a file once and returns a :class:`Dataset`: a matrix that streams chunks from any
thread, and ``obs`` and ``var`` tables that are read lazily.

- The open file: ``dataset`` opens it, ``opened`` is the result, ``matrix`` its values in spans, ``stream`` the threads
  that read them and ``remote`` the workers of a cluster, ``chunks`` what kernels get, ``columns`` some genes alone,
  ``table`` obs and var, ``obsm`` coordinates, ``spill`` arrays in a temporary file.
- What it holds: ``counts`` (are these counts?), ``survey`` (which matrix is?), ``features`` (which columns are genes?),
  ``faults`` (errors for invalid values), ``rounding`` (fractional counts), ``library`` (totals of the transcriptome).
- Identity: ``fingerprint`` of any source by content, ``origin`` of a prediction.
- Other files: ``frame`` (parquet, feather, CSV), ``textfile`` (small files of users), ``results`` (what
  functions return).
- Folders: ``hdf5`` reads it safely, ``formats`` has a module per file format, ``write`` writes.
"""

from vcelltools.io.columns import read_columns, select_columns
from vcelltools.io.counts import CountEvidence, get_count_evidence
from vcelltools.io.dataset import Dataset, open_dataset
from vcelltools.io.matrix import Buffers, CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span
from vcelltools.io.survey import require_counts, survey_counts
from vcelltools.io.table import Column, Table
from vcelltools.io.write import atomic
from vcelltools.io.write.h5ad import H5adWriter

__all__ = [
    "Buffers",
    "Column",
    "CountEvidence",
    "CscMatrix",
    "CsrMatrix",
    "Dataset",
    "DenseMatrix",
    "H5adWriter",
    "Matrix",
    "Span",
    "Table",
    "atomic",
    "get_count_evidence",
    "open_dataset",
    "read_columns",
    "require_counts",
    "select_columns",
    "survey_counts",
]
