"""The rule sets of cell-eval, of the 2025 challenge and of vcelltools itself.

``score`` is the rule set, ``rules`` the table of differences, ``options`` its settings, ``truth`` and ``pack`` read and
save the truth, ``metrics`` computes the metrics, with ``edistance``, ``clustering`` and ``de_table`` (differential
expression) for those that need more, and ``baseline`` and ``ceiling`` the two ends of the scale.
"""
