"""Run in the peer's own Python: scores and calibrates with scPertEval, and prints every value as JSON.

python peer_scperteval.py TRUTH PRED SEED PROTOCOL ...
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")


def main() -> None:
    import scperteval as sp

    truth, pred, seed, *protocols = sys.argv[1:]
    options = {"perturbation_key": "target_gene", "control_label": "non-targeting", "seed": int(seed), "workers": 2}
    prepared = sp.prepare(truth, protocols, **options)
    out = {}
    for protocol in protocols:
        found = {}
        done = sp.score(prepared, protocol, pred)
        found["score"] = dict(zip(done.per_perturbation["perturbation"], done.per_perturbation["score"], strict=True))
        for calibrator in ("drf", "bds"):
            done = sp.calibrate(prepared, protocol, calibrator=calibrator)
            table = done.per_perturbation
            found[calibrator] = done.aggregate
            found["positive"] = dict(zip(table["perturbation"], table["raw_positive"], strict=True))
            found["negative"] = dict(zip(table["perturbation"], table["raw_negative"], strict=True))
        out[protocol] = found
    print(json.dumps(out))


if __name__ == "__main__":
    main()
