"""The feature map and the order of its features, which are the rows of the state.

For x of width K, scaled by sqrt(scale): first the K (K + 1) / 2 products x_a x_b, then x itself, then the constant 1.
Row n of the products is the pair (a, (a + r) mod K) with r, a = divmod(n, K): K products to each turn r of x against
itself, so a turn is one multiplication of x with x rolled, and every pair appears once. Squares (r = 0) are divided by
sqrt(2), which makes phi(x) . phi(y) = 1 + s + s^2 / 2 of s = scale x . y.
"""

import math

import numpy as np

HALF = math.sqrt(0.5)


def products(width: int) -> int:
    """Number of distinct products of two components."""
    return width * (width + 1) // 2


def count(width: int) -> int:
    """Number of features of a vector of `width` components."""
    return products(width) + width + 1


def pairs(width: int) -> tuple[np.ndarray, np.ndarray]:
    """int [K (K + 1) / 2] each: the components a and b of every product."""
    turn, a = np.divmod(np.arange(products(width)), width)
    return a, (a + turn) % width


def turns(width: int) -> list[tuple[int, int, int]]:
    """(turn r, its first row, its number of rows); an even width has its last turn halved."""
    rows = products(width)
    return [(r, r * width, min(width, rows - r * width)) for r in range(-(-rows // width))]
