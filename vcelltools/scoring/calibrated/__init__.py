"""The profile ``calibrated``: metrics on pseudobulks, and a calibration of each metric on the data.

``moments`` reduces a file to means and variances. ``metrics`` compares pseudobulks. ``controls`` computes the positive
and negative controls of the truth and calibrates the metrics with them. ``score`` is the rule set.
"""
