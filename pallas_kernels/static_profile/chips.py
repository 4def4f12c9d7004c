"""What a TPU chip can do in a cycle, and the TPU topologies that the compiler knows without the chips."""

import dataclasses
import os
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip (of one jax device); `cores` TensorCores share its memory."""

    topology: str
    clock: float  # Hz
    cores: int
    mxu_flops: int  # bfloat16, per cycle, of the whole chip; int8 does twice as many
    matmul_cycles: int  # cycles that one packed (8 sublanes) instruction occupies its matrix unit
    mxus: int  # matrix units of one core
    hbm_bandwidth: float  # bytes per second
    valu_slots: int = 4  # vector arithmetic instructions per cycle and core, each 8 x 128 lanes
    eup_slots: int = 1  # transcendental instructions per cycle and core, each 8 x 128 lanes

    @property
    def valu(self) -> int:
        """Float32 additions or multiplications per cycle of the whole chip; there is no fused multiply-add."""
        return self.cores * self.valu_slots * LANES

    @property
    def eup(self) -> int:
        """Transcendentals per cycle of the whole chip."""
        return self.cores * self.eup_slots * LANES

    def hbm_cycles(self, size: float) -> float:
        """Cycles that `size` bytes take to or from memory."""
        return size * self.clock / self.hbm_bandwidth


LANES = 8 * 128

# Peak bfloat16 and int8 rates, matrix units and memory bandwidth: cloud.google.com/tpu/docs/{v5e,v5p,v6e}
# (197/393, 459/918, 918/1836 TFLOP/s; 4 units of 128 x 128 per core, on v6e 2 of 256 x 256; 819, 2765, 1638 GB/s).
# Clocks are not published there: they follow as peak rate / FLOPs per cycle, with 1 row per cycle and unit on v5 and
# 2 on v6e (an instruction of 16 bfloat16 rows issues every 8 cycles in its schedules), and agree with the
# 1.5 GHz and 1.75 GHz of jax-ml.github.io/scaling-book. Slots per cycle: the capacities in the compiler's dumps.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 1, 4 * 128 * 128 * 2, 16, 4, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2, 2 * 4 * 128 * 128 * 2, 16, 4, 2765e9),
    "v6e": Chip("v6e:2x2", 1.75e9, 1, 2 * 256 * 256 * 2 * 2, 8, 2, 1638e9),
}

# libtpu looks for a metadata server and takes a lock unless it is told that it is alone.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: str) -> list[Any]:
    """The devices of a TPU topology, to compile for.

    Args:
      topology: a name of `CHIPS`, or a full one such as "v5e:2x4".

    Returns:
      The topology's devices.

    Raises:
      ValueError: the name has another form, or libtpu is missing or knows no such topology.
    """
    name = CHIPS[topology].topology if topology in CHIPS else topology
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise ValueError(f"topology={topology!r} must be one of {sorted(CHIPS)} or look like v5e:2x4")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise ValueError(
            f"libtpu gives no topology {name!r} ({str(error).splitlines()[0]}); it comes with pip install -e '.[dev]'"
        ) from error
