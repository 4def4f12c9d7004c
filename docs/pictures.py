"""Draws one picture per op for docs/kernels.md: python docs/pictures.py writes docs/pictures/<op>.svg."""

import dataclasses
import html
import pathlib

FOLDER = pathlib.Path(__file__).parent / "pictures"
WIDTH, LINE, TOP = 900, 20, 78
COLUMNS = {"HBM, read": (10, 240), "VMEM blocks": (300, 260), "HBM, written": (650, 240)}


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a TPU kernel of an op holds where.

    Attributes:
      grid: the grid's axes, outermost first; "->" marks one that is walked in order.
      read: blocks that stream in, one per grid step.
      kept: scratch that lives across grid steps.
      scalars: what lies in SMEM.
      work: what a step computes.
      written: blocks that stream out.
      bound: the unit that bounds the kernel, and why.
    """

    grid: tuple[str, ...]
    read: tuple[str, ...]
    kept: tuple[str, ...]
    scalars: tuple[str, ...]
    work: tuple[str, ...]
    written: tuple[str, ...]
    bound: str


PICTURES = {
    "causal_conv1d": Picture(
        grid=("batch", "channel blocks", "time blocks ->"),
        read=("x [rows, channels]", "weight [W, channels]", "bias [channels]"),
        kept=("last tile of x: 8 tokens",),
        scalars=("4 bytes per 8 tokens:", "reset and valid as bits"),
        work=("tap k = tile rotated by W - 1 - k,", "joined with the tile before"),
        written=("y [rows, channels]",),
        bound="HBM: x in, y out; the 2 W operations per element hide behind them",
    ),
    "linear_scan": Picture(
        grid=("batch", "channel blocks", "time blocks ->"),
        read=("a [rows, channels]", "b [rows, channels]"),
        kept=("h [channels] float32",),
        scalars=("4 bytes per 8 tokens:", "reset and valid as bits"),
        work=("8 tokens x 128 channels = 1 register,", "3 doubling steps, then the state"),
        written=("h [rows, channels]", "boundary state per block"),
        bound="HBM: a and b in, h out; 2 operations per element",
    ),
    "selective_scan": Picture(
        grid=("batch", "time blocks ->", "channel blocks ->"),
        read=("x, dt, z [rows, 1024]", "B, C [rows, N]", "A [N, 1024]"),
        kept=("h: N registers of 1024 channels", "B, C spread over lanes, once a block"),
        scalars=("reset and valid per token",),
        work=("per token and state, 1 register op:", "exp(dt A) h + (dt x) B;  y += C h"),
        written=("y [rows, 1024]", "boundary states [N, 1024]"),
        bound="VPU: 4 operations and 1 exponential per token, channel and state",
    ),
    "gated_linear_attention": Picture(
        grid=("batch", "head blocks", "chunks of 128 tokens ->"),
        read=("q, k [128, K] of a group", "v [128, heads x V]", "log decay [128, heads]"),
        kept=("S [K, heads x V] float32",),
        scalars=("whether a chunk has resets",),
        work=("scores q k^T once per group (MXU),", "times exp of sums of decays;", "y = scores v + decayed q S"),
        written=("y [128, heads x V]", "S before each chunk"),
        bound="MXU or HBM, by shape; decays cost VPU and EUP per score",
    ),
    "mlstm": Picture(
        grid=("batch", "heads", "chunks ->"),
        read=("q, k [chunk, K]", "v [chunk, V]", "gates: 8 numbers a token"),
        kept=("C [K, V], n [K] float32", "(scaled by exp(-m))"),
        scalars=(),
        work=("weights exp(d_ij - m_i) on scores,", "numerator and normaliser together"),
        written=("h [chunk, V]", "C, n before each chunk"),
        bound="MXU: chunk scores, and the state's products",
    ),
    "taylor_linear_attention": Picture(
        grid=("batch", "head blocks", "chunks ->"),
        read=("q, k [d, tokens]", "v and a row of ones [V + 1, tokens]"),
        kept=("state [features, V + 1] float32",),
        scalars=("documents at the ends of tiles",),
        work=(
            "inside: 1 + s + s^2 / 2 of the scores;",
            "before: features of 128 tokens at a",
            "time, made where the MXU reads them",
        ),
        written=("y [V, tokens]", "state before each chunk"),
        bound="MXU: features x V per token, for the state in and out",
    ),
    "attention": Picture(
        grid=("batch", "key heads", "query blocks", "key blocks inside the band ->"),
        read=("q [heads of the group, block, K]", "k, v [block, K or V]"),
        kept=("running maximum and sum", "accumulator [heads, block, V] float32"),
        scalars=("lowest and highest document", "of each chunk"),
        work=("scores chunk by chunk (MXU);", "a mask only on the diagonal", "and on the window's edge"),
        written=("y [heads, block, V]", "log-sum-exp [heads, block]"),
        bound="MXU: two products per pair inside the band",
    ),
    "ternary_matmul": Picture(
        grid=("output blocks", "row blocks ->"),
        read=("packed weights: 4 per byte", "x int8 [rows, K]", "scales"),
        kept=("many rows: weights unpacked", "to int8, [K, block]"),
        scalars=(),
        work=("shifts and masks: 1 register of", "bytes = 4 of weights; int8 MXU"),
        written=("y [rows, block]",),
        bound="few rows: HBM, the packed bytes; many rows: MXU in int8",
    ),
    "softmax_topk": Picture(
        grid=("row blocks", "column blocks ->"),
        read=("logits [128 rows, columns]",),
        kept=("per lane: maximum, sum", "the 128 best of each row, sorted"),
        scalars=(),
        work=("one pass: maxima, sums, two largest", "per lane; merge only if they beat", "the k-th best"),
        written=("sum [rows]", "values, indices [rows, k]"),
        bound="HBM: one read of the logits",
    ),
    "linear_cross_entropy": Picture(
        grid=("vocabulary chunks ->",),
        read=("x [tokens, D]", "w [D, chunk]", "labels [tokens]"),
        kept=("maximum, sum, label's logit", "per token, float32"),
        scalars=(),
        work=("logits of a chunk, folded into", "the running sums, then dropped"),
        written=("nll, lse, mean logit [tokens]",),
        bound="MXU: tokens x D x vocabulary, once forward and three times with gradients",
    ),
}


def _text(x: float, y: float, content: str, size: int = 13, weight: str = "normal", anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{html.escape(content)}</text>'


def _box(x: float, y: float, width: float, lines: tuple[str, ...], fill: str) -> str:
    height = LINE * len(lines) + 10
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="#555"/>']
    parts += [_text(x + 9, y + 19 + LINE * n, line) for n, line in enumerate(lines)]
    return "\n".join(parts)


def _arrow(x: float, y: float, length: float) -> str:
    tip = x + length
    return f'<path d="M{x:g} {y:g} H{tip:g} m-8 -5 l8 5 l-8 5" fill="none" stroke="#555" stroke-width="1.5"/>'


def draw(op: str, picture: Picture) -> str:
    """The picture of an op as SVG text."""
    title = f"{op}: grid over " + ", ".join(picture.grid)
    parts = [_text(10, 24, title, 15, "bold")]
    parts += [_text(x, TOP - 14, name, 13, "bold") for name, (x, _) in COLUMNS.items()]
    left, middle, right = COLUMNS.values()
    heights = []
    for (x, width), lines in ((left, picture.read), (right, picture.written)):
        y = TOP
        for line in lines:
            parts.append(_box(x, y, width, (line,), "#e8f0fe"))
            y += LINE + 20
        heights.append(y)
    y = TOP
    for label, lines, fill in (
        ("", picture.work, "#ffffff"),
        ("kept across steps (VMEM)", picture.kept, "#fef3d8"),
        ("SMEM", picture.scalars, "#e6f4ea"),
    ):
        if not lines:
            continue
        if label:
            parts.append(_text(middle[0], y + 12, label, 12))
            y += 18
        parts.append(_box(*(middle[0], y, middle[1]), lines, fill))
        y += LINE * len(lines) + 20
    middle_of_first = TOP + 15
    parts.append(_arrow(left[0] + left[1] + 6, middle_of_first, middle[0] - left[0] - left[1] - 12))
    parts.append(_arrow(middle[0] + middle[1] + 6, middle_of_first, right[0] - middle[0] - middle[1] - 12))
    bottom = max(*heights, y) + 14
    parts.append(_text(10, bottom, f"bound by {picture.bound}", 13, "bold"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 16:g}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(name, picture))
