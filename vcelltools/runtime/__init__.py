"""Shared machinery for running work; nothing in this room depends on the kind of work.

``progress`` reports, ``threads`` share work, ``prefetch`` reads ahead, ``memory`` measures and limits, ``cluster``
connects to Dask.
"""
