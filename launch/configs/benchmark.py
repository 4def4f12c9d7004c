"""Speed and memory beside transformers (torch CPU), and Samba beside its transformer twin.

    pip install -e ".[dev]"
    python launch/main.py --config=launch/configs/benchmark.py --workdir=runs/benchmark

About 15 minutes on 2 CPU cores with 8 GB. A shorter one: --config.benchmark.suites="('samba',)".
The kernels, on the CPU or a chip: --config.benchmark.suites="('ops',)".
Expected on 2 cores: see docs/measurements.md.
"""

from launch.configs import base


def get_config():
    """All suites, medians of three."""
    config = base.get_config()
    config.mode = "benchmark"
    return config
