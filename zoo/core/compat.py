"""What jax has renamed between the versions that purezoo supports; nothing else in the zoo tests versions."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the named sizes whose sharding the compiler propagates (Auto axes).

    jax 0.9 made Explicit the default axis type; the zoo states what it wants instead of relying on a default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(axes.values())
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {dict(axes)} needs {int(np.prod(sizes))} devices, there are {len(devices)}; "
            "one axis can be -1 in a run config to take what is left"
        )
    # A mesh axis may span parts of physical ones: 256 of the 8x8x8 chips of a v5p pod, say.
    layout = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return Mesh(layout, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
