"""Build a store with a plan, one pass over the source and one pass over the store, on one or more machines.

An interrupted build is resumed unless its source has changed.

- Before: ``request`` turns options or ``vcelltools.toml`` into data sets, ``labels`` reads the labels of the cells,
  ``plan`` decides cells, order and genes, ``layout`` the files, ``estimate`` says what the build will cost.
- The build: ``make`` builds one store, ``builder`` runs its two passes and resumes them. Pass one is ``pass_one_cells``
  or ``pass_one_genes``, by the layout of the file, into the files of ``work`` and its ``sums``; ``pass_two`` makes
  frames of them.
- The end: ``cells_table`` writes obs, ``tables`` the other tables and the manifest.
- Several at once: ``jobs`` runs processes, ``distributed`` a Dask cluster.
"""
