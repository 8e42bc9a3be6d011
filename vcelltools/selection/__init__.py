"""Highly variable genes: one exact count pass, its statistics, and the flavours that rank genes.

``hvg`` is the command. ``count_pass`` counts, here or on a cluster (``distributed``), into ``histograms``;
``moments`` replaces them for fractional counts. ``statistics`` keeps and merges what was counted, ``trend`` fits the
variance to the mean, ``ranking`` ranks by a flavour of ``flavors/``. ``pooled`` treats several files as one
population and ``hvg_info`` writes its result for other programs, ``estimate`` answers ``--plan``, ``plot`` draws.
"""
