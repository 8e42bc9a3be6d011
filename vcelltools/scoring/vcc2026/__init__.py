"""The rule set of the 2026 challenge: six metrics between a mean-response baseline (0) and a replicate (1).

``score`` is the rule set, ``truth`` and ``pack`` read and save the truth, ``counts`` reads counts by gene,
``profiles`` computes the profiles that ``metrics`` compares, and ``anchors`` computes both ends of the scale.
"""
