"""The fewest cycles an op can take on a chip: what each unit must do at least, at its peak rate.

One pure function per op, `floor(shape, chip, backward) -> {"mxu", "vpu", "eup", "hbm"}` in cycles; the largest is the
floor. Counted is what no implementation can avoid: arithmetic of the definition, each operand and result once through
memory. Operations that another idle unit could take are not counted for the busy one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.static_profile import programs
from pallas_kernels.static_profile.chips import Chip

Floor = Mapping[str, float]


def selective_scan(shape: Any, chip: Chip, backward: bool = False) -> Floor:
    """Per token, channel and state one exponential; a multiplication with dt, the recurrence, and the input's term.

    The contraction with C (forward), and those with B and C of the gradients, may go to the matrix unit. The backward
    pass takes the exponentials again, runs the recurrence again and its adjoint, and multiplies out dA and d(dt).
    """
    elements = shape.batch * shape.time * shape.channels * shape.states
    # dt A, exp(.) h, (dt x) B, +  |  again; a dh, C dy, +; dh h a: 2; A: 1 product; dt: product and sum
    operations = 12 if backward else 4
    return _bounds(chip, vpu=operations * elements, eup=elements, hbm=_traffic(shape, backward, ("x",)))


def attention(shape: Any, chip: Chip, backward: bool = False) -> Floor:
    """Two products per pair of query and key inside the band (five in the backward pass), one exponential.

    Pairs are those of the causal band of `window` keys; documents may leave fewer, which the shape does not tell.
    """
    keys = shape.time if shape.keys is None else shape.keys
    window = min(shape.window or keys, keys)
    if shape.keys is None:
        pairs = window * shape.time - window * (window - 1) // 2
    else:
        pairs = window * shape.time
    pairs *= shape.batch * shape.heads
    widths = 3 * shape.key + 2 * shape.value if backward else shape.key + shape.value
    # Subtract the maximum and sum; the maximum itself (forward), or p (dp - delta) (backward).
    operations = 4 if backward else 3
    return _bounds(
        chip, mxu=2 * widths * pairs, vpu=operations * pairs, eup=pairs, hbm=_traffic(shape, backward, ("q",))
    )


def causal_conv1d(shape: Any, chip: Chip, backward: bool = False) -> Floor:
    """Reads x and writes y once; width products and sums per element, and one transcendental of the silu.

    The backward pass reads x and dy and writes dx; it takes the pre-activation again and both gradients.
    """
    elements = shape.batch * shape.time * shape.channels
    passes = 3 if backward else 1
    return _bounds(chip, vpu=passes * 2 * shape.width * elements, eup=elements, hbm=_traffic(shape, backward, ("x",)))


def mlstm(shape: Any, chip: Chip, backward: bool = False) -> Floor:
    """Per token and head the products with the state: k v^T and C^T q, K V multiplications and sums each.

    The backward pass runs the adjoint of both, four products of that size: of C with dy, of dC with v and with k, and
    the outer product of q and dy. The products within a chunk, and states kept for the backward pass, are the price of
    an implementation and could be traded for one another, so they are not counted.
    """
    states = shape.batch * shape.time * shape.heads * shape.key * shape.value
    products = 4 if backward else 2
    state = 4 * shape.batch * shape.heads * (shape.key * (shape.value + 1) + 1)  # the new one, or its cotangent
    hbm = _traffic(shape, backward, ("v",)) + state
    return _bounds(chip, mxu=2 * products * states, hbm=hbm)


FLOORS: Mapping[str, Callable[..., Floor]] = {
    "selective_scan": selective_scan,
    "attention": attention,
    "causal_conv1d": causal_conv1d,
    "mlstm": mlstm,
}


def _bounds(chip: Chip, mxu: float = 0, vpu: float = 0, eup: float = 0, hbm: float = 0) -> Floor:
    return {"mxu": mxu / chip.mxu_flops, "vpu": vpu / chip.valu, "eup": eup / chip.eup, "hbm": chip.hbm_cycles(hbm)}


def _traffic(shape: Any, backward: bool, result_like: tuple[str, ...]) -> int:
    """Bytes of all arguments and of the results; the gradients are as large as the floating arguments."""
    sizes = {
        name: sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(argument))
        for name, argument in shape.arrays().items()
    }
    results = sum(sizes[name] for name in result_like)
    if not backward:
        return sum(sizes.values()) + results
    floating = [name for name, argument in shape.arrays().items() if programs.is_floating(argument)]
    return sum(sizes.values()) + results + sum(sizes[name] for name in floating)
