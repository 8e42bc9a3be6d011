"""The short form of ``make torture``: every drill for some seconds."""

from __future__ import annotations

from tests.torture.drills import run_all


def test_nothing_breaks(tmp_path):
    drills = {d.name: d for d in run_all(tmp_path, seconds=4, seed=7)}
    assert {n: d.failures for n, d in drills.items() if d.failures} == {}
    done = {k: sum(d.counts.get(k, 0) for d in drills.values()) for k in ("files mutated", "kills", "bit flips")}
    done |= {k: sum(d.counts.get(k, 0) for d in drills.values()) for k in ("full disks", "containers mutated")}
    done |= {k: sum(d.counts.get(k, 0) for d in drills.values()) for k in ("outputs", "caches damaged", "changes")}
    assert all(done.values()), done
