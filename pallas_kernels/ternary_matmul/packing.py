"""Layouts of ternary weights at two bits each: pure functions between int8 [N, K] and bytes.

A weight w in {-1, 0, 1} is stored as a code of two bits, four codes to a byte. For W [N, K] (N outputs, K inputs):

  layout        bytes      code   which four weights share a byte                                 multiples
  hf            [N/4, K]   w + 1  rows r, r + N/4, r + 2 N/4, r + 3 N/4, lowest bits first        N of 4
  i2_s          [N, K/4]   w + 1  columns p, p + 32, p + 64, p + 96 of 128, highest bits first    K of 128
  w2a8          [N, K/4]   w + 2  columns c, c + 4, c + 8, c + 12 of 16, lowest bits first, rows  N of 16, K of 32
                                  and columns of a tile of 16 x 32 reordered for one GPU warp
  i2_s_columns  [K/4, N]   w + 1  i2_s transposed: what the TPU kernel reads                      K of 128

hf is that of transformers' checkpoints, i2_s the one of bitnet.cpp on x86 (without the scale that ends its data), w2a8
that of its GPU kernels. The fourth code is not ternary: it counts as 0, and `repack` refuses it.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to pack.

    Attributes:
      outputs: N must be a multiple of this.
      inputs: K must be a multiple of this.
      join: uint8 codes [N, K] -> bytes.
      split: bytes -> uint8 codes [N, K].
      zero: the code of 0; the codes of -1 and 1 are its neighbours.
      transposed: whether the bytes are [K / 4, N].
      by_outputs: whether the bytes are [N / 4, K].
    """

    outputs: int
    inputs: int
    join: Callable[[Any], Any]
    split: Callable[[Any], Any]
    zero: int = 1
    transposed: bool = False
    by_outputs: bool = False

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the bytes of N = `outputs` by K = `inputs` weights."""
        if self.by_outputs:
            return outputs // 4, inputs
        return (inputs // 4, outputs) if self.transposed else (outputs, inputs // 4)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(N, K) of bytes of a shape."""
        if self.by_outputs:
            return 4 * shape[0], shape[1]
        return (shape[1], 4 * shape[0]) if self.transposed else (shape[0], 4 * shape[1])


