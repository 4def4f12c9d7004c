"""The suite is written for CPUs, some of them simulated devices; JAX_PLATFORMS=cuda or tpu runs it elsewhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
