"""What every test runs under: one thread a process, no waiting loops, no network for model hubs."""

import os

# Before torch is imported: OpenMP's threads of several processes on the same cores wait for each other otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
