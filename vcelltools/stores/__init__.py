"""Stores: compact float16 files of one data set on a shared basis of genes. Open, read and verify them.

``basis`` chooses the genes, ``format`` defines the files, ``files`` writes them, ``store`` opens and reads, ``verify``
checks every byte; ``directions`` names the directions of perturbations; ``building/`` builds.
"""
