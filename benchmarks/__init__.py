"""Measurements of the library's own cost, run from a checkout: ``python -m benchmarks.<name>``."""

import os

# OpenMP's threads else spin while they wait for each other, which counts as CPU time: on a busy machine single figures
# then doubled. It must be set before torch is imported, and holds for both sides of a comparison.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
