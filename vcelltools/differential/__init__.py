"""Reduce cells to groups by perturbation, and test each group against the controls.

``de`` writes the table of results, and ``pseudobulk`` writes sums. ``cell_labels`` reads labels and contexts, and
``expression`` determines the scale of the values. ``reduce`` and ``groupsums`` stream the cells into groups,
``sorted_values`` sorts their values by gene to rank them, and ``partial_sums`` reproduces the order of numpy's sums.
The tests are ``ranks`` (rank sums over all genes), ``residuals`` (means with covariates), ``negative_binomial`` with
``glm``, and ``energy`` (distance between two sets of cells, which ``screen`` reads). ``runners`` calls the requested
test. The kernels of the tests and of the p-value adjustment are in ``kernels``.
"""