def _join(codes, axis: int, shifts: tuple[int, ...]):
    """Four codes along an axis -> one byte."""
    parts = [jnp.take(codes, i, axis=axis) << shift for i, shift in enumerate(shifts)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def _split(packed, axis: int, shifts: tuple[int, ...]):
    """The inverse of `_join`."""
    return jnp.stack([(packed >> shift) & 3 for shift in shifts], axis=axis)


_LOWEST_FIRST, _HIGHEST_FIRST = (0, 2, 4, 6), (6, 4, 2, 0)


def _join_hf(codes):
    return _join(codes.reshape(4, -1, codes.shape[1]), 0, _LOWEST_FIRST)


def _split_hf(packed):
    return _split(packed, 0, _LOWEST_FIRST).reshape(-1, packed.shape[1])


def _join_i2_s(codes):
    return _join(codes.reshape(codes.shape[0], -1, 4, 32), 2, _HIGHEST_FIRST).reshape(codes.shape[0], -1)


def _split_i2_s(packed):
    return _split(packed.reshape(packed.shape[0], -1, 32), 2, _HIGHEST_FIRST).reshape(packed.shape[0], -1)


def _join_w2a8(codes):
    # A thread of the warp reads 16 weights: threads are ordered by half of the rows, half of the columns, row.
    tiles = codes.reshape(codes.shape[0] // 16, 2, 8, codes.shape[1] // 32, 2, 4, 4)
    return _join(tiles.transpose(0, 3, 1, 4, 2, 5, 6), 5, _LOWEST_FIRST).reshape(codes.shape[0], -1)


def _split_w2a8(packed):
    outputs, inputs = packed.shape[0], 4 * packed.shape[1]
    tiles = _split(packed.reshape(outputs // 16, inputs // 32, 2, 2, 8, 4), 5, _LOWEST_FIRST)
    return tiles.transpose(0, 2, 4, 1, 3, 5, 6).reshape(outputs, inputs)


LAYOUTS = {
    "hf": Layout(4, 1, _join_hf, _split_hf, by_outputs=True),
    "i2_s": Layout(1, 128, _join_i2_s, _split_i2_s),
    "w2a8": Layout(16, 32, _join_w2a8, _split_w2a8, zero=2),
    "i2_s_columns": Layout(
        1, 128, lambda codes: _join_i2_s(codes).T, lambda packed: _split_i2_s(packed.T), transposed=True
    ),
}


def find(name: str, where: str = "packing") -> Layout:
    """The layout of a name.

    Raises:
      ValueError: there is no such layout.
    """
    if name not in LAYOUTS:
        nearest = difflib.get_close_matches(str(name), LAYOUTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: layout must be one of {tuple(LAYOUTS)}, got {name!r}; did you mean {nearest!r}?")
    return LAYOUTS[name]


def check_sizes(outputs: int, inputs: int, layout: str, where: str) -> None:
    """Raises unless a layout can hold N = `outputs` by K = `inputs` weights.

    Raises:
      ValueError: N or K is not a multiple of what the layout packs together.
    """
    rules = find(layout, where)
    for axis, size, multiple in (("N", outputs, rules.outputs), ("K", inputs, rules.inputs)):
        if size < 1 or size % multiple:
            raise ValueError(
                f"{where}: layout {layout!r} packs {axis} in multiples of {multiple}, got {axis}={size}; "
                f"pad the weights with zeros to {axis}={max(1, -(-size // multiple)) * multiple}"
            )


def check_packed(packed: Any, layout: str, where: str, name: str = "packed") -> tuple[int, int]:
    """(N, K) of packed weights.

    Raises:
      ValueError: not a matrix of bytes, or of a length that the layout never gives.
    """
    if not hasattr(packed, "shape") or len(packed.shape) != 2 or packed.dtype != jnp.uint8:
        got = f"{packed.dtype} {tuple(packed.shape)}" if hasattr(packed, "dtype") else type(packed).__name__
        raise ValueError(f"{where}: {name} must be a uint8 matrix in layout {layout!r}, got {got}")
    outputs, inputs = find(layout, where).sizes(packed.shape)
    check_sizes(outputs, inputs, layout, f"{where}: {name} {tuple(packed.shape)}")
    return outputs, inputs


def pack(weights: jax.Array, layout: str) -> jax.Array:
    """Packs ternary weights, four to a byte.

    Args:
      weights: int8 [N, K] of -1, 0 and 1.
      layout: a name of `LAYOUTS`.

    Returns:
      uint8 bytes, of the shape that the layout says.

    Raises:
      ValueError: wrong shape, dtype, size or layout; values other than -1, 0 and 1, unless under a transformation,
        where values are unknown.
    """
    find(layout, "pack")
    if not hasattr(weights, "shape") or len(weights.shape) != 2 or weights.dtype != jnp.int8:
        got = f"{weights.dtype} {tuple(weights.shape)}" if hasattr(weights, "dtype") else type(weights).__name__
        raise ValueError(f"pack: weights must be int8 [N, K], got {got}")
    check_sizes(*weights.shape, layout, "pack")
    if not isinstance(weights, Tracer):
        wrong = np.setdiff1d(np.asarray(weights), [-1, 0, 1])
        if wrong.size:
            raise ValueError(f"pack: weights must be -1, 0 and 1 alone, got {wrong[:4].tolist()}")
    rules = LAYOUTS[layout]
    return rules.join((jnp.asarray(weights) + rules.zero).astype(jnp.uint8))


def unpack(packed: jax.Array, layout: str) -> jax.Array:
    """The inverse of `pack`.

    Args:
      packed: uint8 bytes, of the shape that the layout says.
      layout: a name of `LAYOUTS`.

    Returns:
      int8 [N, K] of -1, 0 and 1; the fourth code reads as 0.

    Raises:
      ValueError: wrong shape, dtype or layout.
    """
    check_packed(packed, layout, "unpack")
    weights = LAYOUTS[layout].split(jnp.asarray(packed)).astype(jnp.int8) - LAYOUTS[layout].zero
    return jnp.where(jnp.abs(weights) == 2, 0, weights).astype(jnp.int8)


def repack(packed: jax.Array, source: str, target: str) -> jax.Array:
    """Brings packed weights from one layout to another, once, when they are loaded.

    Args:
      packed: uint8 bytes in the layout `source`.
      source: a name of `LAYOUTS`.
      target: a name of `LAYOUTS`, such as "i2_s_columns" for TPUs.

    Returns:
      uint8 bytes in the layout `target`.

    Raises:
      ValueError: wrong shape, dtype, size or layout; bytes with the fourth code (a sign of a wrong `source`), unless
        under a transformation, where values are unknown.
    """
    sizes = check_packed(packed, source, "repack")
    check_sizes(*sizes, target, "repack")
    codes = LAYOUTS[source].split(jnp.asarray(packed))
    fourth = (LAYOUTS[source].zero + 2) % 4
    if not isinstance(packed, Tracer) and bool(jnp.any(codes == fourth)):
        raise ValueError(f"repack: packed holds the code {fourth}, no weight of layout {source!r}; is it of another?")
    return LAYOUTS[target].join(codes + jnp.uint8(LAYOUTS[target].zero) - jnp.uint8(LAYOUTS[source].zero))
