"""Write files atomically: temporary files, locks, checks for disk space, and streamed h5ad files.

``guard`` checks outputs before any work. ``atomic`` writes beside the target and renames; it converts errors of the
operating system (no space, no permission) to exceptions with exit code 4. ``h5ad`` and ``zarr`` stream a matrix, with
``sink`` for arrays that grow, ``transpose`` for columns, ``encode`` for obs, var and uns, and ``extras`` for the rest.
"""
