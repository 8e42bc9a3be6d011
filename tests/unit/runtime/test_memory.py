"""Free memory within the limits of cgroups, read from trees of files as the kernel shows them."""

from __future__ import annotations

import pytest

from vcelltools.runtime.memory import get_free_memory

GIB = 1 << 30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


def make_tree(root, lines, groups):
    """Write a system with 16 GiB available, in these cgroups; ``groups`` has (limit, usage, cached) of each folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {16 * GIB >> 10} kB\n")
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    for folder, (limit, usage, cached) in groups.items():
        names = V1 if folder.startswith("memory") else V2
        here = root / "sys/fs/cgroup" / folder
        here.mkdir(parents=True, exist_ok=True)
        (here / names[0]).write_text(f"{limit}\n")
        (here / names[1]).write_text(f"{usage}\n")
        own = f"active_file 1\ninactive_file 1\n{names[2]}active_file {cached}\n{names[2]}inactive_file {GIB}\n"
        (here / "memory.stat").write_text("anon 5\n" + own)


@pytest.mark.parametrize(
    ("lines", "groups", "free"),
    [
        (["0::/"], {".": (4 * GIB, 3 * GIB, GIB)}, 3 * GIB),
        (["0::/"], {".": ("max", 3 * GIB, GIB)}, 16 * GIB),
        (["0::/job/step"], {"job": (5 * GIB, 2 * GIB, 0), "job/step": ("max", GIB, 0)}, 4 * GIB),
        (["0::/job/step"], {"job": (9 * GIB, 2 * GIB, 0), "job/step": (3 * GIB, 3 * GIB, 0)}, GIB),
        (["4:cpu:/x", "7:memory:/job"], {"memory/job": (4 * GIB, 3 * GIB, GIB)}, 3 * GIB),
        (["7:memory:/"], {"memory": ((1 << 63) - 4096, 3 * GIB, GIB)}, 16 * GIB),
        (["7:memory:/docker/abc", "0::/docker/abc"], {"memory": (2 * GIB, 2 * GIB, 0)}, GIB),  # a container
        (["7:cpu:/job", "nonsense", ""], {"job": (GIB, 0, 0)}, 16 * GIB),
    ],
)
def test_the_tightest_limit_counts(tmp_path, lines, groups, free):
    make_tree(tmp_path, lines, groups)
    assert get_free_memory(tmp_path) == free


def test_without_cgroups_the_system_answers(tmp_path):
    assert get_free_memory(tmp_path) >= get_free_memory() > 0
