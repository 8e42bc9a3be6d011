"""Time group-lasso, the solver that SpaceTravLR's Python package imports, on columns that bench_spatial wrote.

    python group_lasso_fit.py COLUMNS.npz L1 GROUP

Prints the seconds, of the clock and of the processor, as JSON, and writes the coefficients.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import numpy as np
from group_lasso import GroupLasso


def main() -> None:
    warnings.simplefilter("ignore")
    held, l1, group = np.load(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    n = int(held["n_problems"])
    wall, cpu, coefficients = time.perf_counter(), time.process_time(), []
    for k in range(n):
        model = GroupLasso(
            groups=held[f"groups{k}"], l1_reg=l1, group_reg=group, n_iter=500, tol=1e-5, scale_reg="group_size",
            frobenius_lipschitz=True, supress_warning=True,
        )  # fmt: skip
        model.fit(held[f"X{k}"], held[f"y{k}"])
        coefficients.append(np.asarray(model.coef_).ravel())
    seconds = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    np.savez(sys.argv[1].replace(".npz", "_peer.npz"), *coefficients)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
