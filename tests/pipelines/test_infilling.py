"""Rearranged documents: each says again what the document was, in the places that the formats give."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import infilling

SENTINELS = np.arange(1000, 1100)
SEPARATOR, END = 900, 901
PRE, MID, SUF = 910, 911, 912


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 300), seed=st.integers(0, 99), density=st.floats(0.01, 0.99), mean=st.floats(1.0, 20.0))
def test_noise_spans(length, seed, density, mean):
    """The number of noise tokens and of spans is exact; kept runs are not empty and come first."""
    noise = infilling.noise_spans(length, np.random.default_rng(seed), density=density, mean_length=mean)
    number = min(max(round(length * density), 1), length - 1)
    assert noise.shape == (length,)
    assert noise.sum() == number
    spans = (np.diff(np.concatenate([[0], noise.astype(int)])) == 1).sum()
    assert spans == min(max(round(number / mean), 1), length - number)
    assert not noise[0]
    assert noise[-1]


def test_span_lengths_are_those_of_random_cuts():
    """6 noise tokens in 2 spans: every first length from 1 to 5 is as likely."""
    generator = np.random.default_rng(0)
    first = []
    for _ in range(4000):
        noise = infilling.noise_spans(40, generator, density=0.15, mean_length=3.0)
        start = noise.argmax()
        first.append(int((~noise[start:]).argmax()))
    counts = np.bincount(first, minlength=6)[1:]
    assert counts.sum() == 4000
    assert (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.8)).all()


def document(seed, length=60):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 500, length), infilling.noise_spans(length, rng, density=0.3, mean_length=2.5)


@pytest.mark.parametrize("seed", range(5))
def test_corrupted_spans_hold_the_document(seed):
    """Each sentinel of the inputs, replaced by what follows it in the targets, gives the document back."""
    tokens, noise = document(seed)
    inputs, targets = infilling.corrupt_spans(tokens, noise, SENTINELS)
    spans = int((np.diff(np.concatenate([[0], noise.astype(int)])) == 1).sum())
    assert len(inputs) == (~noise).sum() + spans
    assert len(targets) == noise.sum() + spans + 1
    assert targets[-1] == SENTINELS[spans]
    places = np.flatnonzero(targets >= 1000)
    contents = {targets[a]: targets[a + 1 : b] for a, b in itertools.pairwise(places)}
    assert list(contents) == SENTINELS[:spans].tolist()
    back = np.concatenate([contents.pop(x) if x >= 1000 else [x] for x in inputs])
    np.testing.assert_array_equal(back, tokens)
    assert not contents


@pytest.mark.parametrize("seed", range(5))
def test_infilled_spans_hold_the_document(seed):
    tokens, noise = document(seed)
    found = infilling.infill_spans(tokens, noise, SENTINELS, separator=SEPARATOR, end_token=END)
    cut = int(np.flatnonzero(found.tokens == SEPARATOR)[0])
    gaps, rest = found.tokens[:cut], found.tokens[cut + 1 :]
    contents = {}
    while rest.size:
        stop = int(np.flatnonzero(rest == END)[0])
        contents[rest[0]], rest = rest[1:stop], rest[stop + 1 :]
    np.testing.assert_array_equal(np.concatenate([contents[x] if x >= 1000 else [x] for x in gaps]), tokens)
    for sentinel in contents:
        assert (found.tokens == sentinel).sum() == 2
    # targets: contents and end markers
    np.testing.assert_array_equal(
        found.tokens[found.is_target], np.concatenate([np.append(x, END) for x in contents.values()])
    )
    assert not found.is_target[: cut + 2].any()


def test_one_long_gap_and_none():
    tokens = np.arange(10)
    noise = (tokens >= 3) & (tokens < 8)
    found = infilling.infill_spans(tokens, noise, SENTINELS, separator=SEPARATOR, end_token=END)
    assert found.tokens.tolist() == [0, 1, 2, 1000, 8, 9, SEPARATOR, 1000, 3, 4, 5, 6, 7, END]
    assert found.is_target.tolist() == [False] * 8 + [True] * 6
    whole = infilling.infill_spans(tokens, noise & False, SENTINELS, separator=SEPARATOR, end_token=END)
    assert whole.tokens.tolist() == [*range(10), SEPARATOR]
    inputs, targets = infilling.corrupt_spans(tokens, tokens < 2, SENTINELS)
    assert inputs.tolist() == [1000, *range(2, 10)]
    assert targets.tolist() == [1000, 0, 1, 1001]


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_fill_in_the_middle(order):
    prefix, middle, suffix = np.arange(3), np.arange(3, 7), np.arange(7, 9)
    sentinels = {"prefix_token": PRE, "middle_token": MID, "suffix_token": SUF, "end_token": END}
    found = infilling.fill_in_the_middle(prefix, middle, suffix, **sentinels, order=order)
    before = {"psm": [PRE, 0, 1, 2, SUF, 7, 8], "spm": [SUF, 7, 8, PRE, 0, 1, 2]}[order]
    assert found.tokens.tolist() == [*before, MID, 3, 4, 5, 6, END]
    assert found.is_target.tolist() == [False] * 8 + [True] * 5
    empty = np.arange(0)
    assert infilling.fill_in_the_middle(empty, empty, empty, **sentinels).tokens.tolist() == [PRE, SUF, MID, END]
    with pytest.raises(ValueError, match="the document holds the id 911"):
        infilling.fill_in_the_middle(prefix, np.array([MID]), suffix, **sentinels)


def test_cuts_are_uniform():
    """Half of the documents, half of those in the second order; parts join to the text; all cuts occur alike."""
    generator = np.random.default_rng(1)
    text, cuts = "héllo wörld", []
    found = [infilling.cut_for_middle(text, generator) for _ in range(8000)]
    cut = [x for x in found if x is not None]
    assert abs(len(cut) - 4000) < 5 * np.sqrt(2000)
    assert abs(sum(order == "spm" for *_, order in cut) - len(cut) / 2) < 5 * np.sqrt(len(cut) / 4)
    for prefix, middle, suffix, _ in cut:
        assert prefix + middle + suffix == text
        cuts += [len(prefix), len(prefix) + len(middle)]
    counts, expected = np.bincount(cuts, minlength=12), len(cuts) / 12
    assert len(counts) == 12
    # the two cuts of a document are drawn independently
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert infilling.cut_for_middle(text, generator, rate=0.0) is None
    assert infilling.cut_for_middle("", generator, rate=1.0, spm_rate=0.0) == ("", "", "", "psm")


def test_prefixes():
    lengths = {infilling.draw_prefix(4, np.random.default_rng(seed)) for seed in range(60)}
    assert lengths == {1, 2, 3}
    prefix, valid = np.array([1, 3]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    # position t predicts token t + 1
    assert infilling.prefix_loss_mask(prefix, 4).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert infilling.prefix_loss_mask(prefix, 4, valid=valid).tolist() == [[1, 1, 1, 1], [0, 0, 1, 0]]
    for bidirectional in (False, True):
        mask = infilling.prefix_attention_mask(prefix, 4, bidirectional=bidirectional)
        for b in range(2):
            for t in range(4):
                for s in range(4):
                    inside = t < prefix[b] and s < prefix[b]
                    assert mask[b, t, s] == (s <= t or (bidirectional and inside))


def test_refusals():
    generator = np.random.default_rng(0)
    tokens, noise = document(0)
    for call, message in (
        (lambda: infilling.noise_spans(1, generator), "length must be at least 2"),
        (lambda: infilling.noise_spans(9, generator, density=1.0), r"density must be in \(0, 1\)"),
        (lambda: infilling.corrupt_spans(tokens, noise, SENTINELS[:1]), "sentinels, got 1"),
        (lambda: infilling.corrupt_spans(tokens, noise, np.arange(100)), "the document holds the id"),
        (lambda: infilling.corrupt_spans(tokens, noise[1:], SENTINELS), r"must be \[T\], got \(60,\) and \(59,\)"),
        (
            lambda: infilling.infill_spans(tokens, noise, SENTINELS[:1], separator=SEPARATOR, end_token=END),
            "spans need as many sentinels, got 1",
        ),
        (lambda: infilling.draw_prefix(1, generator), "length must be at least 2"),
        (lambda: infilling.cut_for_middle("a", generator, rate=2.0), r"rate must be in \[0, 1\], got 2.0"),
        (
            lambda: infilling.fill_in_the_middle(
                tokens, tokens, tokens, prefix_token=PRE, middle_token=MID, suffix_token=SUF, end_token=END, order="mps"
            ),
            "order must be 'psm' or 'spm'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
