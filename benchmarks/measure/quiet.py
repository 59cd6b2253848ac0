"""Imported first by benchmarks that start processes: one thread each, on the CPU, and no network."""

import os

for _name, _value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)
