"""Run in the peer's own Python: scores every job of a JSON list with cell-eval, in one process.

A job: {"pred", "real", "out", "args": [...], "score": whether final scores are wanted}; the peer's exception, if any,
is written to OUT/error.txt.
"""

import argparse
import json
import logging
import pathlib
import sys
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)


def main() -> None:
    from cell_eval._cli import parse_args_run, run_evaluation

    for job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        out = pathlib.Path(job["out"])
        parser = argparse.ArgumentParser()
        parse_args_run(parser)
        args = ["-ar", job["real"], "-o", str(out), *job["args"]]
        if job["pred"] is not None:
            args += ["-ap", job["pred"]]
        try:
            run_evaluation(parser.parse_args(args))
            if job.get("score"):
                score_against_baseline(job, out)
        except Exception as e:
            out.mkdir(parents=True, exist_ok=True)
            (out / "error.txt").write_text(f"{type(e).__name__}: {e}")


def score_against_baseline(job: dict, out: pathlib.Path) -> None:
    """Make the peer's baseline of the truth, evaluate it as the prediction was, and write the final scores."""
    from cell_eval._baseline import build_base_mean_adata
    from cell_eval._cli import parse_args_run, run_evaluation
    from cell_eval._score import score_agg_metrics

    base = out / "base"
    build_base_mean_adata(job["real"], output_path=str(out / "base.h5ad"))
    parser = argparse.ArgumentParser()
    parse_args_run(parser)
    args = ["-ar", job["real"], "-ap", str(out / "base.h5ad"), "-o", str(base), *job["args"]]
    run_evaluation(parser.parse_args(args))
    score_agg_metrics(str(out / "agg_results.csv"), str(base / "agg_results.csv"), output=str(out / "final.csv"))


if __name__ == "__main__":  # pdex 0.1 starts worker processes
    main()
