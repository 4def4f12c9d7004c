"""The suite is written for CPUs, some of them simulated devices; JAX_PLATFORMS=cuda or tpu runs it elsewhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PJRT_NPROC", "8")  # threads of XLA: simulated warpgroups that wait for each other hold one each
