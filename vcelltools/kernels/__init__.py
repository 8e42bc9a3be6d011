"""Numba kernels. They take and return plain arrays, report ``faults`` as a status and never raise.

- Counting and statistics: ``histogram``, ``moments``, ``pooled``, ``scan``, ``qc``, ``groupsums``, ``groupmoments``,
  ``pairwise``, ``mixture``.
- Tests: ``bucket`` (values by gene), ``ranksum``, ``strata``, ``labelings``, ``pvalues``, ``sorting``, ``tieorder``.
- Values: ``normalize``, ``transform``, ``thinning``, ``simulate``, ``tokens``, ``distance``, ``checks``.
- Layout and files: ``store``, ``cells``, ``transpose``, ``union``, ``heaps``, ``lzf``, ``deflate``, ``crc32c``.
- Tissue: ``received``, ``bilinear``, ``lasso``, ``transition``.

Only ``_jit`` compiles, ``cache`` manages compiled code, and ``load_numba`` loads numba.
"""

from vcelltools.kernels._lean import load_numba as load_numba
