"""Gene identity (Ensembl ids and versions, symbols, aliases, duplicates), and several files as one.

``identity`` finds the gene of every column of a file; ``table`` reads tables of names; ``union`` opens several files as
one matrix over the union of their genes.
"""
