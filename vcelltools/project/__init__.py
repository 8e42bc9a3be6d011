"""Project set-up: write a first ``vcelltools.toml`` (``init``), check the machine (``doctor``), run a ``demo``."""
