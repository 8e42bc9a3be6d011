"""The bare training step beside arc-state's: forward, backward and optimiser, same sizes, float32, CPU, interleaved.

    python benchmarks/bench_train.py --peer .peers/arc-state-0.11.1/bin/python --out benchmarks/results/train_step.json

Both sides run in processes of their own and take turns; batches are made beforehand, so that no loader is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

GENES, PERTS = 2000, 200
SHAPES = ((16, 32), (16, 64), (32, 64))
ROOT = Path(__file__).resolve().parent.parent

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with arc-state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ours, peer = Side(sys.executable, OURS), Side(args.peer, PEER)
    rows = []
    for sets, size in SHAPES:
        for side in (ours, peer):
            side.time(sets, size, 1)  # compile, warm up
        pairs = [(ours.time(sets, size, args.steps), peer.time(sets, size, args.steps)) for _ in range(args.rounds)]
        a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
        ratios = [q / p for p, q in pairs]
        rows.append({"sets": sets, "cells": size, "ours_ms": 1e3 * a, "arc_state_ms": 1e3 * b,
                     "speed_ratio": statistics.median(ratios), "ratios": ratios})  # fmt: skip
        print(rows[-1], flush=True)
    report = {"genes": GENES, "ours": ours.facts, "peer": peer.facts, "load": os.getloadavg(), "rows": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
