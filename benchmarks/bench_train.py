"""Training beside arc-state: the bare step, and the whole way from files to trained steps; float32, CPU, in turns.

    python -m benchmarks.bench_train [step | whole | predict | wait]

Sizes are equal on both sides: 2,000 genes, h128, 4 layers, 8 heads, the energy loss, two threads. The bare step
(forward, backward, clipping, optimiser) is timed on batches that were made beforehand; each side computes as it does
by default (ours in microbatches that stay in the caches). The whole way reads the same cells, ours from a store,
STATE's from an h5ad by cell-load. Each side is a process of its own. ``predict`` has no peer: it states how much memory
the commands take, imports and compilation included, to train on and predict 20,000 cells of 18,080 genes. ``wait``
has none either: it states the share of a training step that waits for cells, of a store in the page cache or, with
``--cells 1000000`` in a cgroup or container of 1.5 GB, of one that is larger than the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import DATA, ROOT, need_peer, run_once, save
from benchmarks.harness import OURS as COMMAND
from vcelltools.stores.store import open_store

GENES, PERTS, CELLS = 2000, 200, 40_000
SHAPES = ((16, 32), (16, 64), (32, 64))
WHOLE_SHAPE = (16, 64)
SCREEN = {"cells": 40_000, "genes": 18_080, "perturbations": 150}
PREDICTED = (100, 200)  # perturbations and cells of each

OURS = r"""
import sys, time, json
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from vcelltools.model.mesh import feed, make_mesh, replicate
from vcelltools.model.network import make_config, count_params
from vcelltools.model.step import StepConfig, init_state, make_data, make_step
G, P = int(sys.argv[1]), int(sys.argv[2])
mesh = make_mesh(jax.devices()[:1])
model, config = make_config("rn", genes=G, perturbations=P), StepConfig(steps=100000, ema=0.0)
data = replicate(mesh, make_data(np.zeros((P, G)), np.ones((1, G))))
step = make_step(model, config, mesh, "host")
state = replicate(mesh, init_state(model, config, 0))
def make(b, s):
    rng = np.random.default_rng(0)
    x = {k: rng.gamma(1, 1, (b, s, G)).astype(np.float16) for k in ("control", "target")}
    sizes = {"pert": P, "prior": P, "context": 1, "dataset": 1}
    ids = {k: rng.integers(0, n, b, dtype=np.int32) for k, n in sizes.items()}
    return feed(mesh, {**x, **ids}, b)
batches = {}
print(json.dumps({"parameters": count_params(state.params), "version": jax.__version__}), flush=True)
for line in sys.stdin:
    b, s, n = map(int, line.split())
    if (b, s) not in batches:
        batches[b, s] = make(b, s)
        state, m = step(state, data, batches[b, s]); jax.block_until_ready(m)
    t = time.perf_counter()
    for _ in range(n):
        state, m = step(state, data, batches[b, s])
    jax.block_until_ready((state, m))
    print((time.perf_counter() - t) / n, flush=True)
"""

WHOLE = r"""
import sys, time, tempfile
began = time.perf_counter()
import jax
jax.config.update("jax_platforms", "cpu")
from benchmarks.stepclock import StepClock
from vcelltools.runtime.memory import peak_memory
from vcelltools.stores.store import open_store
from vcelltools.training.train import Trainer
from vcelltools.training.settings import make_settings
from vcelltools.training.inputs import make_setup
work, sets, size, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
settings = make_settings({}, {"out": tempfile.mkdtemp(), "size": "rn", "sets": sets, "set_size": size, "steps": 100000,
    "energy": 1.0, "delta": 0.0, "pearson": 0.0, "rank": 0.0})
trainer = Trainer(make_setup(settings, [open_store(work + "/x")]), None)
state, clock = trainer.init_state(), StepClock(began, 2 * sets * size, seconds)
with trainer.feed_batches(0, 100000) as feed:
    while True:
        state, m = trainer.step(state, trainer.data, trainer.put(next(feed)))
        jax.block_until_ready(m)
        if clock.tick():
            break
