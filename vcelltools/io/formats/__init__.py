"""Readers of file formats, one per module.

``anndata`` (h5ad and h5mu), ``zarr``, ``tenx`` (Cell Ranger and Space Ranger), ``loom``, ``texttable`` (CSV, TSV) and
``batchfile`` are recognised by their content in ``io.dataset``; to add a format, write a module and call it there.
``vcc`` reads and writes the tar of a ``.vcc``; the room ``challenge`` checks the content of submissions.
"""
