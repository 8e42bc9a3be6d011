"""Write the prediction of a trained run as a file of cells, streamed, and rounded to counts under the rules of 2026.

``predict`` is the command, and ``result`` defines what it returns. ``shifted_cells`` and ``emission`` generate cells
from effects, which ``emitter`` shrinks first. ``genes_outside`` predicts genes outside the basis, ``unseen`` handles
perturbations that no store has, and ``baseline`` and ``diffusion`` write the predictions of these models.
"""
