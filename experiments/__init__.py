"""The papers' tables and figures, measured: `python -m experiments --help`; to add one, see `experiments.record`."""
