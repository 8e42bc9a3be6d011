"""A structure-aware fuzzer of the readers and of ``hvg``.

``seeds`` writes small valid files, ``mutations`` damages them, ``oracle`` reads the result naively, ``child`` runs
mutants one after another in a process of its own, and ``harness`` watches it: never a signal, never a hang, never
another gene list than the naive reader's without an error.

    python -m tests.fuzz --minutes 10 --seed 1
"""
