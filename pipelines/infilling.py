"""Documents rearranged so that a causal or a prefix model learns to fill gaps: fill-in-the-middle, spans, prefixes.

Transforms of one document, deterministic in the generator; `pipelines.packing` packs what they return as any document.
The losses are `objectives.cross_entropy` under the masks that they give.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rearranged:
    """A rearranged document.

    Attributes:
      tokens: int[N].
      is_target: bool[N], tokens that belong to a gap's contents, its end marker included: the mask of a loss over gaps
        alone. The loss over all tokens is the default of decoders, for which causal and rearranged documents then mix.
    """

    tokens: np.ndarray
    is_target: np.ndarray


def cut_for_middle(
    text: str, generator: np.random.Generator, *, rate: float = 0.5, spm_rate: float = 0.5
) -> tuple[str, str, str, str] | None:
    """Cuts a text at two characters drawn uniformly (fill in the middle, arXiv:2207.14255, section 3).

    Args:
      text: any length.
      generator: of the draws.
      rate: probability that the document is cut at all.
      spm_rate: of those, the share in the order suffix, prefix, middle.

    Returns:
      (prefix, middle, suffix, "psm" or "spm"), any part perhaps empty, or None where the document stays as it is.

    Raises:
      ValueError: a rate is not in [0, 1].
    """
    for name, value in (("rate", rate), ("spm_rate", spm_rate)):
        _check_share(name, value)
    if generator.random() >= rate:
        return None
    low, high = sorted(generator.integers(0, len(text) + 1, 2).tolist())
    order = "spm" if generator.random() < spm_rate else "psm"
    return text[:low], text[low:high], text[high:], order


def fill_in_the_middle(
    prefix: np.ndarray,
    middle: np.ndarray,
    suffix: np.ndarray,
    *,
    prefix_token: int,
    middle_token: int,
    suffix_token: int,
    end_token: int,
    order: str = "psm",
) -> Rearranged:
    """Tokens of the parts of `cut_for_middle`, each encoded by itself, in one of two orders.

      psm  <pre> prefix <suf> suffix <mid> middle <end>
      spm  <suf> suffix <pre> prefix <mid> middle <end>

    spm is the first variant of the paper's appendix D, each part behind its own sentinel. Its models have the second,
    <pre> <suf> suffix <mid> prefix middle <end>, with no sentinel between prefix and middle.

    Args:
      prefix: int[P].
      middle: int[M].
      suffix: int[S].
      prefix_token: id of <pre>.
      middle_token: id of <mid>.
      suffix_token: id of <suf>.
      end_token: id that ends the middle.
      order: psm or spm.

    Raises:
      ValueError: a part holds one of the four ids, or another order.
    """
    if order not in ("psm", "spm"):
        raise ValueError(f"order must be 'psm' or 'spm', got {order!r}")
    sentinels = (prefix_token, middle_token, suffix_token, end_token)
    for part in (prefix, middle, suffix):
        _check_absent(part, sentinels)
    before = [[prefix_token], prefix], [[suffix_token], suffix]
    (a, b), (c, d) = before if order == "psm" else before[::-1]
    target = np.concatenate([middle, [end_token]])
    tokens = np.concatenate([a, b, c, d, [middle_token], target]).astype(np.int32)
    return Rearranged(tokens, np.arange(tokens.size) >= tokens.size - target.size)


def noise_spans(
    length: int, generator: np.random.Generator, *, density: float = 0.15, mean_length: float = 3.0
) -> np.ndarray:
    """Which tokens of a document to cut out: spans of random lengths between kept ones (T5, arXiv:1910.10683, 3.1.4).

    N = round(density length) tokens, at least 1 and at most length - 1, in S = max(1, round(N / mean_length)) spans, at
    most as many as there are kept tokens. Both the N and the kept tokens are divided into S parts of at least 1 by
    distinct random cuts, and the parts alternate, a kept one first. So no two spans touch, and the last token is noise.
    As `random_spans_noise_mask` of T5's code, but for the bound on S.

    Args:
      length: of the document, at least 2.
      generator: of the draws.
      density: in (0, 1).
      mean_length: of spans, at least 1.

    Returns:
      bool[length], True at noise.

    Raises:
      ValueError: an argument is out of range.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, for a kept and a noise token, got {length}")
    if not 0.0 < density < 1.0 or mean_length < 1.0:
        raise ValueError(f"density must be in (0, 1) and mean_length at least 1, got {density} and {mean_length}")
    number = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(number / mean_length), 1), length - number)

    def parts(total: int) -> np.ndarray:
        cuts = np.sort(generator.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    lengths = np.stack([parts(length - number), parts(number)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupt_spans(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of an encoder-decoder: each side has the other's runs as sentinels (T5, arXiv:1910.10683).

      inputs   keep_0 <s0> keep_1 <s1> ...
      targets  <s0> noise_0 <s1> noise_1 ... <sS>

    Args:
      tokens: int[T].
      noise: bool[T], as of `noise_spans`: runs of True are the spans.
      sentinels: int[at least S + 1], distinct ids that documents do not hold; T5 takes its last ids, downwards.

    Returns:
      (int32 inputs, int32 targets).

    Raises:
      ValueError: too few sentinels, the document holds one, or shapes disagree.
    """
    keep, spans = _runs(tokens, noise)
    if len(sentinels) < len(spans) + 1:
        raise ValueError(f"{len(spans)} spans need {len(spans) + 1} sentinels, got {len(sentinels)}")
    _check_absent(tokens, sentinels)
    inputs = [x for i, part in enumerate(keep) for x in (part, sentinels[i : i + 1] if i < len(spans) else [])]
    targets = [x for i, part in enumerate(spans) for x in (sentinels[i : i + 1], part)]
    targets.append(sentinels[len(spans) : len(spans) + 1])
    return np.concatenate(inputs).astype(np.int32), np.concatenate(targets).astype(np.int32)


def infill_spans(
    tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, *, separator: int, end_token: int
) -> Rearranged:
    """A document for a decoder: gaps first, their contents after (CodeGen2, arXiv:2305.02309).

      keep_0 <s0> keep_1 <s1> ... <sep> <s0> noise_0 <eom> <s1> noise_1 <eom> ...

    The released CodeGen2 models expect <|endoftext|> before <sep>: append it to `tokens`, and False to `noise`.

    Args:
      tokens: int[T].
      noise: bool[T]: runs of True are the gaps. One long run is CodeGen2's infilling.
      sentinels: int[at least S], distinct ids that documents do not hold.
      separator: id of <sep>.
      end_token: id of <eom>, which ends a gap's contents.

    Returns:
      Rearranged; targets are the contents and their end markers, not the sentinels before them.

    Raises:
      ValueError: too few sentinels, the document holds one of the ids, or shapes disagree.
    """
    keep, spans = _runs(tokens, noise)
    if len(sentinels) < len(spans):
        raise ValueError(f"{len(spans)} spans need as many sentinels, got {len(sentinels)}")
    _check_absent(tokens, [*sentinels, separator, end_token])
    parts: list[tuple[np.ndarray, bool]] = []
    for i, part in enumerate(keep):
        parts += [(part, False), (np.asarray(sentinels[i : i + 1]), False)] if i < len(spans) else [(part, False)]
    parts.append((np.array([separator]), False))
    for i, part in enumerate(spans):
        parts += [(np.asarray(sentinels[i : i + 1]), False), (np.append(part, end_token), True)]
    return Rearranged(
        np.concatenate([part for part, _ in parts]).astype(np.int32),
        np.concatenate([np.full(len(part), target) for part, target in parts]),
    )


def draw_prefix(length: int, generator: np.random.Generator) -> int:
    """Length of a prefix, uniform in [1, length - 1], so that both sides have a token (arXiv:1910.10683, 3.2.3)."""
    if length < 2:
        raise ValueError(f"length must be at least 2, for a prefix and a continuation, got {length}")
    return int(generator.integers(1, length))


def prefix_loss_mask(prefix: np.ndarray, length: int, *, valid: np.ndarray | None = None) -> np.ndarray:
    """float32[B, T], 1 where position t predicts a token after the prefix: prefix_b - 1 <= t.

    Position t predicts token t + 1, so the prefix's last token predicts the first one that counts.

    Args:
      prefix: int[B], tokens of the prefix, at least 1.
      length: T.
      valid: bool[B, T], False at padding.
    """
    mask = np.arange(length) >= np.asarray(prefix)[:, None] - 1
    return (mask if valid is None else mask & (valid != 0)).astype(np.float32)


def prefix_attention_mask(prefix: np.ndarray, length: int, *, bidirectional: bool = False) -> np.ndarray:
    """bool[B, T, S], which keys s a query t sees: s <= t, and with `bidirectional` every s < prefix_b too.

    A bidirectional prefix sees itself in both directions; CodeGen2 (arXiv:2305.02309, lesson 1) found no gain in it,
    so the default is causal. The mixers of `zoo` take no such mask: it is for `jax.nn.dot_product_attention`.

    Args:
      prefix: int[B], tokens of the prefix.
      length: T = S.
      bidirectional: whether the prefix is.
    """
    t = np.arange(length)
    causal = np.broadcast_to(t <= t[:, None], (len(prefix), length, length))
    return causal | (t < np.asarray(prefix)[:, None, None]) if bidirectional else causal.copy()


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_absent(tokens: np.ndarray, ids) -> None:
    found = np.intersect1d(tokens, ids)
    if found.size:
        raise ValueError(f"the document holds the id {found[0]}, which marks gaps; choose ids that no text encodes to")


def _runs(tokens: np.ndarray, noise: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(kept runs, noise runs), alternating and a kept one first, which may be empty, as may a last one."""
    if tokens.ndim != 1 or noise.shape != tokens.shape:
        raise ValueError(f"tokens and noise must be [T], got {tokens.shape} and {noise.shape}")
    noise = np.asarray(noise, bool)
    starts = np.flatnonzero(np.diff(np.concatenate([[False], noise, [False]]).astype(np.int8)))
    runs = np.split(tokens, starts)
    return runs[::2], runs[1::2]
