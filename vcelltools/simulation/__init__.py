"""Simulated Perturb-seq screens with known effects, streamed to any layout and any size.

``world`` is the model of a screen, ``simulate`` writes its cells.
"""
