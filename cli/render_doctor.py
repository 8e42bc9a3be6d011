"""Print the report of ``doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.project.doctor import DoctorReport


def show_doctor(o: Output, r: DoctorReport) -> None:
    """Print the report as JSON, or as a table of facts and a table of problems."""
    o.result(r.to_json())
    o.table(["", "this machine"], _facts(r), left=True)
    if r.problems:
        o.table(["\nproblem", "\nremedy"], [list(p) for p in r.problems], left=True)
    n = len(r.problems)
    o.done("no problem found" if n == 0 else f"{n} problem{'s' if n > 1 else ''} found", ("demo",) if n == 0 else ())


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 1e9:.2f} GB/s"


def _facts(r: DoctorReport) -> list[list[object]]:
    s, d, a = r.system, r.disk, r.accelerators
    quota = "" if s["cpu_quota"] is None else f", quota {s['cpu_quota']:.1f}"
    memory = "" if s["memory_bytes"] is None else f", {s['memory_bytes'] / 1e9:.0f} GB of memory"
    have = ", ".join(f"{k} {v}" for k, v in r.versions.items() if v)
    lack = ", ".join(k for k, v in r.versions.items() if v is None)
    devices = a.get("devices")
    seen = "not asked" if devices is None else f"{a['backend']}: {len(devices)} × {', '.join(dict.fromkeys(devices))}"
    tpu = f"{len(a['tpu_chips'])} chips, libtpu {a['libtpu'] or 'absent'}"
    return [
        ["system", f"Python {s['python']} on {s['platform']}"],
        ["processor", f"{s['usable_cores']} of {s['cores']} cores{quota}; {s['threads']} threads used{memory}"],
        ["packages", have],
        ["absent (optional)", lack or "none"],
        ["kernel cache", f"{r.cache['folder']} (writable)" if r.cache["writable"] else "none"],
        ["HDF5 filters", ", ".join(k for k, v in r.filters.items() if v)],
        ["  absent", ", ".join(k for k, v in r.filters.items() if not v) or "none"],
        ["disk", f"{d['folder']}: {d['free_bytes'] / 1e9:,.0f} GB free"],
        ["  speed", f"writes {_rate(d['write_per_s'])}, reads {_rate(d['read_per_s'])}"],
        ["accelerators", a.get("error", seen)],
        ["TPU", tpu],
    ]
