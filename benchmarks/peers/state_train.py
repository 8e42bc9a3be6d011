"""STATE fed by cell-load, from an h5ad to trained steps: python state_train.py WORK SETS CELLS SECONDS; last line JSON.

The model is that of the bare step (2,000 genes, h128, 4 layers, 8 heads, float32, 2 threads); the loader is
cell-load's default one in the training process. The first two steps, which allocate and warm up, are not counted.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.stepclock import StepClock

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


BACKBONE = {
    "bidirectional_attention": True, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16, "use_cache": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "layer_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rotary_dim": 0, "use_rotary_embeddings": False,
}  # fmt: skip


def make_model(genes: int, perts: int, size: int):
    from state.tx.models.state_transition import StateTransitionPerturbationModel

    model = StateTransitionPerturbationModel(
        input_dim=genes, hidden_dim=128, output_dim=genes, pert_dim=perts, batch_dim=None, predict_residual=True,
        distributional_loss="energy", transformer_backbone_key="llama", output_space="gene", gene_dim=genes,
        transformer_backbone_kwargs=BACKBONE | {"max_position_embeddings": size},
        cell_set_len=size, blur=0.05, loss="energy", n_encoder_layers=1, n_decoder_layers=1, softplus=True,
        dropout=0.0, batch_encoder=False, confidence_token=False, lr=1e-3, embed_key="X_hvg",
    )  # fmt: skip
    model.train()
    model.log = model.log_dict = lambda *a, **k: None
    return model


def main() -> None:
    from cell_load.data_modules import PerturbationDataModule

    work, sets, size, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(2)
    began = time.perf_counter()
    (work / "cl").mkdir(exist_ok=True)
    link = work / "cl/screen.h5ad"
    if not link.exists():
        link.symlink_to(work / "log.h5ad")
    toml = work / "cl.toml"
    toml.write_text(f'[datasets]\nscreen = "{work / "cl"}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
    module = PerturbationDataModule(
        str(toml), batch_size=sets, num_workers=0, pert_col="gene", batch_col="batch", cell_type_key="cell_type",
        control_pert="non-targeting", output_space="all", basal_mapping_strategy="batch", cell_sentence_len=size,
    )  # fmt: skip
    module.setup()
    model = optimizer = None
    clock = StepClock(began, 2 * sets * size, seconds)
    for batch in module.train_dataloader():
        if model is None:
            model = make_model(batch["pert_cell_emb"].shape[-1], batch["pert_emb"].shape[-1], size)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if len(batch["pert_cell_emb"]) < sets * size:
            continue  # the last batch of an epoch
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert torch.isfinite(loss)
        if clock.tick():
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(clock.report(peak) + "\n")


if __name__ == "__main__":
    main()
