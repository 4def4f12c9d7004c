"""Speed and memory beside transformers (torch CPU), and Samba beside its transformer twin.

    pip install -e ".[dev]"
    python launch/main.py --config=launch/configs/benchmark.py --workdir=runs/benchmark

About 15 minutes on 2 CPU cores with 8 GB. A shorter one: --config.benchmark.suites="('samba',)".
The tiny presets, training beside transformers, and the recurrent ones by position and length:
--config.benchmark.suites="('training', 'positions', 'memory')" (some: --config.benchmark.models).
The kernels, on the CPU or a chip: --config.benchmark.suites="('ops',)", their numbers checked on the chip before they
are timed, beside XLA and what is installed of cuDNN, splash attention, torch, flash-linear-attention and mamba_ssm.
With --config.benchmark.record=docs/measurements.md the table is appended to that page, with device, versions and date.
Expected on 2 cores: see docs/measurements.md.
"""

from launch.configs import base


def get_config():
    """All suites, medians of three."""
    config = base.get_config()
    config.mode = "benchmark"
    return config
