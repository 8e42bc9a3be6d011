"""Evaluate many models on many splits, with the scores of every held-out group and tables with paired intervals.

``evaluate`` is the command: it runs every model on every one of the ``splits``, adds predictions of other tools
from ``external``, and writes the ``table``. ``pair`` compares two runs.
"""