print(clock.report(peak_memory()))
"""

PEER = r"""
import sys, time, json, warnings
warnings.filterwarnings("ignore")
import torch, importlib.metadata as im
from state.tx.models.state_transition import StateTransitionPerturbationModel
torch.set_num_threads(2)
G, P = int(sys.argv[1]), int(sys.argv[2])
models = {}
def make(b, s):
    m = StateTransitionPerturbationModel(
        input_dim=G, hidden_dim=128, output_dim=G, pert_dim=P, batch_dim=None, predict_residual=True,
        distributional_loss="energy", transformer_backbone_key="llama", output_space="gene", gene_dim=G,
        transformer_backbone_kwargs=dict(bidirectional_attention=True, max_position_embeddings=s, hidden_size=128,
            intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, head_dim=16,
            use_cache=False, attention_dropout=0.0, hidden_dropout=0.0, layer_norm_eps=1e-6, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, rotary_dim=0, use_rotary_embeddings=False),
        cell_set_len=s, blur=0.05, loss="energy", n_encoder_layers=1, n_decoder_layers=1, softplus=True, dropout=0.0,
        batch_encoder=False, confidence_token=False, lr=1e-3, embed_key="X_hvg",
    )
    m.train()
    m.log = m.log_dict = lambda *a, **k: None
    g = torch.Generator().manual_seed(0)
    x = {k: torch.rand((b * s, G), generator=g) for k in ("ctrl_cell_emb", "pert_cell_emb")}
    pert = torch.nn.functional.one_hot(torch.arange(b).repeat_interleave(s) % P, P).float()
    batch = {**x, "pert_emb": pert, "batch": torch.zeros(b * s, dtype=torch.long), "pert_name": ["p"] * (b * s),
             "pert_cell_counts": x["pert_cell_emb"]}
    return m, torch.optim.Adam(m.parameters(), lr=1e-3), batch
