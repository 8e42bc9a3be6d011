"""Run in the peer's own Python: scores every job of a JSON list with cell-eval, in one process.

A job: {"pred", "real", "out", "args": [...]}; the peer's exception, if any, is written to OUT/error.txt.
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
        except Exception as e:
            out.mkdir(parents=True, exist_ok=True)
            (out / "error.txt").write_text(f"{type(e).__name__}: {e}")


if __name__ == "__main__":  # pdex 0.1 starts worker processes
    main()
