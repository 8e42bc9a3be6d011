"""Commands on single files: inspect, convert, normalise, sample cells, measure quality.

``inspect`` (with the experiment ``card``), ``convert``, ``normalize`` and ``qc`` are commands; ``chosen_cells`` picks
cells for ``sample``, ``thinning`` lowers their depth, ``relayout`` streams a matrix from any layout to any other.
``io`` opens, reads and writes the files.
"""
