"""The only place that opens h5ad, h5mu, zarr and 10x files, and that writes h5ad.

:func:`open_dataset` validates once and hands out a :class:`Dataset`: a matrix that streams chunks from any
thread, and lazily read ``obs`` and ``var`` tables.
"""

from vcelltools.io.columns import read_columns, select_columns
from vcelltools.io.counts import CountEvidence, get_count_evidence, require_counts, survey_counts
from vcelltools.io.dataset import Dataset, open_dataset
from vcelltools.io.matrix import Buffers, CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span
from vcelltools.io.table import Column, Table
from vcelltools.io.write import H5adWriter

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
    "get_count_evidence",
    "open_dataset",
    "read_columns",
    "require_counts",
    "select_columns",
    "survey_counts",
]
