"""From stores to batches: splits, the sampler that draws the cells of a batch, and the loader that reads them.

A batch depends only on the seed and its number. ``sampler`` draws cells, ``loader`` reads them, ``splits`` assigns
groups to the parts of a split, and ``repeated`` rejects stores that share cells. ``effects`` and ``pseudobulk`` reduce
stores for models of effects. ``single_cells`` and ``tokens`` serve models of single cells, and ``lines`` names a cell
line of a store.
"""
