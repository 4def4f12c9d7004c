"""Pairs by stages of a curriculum, relabelled by goals and compared across prompts; demonstrations told attributes."""

import itertools

import numpy as np
import pytest

import objectives
from pipelines import DataError, make_response_source
from tests.pipelines.test_chat import chat
from tests.pipelines.test_preference import GOAL, SFT, read, said


def test_stages_are_the_curriculum(jsonl):
    """Stage k of all records is column k - 1 of `objectives.curriculum_pairs`; records of fewer responses drop out."""
    rng = np.random.default_rng(3)
    scores = [rng.choice(40, n, replace=False).tolist() for n in (4, 2, 5, 4, 3)]
    records = [{"prompt": f"p{i}", "responses": [f"{i}.{j}" for j in range(len(s))], "scores": s}
               for i, s in enumerate(scores)]  # fmt: skip
    path, gaps = jsonl(*records), []
    for stage in (1, 2, 3, 4):
        source, examples = read("ranked", path, unpack="best_vs_rest", stage=stage)
        expected = []
        for record in records:
            pairs = objectives.curriculum_pairs(np.array(record["scores"]))
            expected += [[record["responses"][i] for i in pair] for pair in pairs[stage - 1 : stage]]
        assert [[said(r)[0] for r in e.responses] for e in examples] == expected
        assert source.skipped == ({"fewer pairs than stages": 5 - len(expected)} if len(expected) < 5 else {})
        gaps.append({e.prompt[0]["content"]: e.scores[0] - e.scores[1] for e in examples})
    for easy, hard in itertools.pairwise(gaps):
        assert all(easy[prompt] > gap for prompt, gap in hard.items())


def test_goals_relabel_pairs(jsonl):
    """The pairs are those of `objectives.reward_augmented_pairs`; the goal stands before a system turn's own text."""
    records = [
        {"prompt": "p", "responses": ["a", "b"], "scores": [9, 2.5]},
        {"prompt": chat("q", system="s"), "responses": ["a", "b"], "scores": [3, 4]},
        {"prompt": "r", "responses": ["a", "b"], "scores": [5, 5]},
    ]
    source, examples = read("ranked", jsonl(*records), goal=GOAL)
    found = [(said(e.prompt), [said(r)[0] for r in e.responses]) for e in examples]
    assert found == [
        (["Aim at 9.", "p"], ["a", "b"]),
        (["Aim at 2.5.", "p"], ["b", "a"]),
        (["Aim at 4.\n\ns", "q"], ["b", "a"]),
        (["Aim at 3.\n\ns", "q"], ["a", "b"]),
    ]
    assert [turn["role"] for turn in examples[0].prompt] == ["system", "user"]
    assert all(e.scores is None for e in examples)
    assert source.skipped == {"no preference": 1}
    best, worst = (np.array(x, float) for x in zip(*(sorted(r["scores"], reverse=True) for r in records), strict=True))
    index, goal, swapped = objectives.reward_augmented_pairs(best, worst)
    assert [float(said(e.prompt)[0].split()[2].rstrip(".")) for e in examples] == goal.tolist()
    assert len(examples) == len(index) == len(swapped)
    with pytest.raises(DataError, match="a goal needs 'scores', the line has 'ranks'"):
        read("ranked", jsonl({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}), goal=GOAL)


def test_comparisons_across_prompts(jsonl):
    """All fourteen of each example are those of `objectives.cross_prompt_comparisons`; ties have either order."""
    records = [{"prompt": f"p{i}", "chosen": f"{i}c", "rejected": f"{i}r"} for i in range(40)]
    path = jsonl(*records)
    given, crossed = (read("pairs", path, cross_prompts=number)[1] for number in (0, 14))
    assert crossed[:40] == given
    found = [(int(said(e.prompt)[0][1:]), [said(r)[0] for r in e.responses]) for e in crossed[40:]]
    assert len(found) == 14 * 40
    partners = np.array([sorted({int(r[:-1]) for p, pair in found if p == i for r in pair} - {i}) for i in range(40)])
    want = objectives.cross_prompt_comparisons(partners)
    name = lambda response: f"{response[0]}{'cr'[response[1]]}"  # noqa: E731
    wins, ties = set(), set()
    for prompt, *pair, label in zip(want.prompt, want.first, want.second, want.label, strict=True):
        (wins if label == 1 else ties).add((int(prompt), *map(name, pair)))
    ties |= {(p, b, a) for p, a, b in ties}
    assert {(p, *pair) for p, pair in found} >= wins
    drawn = [(p, *pair) for p, pair in found if (p, *pair) not in wins]
    assert set(drawn) < ties
    assert len({(p, frozenset(pair)) for p, *pair in drawn}) == 6 * 40
    assert 0.4 < np.mean([a < b for _, a, b in drawn]) < 0.6


def test_comparisons_are_drawn_and_leave_equal_prompts_out(jsonl):
    records = [{"prompt": f"p{i % 5}", "chosen": f"{i}", "rejected": "same"} for i in range(60)]
    path = jsonl(*records)
    (_, one), (_, again), (_, all_of_them) = (read("pairs", path, cross_prompts=n) for n in (3, 3, 14))
    assert one == again
    assert 60 < len(one) <= 60 + 3 * 60
    prompt_of = {r["chosen"]: r["prompt"] for r in records}
    for example in all_of_them[60:]:
        texts = [said(r)[0] for r in example.responses]
        assert texts[0] != texts[1]
        foreign = [t for t in texts if t != "same" and prompt_of[t] != said(example.prompt)[0]]
        assert foreign or "same" in texts
    held = make_response_source({"name": "pairs", "paths": path, "cross_prompts": 2, "heldout_fraction": 0.4})
    examples = list(held.examples())
    assert {e.split for e in examples} == {"train", "validation"}
    assert all(e.split == "train" for e in examples[60:])
    with pytest.raises(DataError, match="cross_prompts takes three for training, found 2"):
        read("pairs", jsonl(*records[:2]), cross_prompts=1)


def test_attributes_are_told(jsonl):
    ratings = {"helpfulness": 4, "verbosity": 1.5, "other": 0}
    records = [{**SFT, "attributes": ratings}, {"messages": chat("u", "v", system="s"), "attributes": ratings}]
    _, examples = read("sft", jsonl(*records), attributes=["verbosity", "helpfulness"])
    assert [said(e.prompt) for e in examples] == [
        ["verbosity:1.5,helpfulness:4", "p"],
        ["verbosity:1.5,helpfulness:4\n\ns", "u"],
    ]
    for bad, words in [
        ({}, "no 'attributes'"),
        ({"attributes": 3}, "must map names to numbers, found int"),
        ({"attributes": {"helpfulness": 1}}, "'attributes': missing field: no 'verbosity'"),
        ({"attributes": {"verbosity": "high"}}, "'verbosity' must be a finite number, found 'high'"),
    ]:
        with pytest.raises(DataError, match=words):
            read("sft", jsonl({**SFT, **bad}), attributes="verbosity")
