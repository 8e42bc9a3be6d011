"""Run by the Python of cell-eval2: score the pairs of a folder and print JSON. Not a test."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

warnings.simplefilter("ignore")
import logging  # noqa: E402

logging.disable(logging.CRITICAL)


def main(folder: str, backend: str, extra_path: str, with_anchors: list[str]) -> None:
    if extra_path:
        sys.path.append(extra_path)
    import anndata as ad
    from cell_eval2.anchor import compute_replicate_anchor
    from cell_eval2.baseline import build_baseline_prediction, generic_response_profile
    from cell_eval2.config import EvalConfig
    from cell_eval2.run import aggregate_metrics, compute_metrics, metric_output_names

    cfg = EvalConfig.from_preset("vcc2026")
    cfg = replace(cfg, pert_col="target_gene", de=replace(cfg.de, backend=backend), num_threads=1)
    names = metric_output_names(cfg)
    out = {}
    for real_path in sorted(Path(folder).glob("*.real.h5ad")):
        name = real_path.name.removesuffix(".real.h5ad")
        real, pred = ad.read_h5ad(real_path), ad.read_h5ad(str(real_path).replace(".real.", ".pred."))
        entry = {}
        try:
            tidy = compute_metrics(pred, real, config=cfg)
            entry["tidy"] = tidy.select(["perturbation", "metric", "value"]).rows()
            agg = aggregate_metrics(tidy, metrics=names)
            entry["mean"] = dict(zip(agg["metric"].to_list(), agg["mean"].to_list(), strict=True))
        except ValueError as e:
            entry["error"] = str(e)
        if name in with_anchors:
            try:
                profile = generic_response_profile(real, pert_col="target_gene", control="non-targeting")
                base = build_baseline_prediction(profile, real, pert_col="target_gene", control="non-targeting")
                loose = replace(cfg, allow_fractional_counts=True)
                agg = aggregate_metrics(compute_metrics(base, real, config=loose), metrics=names)
                entry["baseline"] = dict(zip(agg["metric"].to_list(), agg["mean"].to_list(), strict=True))
                _, anchor = compute_replicate_anchor(real, config=cfg)
                entry["ceiling"] = dict(zip(anchor["metric"].to_list(), anchor["replicate"].to_list(), strict=True))
            except ValueError as e:
                entry["anchor_error"] = str(e)
        out[name] = entry
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(","))