print(json.dumps({"version": im.version("arc-state"), "torch": torch.__version__}), flush=True)
def go(m, opt, batch):
    opt.zero_grad()
    loss = m.training_step(batch, 0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    opt.step()
for line in sys.stdin:
    b, s, n = map(int, line.split())
    if (b, s) not in models:
        models[b, s] = make(b, s)
        go(*models[b, s])
    t = time.perf_counter()
    for _ in range(n):
        go(*models[b, s])
    print((time.perf_counter() - t) / n, flush=True)
"""


class Side:
    """One implementation in a process of its own."""

    def __init__(self, python: str, code: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(
            [python, "-c", code, str(GENES), str(PERTS)], stdin=-1, stdout=-1, stderr=None, text=True, env=env
        )
        self.facts = self._read_json()

    def _read_json(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a side ended early")

    def time(self, sets: int, size: int, n: int) -> float:
        """Return the seconds of one step, the mean of ``n``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{sets} {size} {n}\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("a side ended early")
            try:
                return float(line)
            except ValueError:
                continue


def time_steps(peer: str, rounds: int, steps: int) -> list[dict]:
    """Time the bare steps in turns."""
    ours, theirs = Side(sys.executable, OURS), Side(peer, PEER)
    rows = []
    for sets, size in SHAPES:
        for side in (ours, theirs):
            side.time(sets, size, 1)  # compile, warm up
        pairs = [(ours.time(sets, size, steps), theirs.time(sets, size, steps)) for _ in range(rounds)]
        a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
        ratios = [q / p for p, q in pairs]
        rows.append(
            {
                "case": f"bare step, {sets} sets × {size} cells",
                "ours_ms": round(1e3 * a, 1),
                "peer_ms": round(1e3 * b, 1),
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
                "peer": f"arc-state {theirs.facts['version']}, torch {theirs.facts['torch']}",
                "jax": ours.facts["version"],
            }
        )
        sys.stdout.write(f"{rows[-1]}\n")
    return rows


def run_side(command: list[str]) -> dict:
    """Run a side to its end; return the JSON of its last line."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_whole(peer: str, rounds: int, seconds: float) -> list[dict]:
    """Time training from files, loader included, in turns; the same cells for both sides."""
    from benchmarks.bench_store import prepare

    work = DATA / f"store-{CELLS}"
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, CELLS, 1)
    pairs = []
    for _ in range(rounds):
        a = run_side([sys.executable, "-c", WHOLE, str(work), *map(str, WHOLE_SHAPE), str(seconds)])
        script = str(ROOT / "benchmarks/peers/state_train.py")
        b = run_side([peer, script, str(work), *map(str, WHOLE_SHAPE), str(seconds)])
        pairs.append((a, b))
        sys.stdout.write(f"{a} {b}\n")
    ratios = [a["cells_per_s"] / b["cells_per_s"] for a, b in pairs]
    sets, size = WHOLE_SHAPE

    def median(key: str, i: int) -> float:
        return statistics.median(p[i][key] for p in pairs)

    return [
        {
            "case": f"from files, loader included, {sets} sets × {size} cells",
            "ours_cells_per_s": round(median("cells_per_s", 0)),
            "peer_cells_per_s": round(median("cells_per_s", 1)),
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "ours_first_step_s": round(median("first_step_s", 0), 1),
            "peer_first_step_s": round(median("first_step_s", 1), 1),
            "ours_peak_mb": round(median("peak_mb", 0)),
            "peer_peak_mb": round(median("peak_mb", 1)),
            "cells": CELLS,
            "peer": "cell-load 0.10.4 + arc-state 0.11.1",
        }
    ]


def measure_waiting(steps: int, cells: int | None) -> list[dict]:
    """Return the share of a step that waits for data, and cells a second, with the cells fed from the host."""
    import shutil

    from vcelltools.runtime.memory import get_free_memory

    sizes = SCREEN if cells is None else {**SCREEN, "cells": cells, "genes": GENES}
    store = make_screen(sizes)
    here = DATA / "wait"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    settings = f'[train]\nfeed = "host"\nlog_every = 5\neval_every = {steps}\n'
    (here / "vcelltools.toml").write_text(settings, encoding="utf-8")
    options = ["--size", "tiny", "--steps", str(steps), "--sets", "16", "--out", str(here / "run"), "-q"]
    subprocess.run([*COMMAND, "train", "--store", str(store), *options], check=True, cwd=here)
    records = [json.loads(x) for x in (here / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [r for r in records if "data_wait_share" in r][1:]  # the first compiles
    share, speed = (statistics.median(r[k] for r in records) for k in ("data_wait_share", "cells_per_s"))
    row = {
        "case": "tiny, 16 sets × 64 cells, fed by the host",
        "store_mb": round((store / "X.f16").stat().st_size / 1e6),
        "free_mb": round(get_free_memory() / 1e6),
        "wait_share": round(share, 3),
        "cells_per_s": round(speed),
    }
    sys.stdout.write(f"{row}\n")
    return [row]


def make_screen(sizes: dict[str, int] = SCREEN) -> Path:
    """Return the store of a simulated screen, made once."""
    work = DATA / "predict" if sizes == SCREEN else DATA / f"screen_{sizes['cells']}"
    work.mkdir(parents=True, exist_ok=True)
    sim, store = str(work / "sim.h5ad"), work / "stores" / "sim"
    if not Path(sim).exists():
        options = [x for k, v in sizes.items() for x in (f"--{k}", str(v))]
        run_once([*COMMAND, "simulate", "--out", sim, *options, "--cell-lines", "2", "--seed", "3", "-q"])
    if not store.exists():
        run_once([*COMMAND, "basis", sim, "--top", str(GENES), "--out", str(work / "basis.txt"), "-q"])
        run_once(
            [*COMMAND, "build-store", sim, "--basis", str(work / "basis.txt"), "--pert-col", "target_gene", "--control",
             "non-targeting", "--cell-line-col", "cell_line", "--group-by", "batch", "--name", "sim",
             "--out", str(store.parent), "-q"]
        )  # fmt: skip
    return store


def measure_memory(steps: int) -> list[dict]:
    """Return the peak memory and wall time of ``train`` and ``predict`` on a simulated screen."""
    import shutil

    store, work = make_screen(), DATA / "predict"
    run, wanted = work / "run", work / "wanted.csv"
    shutil.rmtree(run, ignore_errors=True)
    trained, train_mb = run_once(
        [*COMMAND, "train", "--store", str(store), "--out", str(run), "--steps", str(steps), "-q"]
    )
    n_perts, each = PREDICTED
    groups = open_store(store).runs.query("~is_control")
    perts, lines = sorted(groups["perturbation"].unique())[:n_perts], sorted(groups["cell_line"].unique())
    rows = [f"{p},{each},{lines[i % len(lines)]}" for i, p in enumerate(perts)]
    wanted.write_text("\n".join(["target_gene,n_cells,context", *rows]) + "\n", encoding="utf-8")
    out = []
    for rules in (2025, 2026):
        target = work / f"pred{rules}.h5ad"
        command = ["predict", "--run", str(run), "--out", str(target), "--rules", str(rules)]
        wall, mb = run_once([*COMMAND, *command, "--perturbations", str(wanted), "--force", "-q"])
        out.append((f"predict, {len(rows) * each:,} cells × {SCREEN['genes']:,} genes, rules {rules}", wall, mb))
        target.unlink()
    out.insert(0, (f"train, rn, {SCREEN['cells']:,} cells, {steps} steps of 32 sets × 64 cells", trained, train_mb))
    rows = [{"case": case, "seconds": round(wall, 1), "peak_mb": round(mb)} for case, wall, mb in out]
    sys.stdout.write("".join(f"{r}\n" for r in rows))
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["step", "whole", "predict", "wait", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--cells", type=int, help="of the store of wait; by default 40,000 of 18,080 genes")
    args = parser.parse_args()
    if args.which == "all":  # each in a process of its own: a child's peak begins with the memory of who started it
        for part in ("step", "whole", "predict", "wait"):
            subprocess.run([sys.executable, "-m", "benchmarks.bench_train", *sys.argv[1:], part], check=True)
        return
    rows = []
    if args.which == "step":
        rows += time_steps(need_peer("arc-state-0.11.1"), args.rounds, args.steps)
    elif args.which == "whole":
        rows += time_whole(need_peer("arc-state-0.11.1"), max(1, args.rounds // 2), args.seconds)
    elif args.which == "predict":
        rows += measure_memory(4 * args.steps)
    else:
        rows += measure_waiting(10 * args.steps, args.cells)
    sys.stdout.write(f"{save('train', rows, genes=GENES)}\n")


if __name__ == "__main__":
    main()
