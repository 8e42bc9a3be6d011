"""Benchmarks against the peers: equality first, then time, in one run."""
