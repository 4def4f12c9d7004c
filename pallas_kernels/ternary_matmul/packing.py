"""Layouts of ternary weights at two bits each: pure functions between int8 [N, K] and bytes.

A weight w in {-1, 0, 1} is stored as a code of two bits, four codes to a byte. For W [N, K] (N outputs, K inputs):

  layout        bytes      code   which four weights share a byte                                 multiples
  hf            [N/4, K]   w + 1  rows r, r + N/4, r + 2 N/4, r + 3 N/4, lowest bits first        N of 4
  i2_s          [N, K/4]   w + 1  columns p, p + 32, p + 64, p + 96 of 128, highest bits first    K of 128
  w2a8          [N, K/4]   w + 2  columns c, c + 4, c + 8, c + 12 of 16, lowest bits first, rows  N of 16, K of 32
                                  and columns of a tile of 16 x 32 reordered for one GPU warp
  i2_s_columns  [K/4, N]   w + 1  i2_s transposed: what the TPU kernel reads                      K of 128

hf is that of transformers' checkpoints, i2_s the one of bitnet.cpp on x86 (without the scale that ends its data), w2a8
that of its GPU kernels. A code outside the three is not ternary: `pack` refuses it, `unpack` reads what the bits say.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to pack.

    Attributes:
      outputs: N must be a multiple of this.
      inputs: K must be a multiple of this.
      transposed: whether the first axis of the bytes is K / 4.
      by_outputs: whether it is N that the bytes divide by four.
      pack: int8 [N, K] of {-1, 0, 1} -> bytes.
      unpack: bytes -> int8 [N, K].
    """

    outputs: int
    inputs: int
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]
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


def _join(codes, axis: int, *, highest_first: bool = False):
    """Four codes along an axis -> one byte."""
    shifts = (6, 4, 2, 0) if highest_first else (0, 2, 4, 6)
    parts = [jnp.take(codes, i, axis=axis).astype(jnp.uint8) << shift for i, shift in enumerate(shifts)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def _split(packed, axis: int, *, highest_first: bool = False):
    """The inverse of `_join`, as int8."""
    shifts = (6, 4, 2, 0) if highest_first else (0, 2, 4, 6)
    return jnp.stack([(packed >> shift) & 3 for shift in shifts], axis=axis).astype(jnp.int8)


def _pack_hf(w):
    return _join((w + 1).reshape(4, -1, w.shape[1]), 0)


def _unpack_hf(packed):
    return _split(packed, 0).reshape(-1, packed.shape[1]) - 1


def _pack_i2_s(w):
    return _join((w + 1).reshape(w.shape[0], -1, 4, 32), 2, highest_first=True).reshape(w.shape[0], -1)


def _unpack_i2_s(packed):
    blocks = packed.reshape(packed.shape[0], -1, 32)
    return _split(blocks, 2, highest_first=True).reshape(packed.shape[0], -1) - 1


def _pack_w2a8(w):
    # A thread of the warp reads 16 weights: threads are ordered by half of the rows, half of the columns, row.
    tiles = (w + 2).reshape(w.shape[0] // 16, 2, 8, w.shape[1] // 32, 2, 4, 4)
    return _join(tiles.transpose(0, 3, 1, 4, 2, 5, 6), 5).reshape(w.shape[0], -1)


def _unpack_w2a8(packed):
    outputs, inputs = packed.shape[0], 4 * packed.shape[1]
    tiles = _split(packed.reshape(outputs // 16, inputs // 32, 2, 2, 8, 4), 5)
    return tiles.transpose(0, 2, 4, 1, 3, 5, 6).reshape(outputs, inputs) - 2


LAYOUTS = {
    "hf": Layout(4, 1, _pack_hf, _unpack_hf, by_outputs=True),
    "i2_s": Layout(1, 128, _pack_i2_s, _unpack_i2_s),
    "w2a8": Layout(16, 32, _pack_w2a8, _unpack_w2a8),
    "i2_s_columns": Layout(1, 128, lambda w: _pack_i2_s(w).T, lambda packed: _unpack_i2_s(packed.T), transposed=True),
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
    if not isinstance(weights, jax.core.Tracer):
        _check_ternary(np.asarray(weights), "weights")
    check_sizes(*weights.shape, layout, "pack")
    return LAYOUTS[layout].pack(jnp.asarray(weights))


def unpack(packed: jax.Array, layout: str) -> jax.Array:
    """The inverse of `pack`: uint8 bytes -> int8 [N, K].

    Args:
      packed: uint8 bytes, of the shape that the layout says.
      layout: a name of `LAYOUTS`.

    Returns:
      int8 [N, K].

    Raises:
      ValueError: wrong shape, dtype or layout.
    """
    check_packed(packed, layout, "unpack")
    return LAYOUTS[layout].unpack(jnp.asarray(packed))


def repack(packed: jax.Array, source: str, target: str) -> jax.Array:
    """Brings packed weights from one layout to another, once, when they are loaded.

    Args:
      packed: uint8 bytes in the layout `source`.
      source: a name of `LAYOUTS`.
      target: a name of `LAYOUTS`, such as "i2_s_columns" for TPUs.

    Returns:
      uint8 bytes in the layout `target`.

    Raises:
      ValueError: wrong shape, dtype or layout; bytes with a code that is not ternary (a sign of a wrong `source`),
        unless under a transformation, where values are unknown.
    """
    weights = unpack(packed, source)
    if not isinstance(weights, jax.core.Tracer):
        _check_ternary(np.asarray(weights), f"bytes in layout {source!r}")
    check_sizes(*weights.shape, target, "repack")
    return LAYOUTS[target].pack(weights)


def _check_ternary(weights: np.ndarray, what: str) -> None:
    wrong = np.setdiff1d(weights, [-1, 0, 1])
    if wrong.size:
        raise ValueError(f"packing: {what} must hold -1, 0 and 1 alone, got {wrong[:4].tolist()}")
