"""Sums: answers, rewards, records of every kind, and a split that no prompt crosses."""

import json

import numpy as np
import pytest

from pipelines import DataError, arithmetic, make_response_source, prepare_responses
from pipelines.synthetic.arithmetic import near_misses

BYTES = {"name": "bytes"}


def source(**options):
    return make_response_source(
        {"name": "arithmetic", "train_examples": 150, "validation_examples": 30, "heldout_fraction": 0.2, **options}
    )


def texts(example):
    return [turns[0]["content"] for turns in (example.prompt, *example.responses)]


def calculated(prompt):
    """Oracle: Python's own reading of the sum."""
    return eval(prompt.removesuffix("="))


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("12+7=", "19", 1.0),
        ("12+7=", " 19\n", 1.0),
        ("12+7=", "19.", 0.0),
        ("12+7=", "019", 0.0),
        ("12+7=", "+19", 0.0),
        ("12+7=", "20", 0.0),
        ("12+7=", "", 0.0),
        ("12+7=", "19 19", 0.0),
        ("3-10=", "-7", 1.0),
        ("3-10=", "7", 0.0),
        ("12*12=", "144", 1.0),
        ("007+1=", "8", 1.0),
    ],
)
def test_reward(prompt, response, expected):
    assert arithmetic.reward(prompt, response) == expected


@pytest.mark.parametrize("prompt", ["", "12+7", "12/7=", "1+2+3=", "-1+2=", "a+b=", "1+2=3", "\u0661+1="])
def test_what_is_no_sum_has_no_reward(prompt):
    with pytest.raises(ValueError, match="is no sum such as '12"):
        arithmetic.reward(prompt, "3")


def test_near_misses_differ_in_one_digit_at_different_distances():
    rng = np.random.default_rng(0)
    for right in (0, 7, -12, 1999):
        for count in (1, 3, 8):
            wrong = near_misses(right, count, rng)
            distances = [abs(each - right) for each in wrong]
            assert distances == sorted(set(distances))
            assert len(wrong) == count
            assert all(str(each)[0] in "123" and not each.__str__()[1:].strip("0") for each in distances)


@pytest.mark.parametrize("operators", ["+", "-*", "+-*"])
@pytest.mark.parametrize("kind", ["sft", "pairs", "unpaired", "ranked"])
def test_records(kind, operators):
    options = {"unpack": "lists"} if kind == "ranked" else {}
    made = source(kind=kind, operators=operators, low=3, high=40, **options)
    examples = list(made.examples())
    assert [example.split for example in examples] == ["train"] * 150 + ["validation"] * 30
    assert {next(c for c in texts(e)[0] if c in "+-*") for e in examples} == set(operators)
    for example in examples:
        prompt, *responses = texts(example)
        operands = [int(x) for x in prompt[:-1].replace("-", "+").replace("*", "+").split("+")]
        assert all(3 <= operand <= 40 for operand in operands)
        right = str(calculated(prompt))
        assert [arithmetic.reward(prompt, response) for response in responses] == [float(r == right) for r in responses]
        if kind == "sft":
            assert responses == [right]
        elif kind == "pairs":
            assert responses[0] == right != responses[1]
        elif kind == "unpaired":
            assert example.label == float(responses[0] == right)
        else:
            assert responses[0] == right
            assert len(set(responses)) == 4
            assert example.scores == tuple(-abs(float(r) - float(right)) for r in responses)
    if kind == "unpaired":
        assert 40 < sum(example.label for example in examples[:150]) < 110


def test_no_prompt_is_in_both_splits_and_examples_depend_on_seed_and_number_alone():
    examples = list(source(high=12).examples())
    prompts = {split: {texts(e)[0] for e in examples if e.split == split} for split in ("train", "validation")}
    assert not prompts["train"] & prompts["validation"]
    assert len(prompts["validation"]) > 10
    assert list(source(high=12).examples()) == examples
    fewer = list(source(high=12, train_examples=20).examples())
    assert fewer == [e for e in examples if e.split == "validation" or int(e.origin.split(":")[2]) < 20]
    assert list(source(high=12, seed=1).examples()) != examples


@pytest.mark.parametrize(
    ("options", "kind", "responses"),
    [
        ({"kind": "sft"}, "sft", 1),
        ({"kind": "pairs"}, "pairs", 2),
        ({"kind": "unpaired"}, "unpaired", 1),
        ({"kind": "unpaired", "mismatched": True}, "unpaired", 2),
        ({"kind": "ranked"}, "pairs", 2),
        ({"kind": "ranked", "unpack": "lists", "candidates": 6}, "ranked", 6),
    ],
)
def test_batches(options, kind, responses):
    config = {"name": "arithmetic", "train_examples": 40, "validation_examples": 20, "heldout_fraction": 0.3, **options}
    data = prepare_responses(config, BYTES, 12)
    assert (data.kind, data.responses, data.unit) == (kind, responses, "examples")
    assert data.metrics == ("loss", "accuracy")[: 2 if kind in ("sft", "pairs") else 1]
    batch = next(data.train_iterator(batch_size=5, seed=0))
    for key in ("tokens", "targets", "segment_ids", "positions", "loss_mask"):
        assert batch[key].shape == (5, responses, 12)
    examples = data.examples("train")
    for index, targets, mask in zip(batch["index"], batch["targets"], batch["loss_mask"], strict=True):
        expected = texts(examples[index])[1:]
        found = [data.tokenizer.decode(t[m > 0]) for t, m in zip(targets, mask, strict=True)]
        assert found[: len(expected)] == expected
    iterator = data.train_iterator(batch_size=5, seed=0)
    next(iterator)
    again = data.train_iterator(batch_size=5, seed=0)
    again.set_state(json.loads(json.dumps(iterator.get_state())))
    np.testing.assert_array_equal(next(again)["tokens"], next(iterator)["tokens"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "pair"}, "kind='pair' is not supported; did you mean .*'pairs'"),
        ({"low": -1}, "low=-1 must be an int of at least 0"),
        ({"low": 5, "high": 5}, "high=5 must be an int above low=5"),
        ({"operators": "/"}, "operators='/' must be a text of one or more of"),
        ({"operators": ""}, "operators=''"),
        ({"kind": "ranked", "candidates": 1}, "candidates=1 must be an int of at least 2"),
        ({"seed": -1}, "seed=-1"),
        ({"train_examples": 0}, "train_examples=0"),
        ({"heldout_fraction": 0.0}, "leaves no prompt for validation"),
        ({"operator": "+"}, "no option 'operator'; did you mean 'operators'"),
        ({"kind": "sft", "mismatched": True}, "mismatched is an option of kind 'unpaired', not of 'sft'"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(ValueError, match=words):
        source(**options)


def test_a_range_without_a_prompt_for_a_split_is_refused():
    made = source(high=1, heldout_fraction=1e-9)
    with pytest.raises(DataError, match="of 0 to 1 none fell to validation in 10000 draws; widen the range"):
        list(made.examples())
