"""Sources of responses and their batches: every record, every refusal, rows by hand, resumption, processes."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pipelines import DataError, make_response_source, prepare_responses, train_bpe
from tests.pipelines.test_chat import BYTES as TOKENIZER
from tests.pipelines.test_chat import chat, conversations, spelled
from tests.pipelines.test_packing import assert_equal_batches

BYTES = {"name": "bytes"}
ROWS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def read(name, path, **options):
    source = make_response_source({"name": name, "paths": path, "heldout_fraction": 0.0, **options})
    return source, list(source.examples())


def prepare(name, path, length=16, **options):
    return prepare_responses({"name": name, "paths": path, "heldout_fraction": 0.0, **options}, BYTES, length)


def said(turns):
    return [turn["content"] for turn in turns]


SFT = {"prompt": "p", "response": "r"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
UNPAIRED = {"prompt": "p", "response": "r", "label": True}
RANKED = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]}
GOOD = {"sft": SFT, "pairs": PAIR, "unpaired": UNPAIRED, "ranked": RANKED}


def test_demonstrations(jsonl):
    conversation = chat("u", "v", "w", "x", system="s")
    turns = chat("u", "v", "w")
    path = jsonl(SFT, {"messages": conversation, "prompt": "u", "id": 3}, {"prompt": turns, "response": "x"})
    _, examples = read("sft", path)
    assert [(said(e.prompt), [said(r) for r in e.responses], e.context) for e in examples] == [
        (["p"], [["r"]], True),
        (["s", "u", "v", "w"], [["x"]], False),
        (["u", "v", "w"], [["x"]], True),
    ]
    assert [e.origin for e in examples] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_pairs(jsonl):
    a, b = chat("u", "v", "w", "x", system="s"), chat("u", "v", "w", "y", "m", "z", system="s")
    records = [
        PAIR,
        {"prompt": a[:-1], "chosen": "x", "rejected": b[-3:]},
        {"prompt": a[:-1], "chosen": a, "rejected": b},
        {"chosen": a, "rejected": b},
        {"prompt": "u", "chosen": chat("u", "v"), "rejected": "w"},
    ]
    _, examples = read("pairs", jsonl(*records))
    found = [(said(e.prompt), [said(r) for r in e.responses]) for e in examples]
    long = (["s", "u", "v", "w"], [["x"], ["y", "m", "z"]])
    assert found == [
        (["p"], [["c"], ["r"]]),
        long,
        long,
        long,
        (["u"], [["v"], ["w"]]),
    ]


def test_unpaired_and_ranked(jsonl):
    labels = [True, False, 1, 0, 1.0]
    _, examples = read("unpaired", jsonl(*({**UNPAIRED, "label": label} for label in labels)))
    assert [e.label for e in examples] == [1.0, 0.0, 1.0, 0.0, 1.0]
    ranks = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]}
    _, (scored, by_rank) = read("ranked", jsonl(RANKED, ranks), unpack="lists")
    assert [said(r)[0] for r in scored.responses] == [said(r)[0] for r in by_rank.responses] == ["b", "a", "c"]
    assert scored.scores == (2.0, 0.5, -1.0)
    assert by_rank.scores == (-1.0, -2.0, -3.0)


SCORED = {"prompt": "p", "responses": ["a", "b", "c", "d", "a"], "scores": [1, 3, 1, 2.5, 0]}


@pytest.mark.parametrize(
    ("options", "expected", "skipped"),
    [
        ({}, ["b>a"], {}),
        ({"unpack": "best_vs_rest"}, ["b>d", "b>a", "b>c", "b>a"], {}),
        ({"unpack": "best_vs_rest", "gap": 0.5}, ["b>a", "b>c", "b>a"], {"no preference": 1}),
        ({"unpack": "best_vs_rest", "gap": 0.5, "ties": True}, ["b=d", "b>a", "b>c", "b>a"], {}),
        (
            {"unpack": "all", "ties": True},
            ["b>d", "b>a", "b>c", "b>a", "d>a", "d>c", "d>a", "a=c", "c>a"],
            {"equal responses": 1},
        ),
        (
            {"unpack": "all", "gap": 1.5},
            ["b>a", "b>c", "b>a", "d>a"],
            {"no preference": 5, "equal responses": 1},
        ),
    ],
)
def test_unpacking(jsonl, options, expected, skipped):
    source, examples = read("ranked", jsonl(SCORED), **options)
    found = ["=>"[not e.tie].join(said(r)[0] for r in e.responses) for e in examples]
    assert found == expected
    assert source.skipped == skipped
    assert source.batches == "pairs"
    for example in examples:
        better, worse = example.scores
        assert (better - worse <= options.get("gap", 0.0)) == example.tie
        assert (better, worse) in itertools.product(SCORED["scores"], repeat=2)


GOAL = "Aim at {score}."

BAD = [
    ("sft", {"prompt": "p"}, "missing field", "no 'response'; the line has ..prompt"),
    ("sft", {"response": "p"}, "missing field", "no 'prompt'"),
    ("sft", {"prompt": 3, "response": "r"}, "wrong type", "'prompt': .* found int"),
    ("sft", {"prompt": "", "response": "r"}, "empty content", "'prompt': .*turn 1, of user"),
    ("sft", {"prompt": "p", "response": ""}, "empty content", "'response': .*turn 2, of assistant"),
    ("sft", {"prompt": "p", "response": None}, "wrong type", "'response': .* found NoneType"),
    ("sft", {"prompt": chat("a", "b"), "response": "r"}, "no user turn at the end", "'prompt'"),
    ("sft", {"messages": chat("a", "b", "c")}, "no assistant turn at the end", "'messages'"),
    ("sft", {"messages": chat("a")}, "no assistant turn at the end", "'messages'"),
    ("sft", {"messages": 3}, "wrong type", "'messages'"),
    ("sft", "[]", "not a JSON object", "found list"),
    ("sft", '{"prompt": "p", "response": "\\ud800"}', "not valid Unicode", "'response'"),
    ("pairs", {"prompt": "p", "chosen": "c"}, "missing field", "no 'rejected'"),
    ("pairs", {"chosen": "c", "rejected": "r"}, "missing field", "no 'prompt'"),
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": "c"}, "equal responses", "must differ"),
    ("pairs", {"prompt": "p", "chosen": chat("p", "c"), "rejected": "c"}, "equal responses", "must differ"),
    ("pairs", {"prompt": "p", "chosen": chat("q", "c"), "rejected": "r"}, "another prompt", "'chosen': "),
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": chat("p")}, "no assistant turn at the end", "'rejected'"),
    ("pairs", {"prompt": "p", "chosen": [], "rejected": "r"}, "no assistant turn at the end", "'chosen'"),
    ("pairs", {"prompt": "p", "chosen": ["c"], "rejected": "r"}, "not a turn", "'chosen': .*turn 2 .*found str"),
    ("pairs", {"chosen": chat("p", "c"), "rejected": chat("q", "c")}, "another prompt", "different turns of the user"),
    ("unpaired", {"prompt": "p", "response": "r"}, "missing field", "no 'label'"),
    ("unpaired", {"prompt": "p", "response": "r", "label": "yes"}, "bad label", "true, false, 1 or 0, found 'yes'"),
    ("unpaired", {"prompt": "p", "response": "r", "label": 2}, "bad label", "found 2"),
    ("unpaired", {"prompt": "p", "response": "r", "label": None}, "bad label", "found None"),
    ("ranked", {"prompt": "p", "scores": [1, 2]}, "missing field", "no 'responses'"),
    ("ranked", {"prompt": "p", "responses": ["a", "b"]}, "missing field", "either 'scores' or 'ranks'"),
    ("ranked", {**RANKED, "ranks": [1, 2, 3]}, "one field too many", "either 'scores' or 'ranks'"),
    ("ranked", {**RANKED, "scores": [1, 2]}, "bad scores", "a list of 3, one a response, is expected, found 2"),
    ("ranked", {**RANKED, "scores": 1}, "bad scores", "found int"),
    ("ranked", {**RANKED, "scores": [1, 2, True]}, "bad scores", "finite numbers are expected, found True"),
    ("ranked", {**RANKED, "scores": [1, 2, float("nan")]}, "bad scores", "found nan"),
    ("ranked", {**RANKED, "scores": [1, 2, 10**400]}, "bad scores", "found 1000"),
    ("ranked", {**RANKED, "responses": ["a"]}, "wrong type", "'responses' must be a list of at least two"),
    ("ranked", {**RANKED, "responses": ["a", "b", 3]}, "wrong type", r"'responses\[2\]': .* found int"),
]


@pytest.mark.parametrize(("name", "record", "reason", "words"), BAD)
def test_a_bad_record_is_an_error_with_its_place_or_a_counted_skip(jsonl, name, record, reason, words):
    path = jsonl(GOOD[name], record, GOOD[name])
    with pytest.raises(DataError, match=words) as error:
        read(name, path)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{path}:2")
    source, examples = read(name, path, on_error="skip")
    assert len(examples) == 2
    assert source.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "pair", "paths": "a"}, "unknown source 'pair'; did you mean 'pairs'"),
        ({"name": "pairs"}, "needs 'paths'"),
        ({"name": "pairs", "paths": "a", "templat": "plain"}, "no option 'templat'; did you mean 'template'"),
        ({"name": "pairs", "paths": "a", "template": "chat-ml"}, "unknown template 'chat-ml'; did you mean 'chatml'"),
        ({"name": "pairs", "paths": "a", "truncate": "cut"}, "truncate='cut' is not supported"),
        ({"name": "pairs", "paths": "a", "loss": "all"}, "loss is an option of kind 'sft', not of 'pairs'"),
        ({"name": "ranked", "paths": "a", "pack": True}, "pack is an option of kind 'sft', not of 'ranked'"),
        ({"name": "sft", "paths": "a", "ties": True}, "ties is an option of kind 'ranked', not of 'sft'"),
        ({"name": "sft", "paths": "a", "pack": "yes"}, "pack='yes' is not supported"),
        ({"name": "sft", "paths": "a", "weighting": "tokens"}, "weighting='tokens' is not supported"),
        ({"name": "ranked", "paths": "a", "unpack": "list"}, "unpack='list' is not supported; did you mean .*lists"),
        ({"name": "ranked", "paths": "a", "gap": -1.0}, "gap=-1.0 must be a finite number of at least 0"),
        ({"name": "ranked", "paths": "a", "gap": float("nan")}, "gap=nan"),
        ({"name": "ranked", "paths": "a", "unpack": "lists", "gap": 0.5}, "gap, ties and goal are options of pairs"),
        ({"name": "pairs", "paths": "a", "cross_prompts": 15}, "cross_prompts=15 must be a number from 0 to 14"),
        ({"name": "sft", "paths": "a", "cross_prompts": 1}, "cross_prompts is an option of kind 'pairs', not of 'sft'"),
        ({"name": "ranked", "paths": "a", "stage": -1}, "stage=-1 must be 0, for all pairs, or the number of a stage"),
        ({"name": "ranked", "paths": "a", "stage": 2}, "stage=2 goes with unpack='best_vs_rest', not with 'best_vs_wo"),
        ({"name": "pairs", "paths": "a", "goal": GOAL}, "goal is an option of kind 'ranked', not of 'pairs'"),
        ({"name": "ranked", "paths": "a", "goal": "{skore}"}, "must be a text that says where the score goes, by '{sc"),
        ({"name": "ranked", "paths": "a", "goal": GOAL, "ties": True}, "leave out ties or goal"),
        ({"name": "ranked", "paths": "a", "goal": GOAL, "unpack": "lists"}, "gap, ties and goal are options of pairs"),
        ({"name": "pairs", "paths": "a", "attributes": ["x"]}, "attributes is an option of kind 'sft'"),
        ({"name": "sft", "paths": "a", "attributes": [3]}, "must be names of numbers"),
        ({"paths": "a"}, "needs a 'name', for example {'name': 'sft'}"),
    ],
)
def test_refused_options(config, words):
    with pytest.raises((KeyError, ValueError), match=words):
        make_response_source(config)


def test_held_out_choice_follows_the_first_user_turn(jsonl):
    records = [{"messages": chat(f"q{i}", "r", "s", "t")[:n]} for i in range(200) for n in (2, 4)]
    source = make_response_source({"name": "sft", "paths": jsonl(*records), "heldout_fraction": 0.3})
    examples = list(source.examples())
    sides = [(a.split, b.split) for a, b in zip(examples[::2], examples[1::2], strict=True)]
    assert all(a == b for a, b in sides)
    assert 35 < sum(a == "validation" for a, _ in sides) < 85


# --- batches


def test_a_row_by_hand(jsonl):
    """[bos] a b | c [eos] is four inputs and four targets, of which c and eos count."""
    data = prepare("pairs", jsonl({"prompt": "ab", "chosen": "c", "rejected": "dd"}), length=6)
    (batch,) = data.evaluation_iterator(batch_size=2, split="train")
    a, b, c, d = TOKENIZER.encode("abcd").tolist()
    expected = {
        "tokens": [[1, a, b, c, 0, 0], [1, a, b, d, d, 0]],
        "targets": [[a, b, c, 2, 0, 0], [a, b, d, d, 2, 0]],
        "segment_ids": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
        "positions": [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]],
        "loss_mask": [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]],
    }
    assert batch.keys() == {*expected, "index"}
    for key, rows in expected.items():
        np.testing.assert_array_equal(batch[key], [rows, np.zeros((2, 6))], err_msg=key)
        assert batch[key].dtype == (np.float32 if key == "loss_mask" else np.int32)
    np.testing.assert_array_equal(batch["index"], [0, 0])
    assert batch["index"].dtype == np.int32
    assert data.vocab_size == 260
    assert data.info["train"] == {"examples": 1, "tokens": 11, "learnt": 5}
    np.testing.assert_array_equal(data.prompt("train", 0), [1, a, b])


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    messages=st.lists(conversations(), min_size=1, max_size=6),
    template=st.sampled_from(["plain", "chatml", "llama2"]),
    pack=st.booleans(),
    weighting=st.sampled_from(["token", "example"]),
)
def test_no_token_is_lost(tmp_path_factory, messages, template, pack, weighting):
    """Packed or not, the segments are the conversations, each once an epoch, with their masks; the rest is zeros."""
    path = tmp_path_factory.getbasetemp() / "no_token_is_lost.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    options = {"template": template, "pack": pack, "weighting": weighting}
    data = prepare("sft", str(path), length=400, **options)
    expected = []
    for m in messages:
        tokens, _, mask, _ = data.template.encode(m, data.tokenizer)
        weights = mask[1:] / (mask.sum() if weighting == "example" else 1)
        expected.append((tokens[:-1].tolist(), tokens[1:].tolist(), weights.astype(np.float32).tolist()))
    for iterator in (
        data.evaluation_iterator(batch_size=4, split="train"),
        data.train_iterator(batch_size=4, seed=1, epochs=1),
    ):
        found = []
        for batch in iterator:
            assert batch["tokens"].shape == ((4, 400) if pack else (4, 1, 400))
            for tokens, targets, segments, positions, mask in zip(
                *(batch[k].reshape(4, 400) for k in ROWS), strict=True
            ):
                for segment in range(1, segments.max() + 1):
                    (where,) = np.nonzero(segments == segment)
                    np.testing.assert_array_equal(positions[where], range(len(where)))
                    found.append((tokens[where].tolist(), targets[where].tolist(), mask[where].tolist()))
                assert not any(x[segments == 0].any() for x in (tokens, targets, positions, mask))
        assert sorted(found) == sorted(expected)


def many(kind, count):
    rng = np.random.default_rng(0)
    text = lambda: "".join(rng.choice(list("abcdef"), rng.integers(1, 7)))  # noqa: E731
    for i in range(count):
        responses = [f"{text()}{j}" for j in range(rng.integers(2, 5))]
        yield {
            "sft": {"prompt": text(), "response": responses[0]},
            "pairs": {"prompt": text(), "chosen": responses[0], "rejected": responses[1]},
            "unpaired": {"prompt": f"{text()}{i}", "response": responses[0], "label": bool(rng.integers(2))},
            "ranked": {"prompt": text(), "responses": responses, "scores": rng.normal(size=len(responses)).tolist()},
        }[kind]


LAYOUTS = {
    "sft": ("sft", {}),
    "packed": ("sft", {"pack": True}),
    "pairs": ("pairs", {}),
    "unpaired": ("unpaired", {}),
    "mismatched": ("unpaired", {"mismatched": True}),
    "ties": ("ranked", {"unpack": "all", "gap": 0.3, "ties": True}),
    "lists": ("ranked", {"unpack": "lists"}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def data(request, tmp_path_factory):
    kind, options = LAYOUTS[request.param]
    count = 60 if request.param == "ties" else 120  # which gives as many pairs
    path = tmp_path_factory.mktemp("responses") / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in many(kind, count)))
    return prepare(kind, str(path), length=20, **options)


def test_restored_from_json_at_any_batch_equals_uninterrupted(data):
    iterator = data.train_iterator(batch_size=16, seed=3, epochs=2)
    states, batches = [json.dumps(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    assert len(batches) > 3
    for done, state in enumerate(states):
        resumed = data.train_iterator(batch_size=16, seed=3, epochs=2)
        resumed.set_state(json.loads(state))
        count = None if done % 8 == 4 else 2
        assert_equal_batches(itertools.islice(resumed, count), batches[done:][:count])


def test_seed_processes_and_epochs(data):
    whole = list(itertools.islice(data.train_iterator(batch_size=4, seed=3), 5))
    assert_equal_batches(itertools.islice(data.train_iterator(batch_size=4, seed=3), 5), whole)
    other = list(itertools.islice(data.train_iterator(batch_size=4, seed=4), 5))
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(whole, other, strict=True))
    halves = [data.train_iterator(batch_size=4, seed=3, process_index=i, process_count=2) for i in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=False):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value, err_msg=key)
    if not data.packed:
        size = data.info["train"]["examples"]
        order = np.concatenate([b["index"] for b in data.train_iterator(batch_size=4, seed=3, epochs=2)])[: 2 * size]
        epochs = order.reshape(2, size)
        np.testing.assert_array_equal(np.sort(epochs), [range(size)] * 2)
        assert (epochs[0] != epochs[1]).any()


def decoded(data, batch):
    """Of each row the text that counts."""
    shape = batch["targets"].shape
    rows = zip(*(batch[k].reshape(-1, shape[-1]) for k in ("targets", "loss_mask")), strict=True)
    return np.array([data.tokenizer.decode(t[m > 0]) for t, m in rows], object).reshape(shape[:-1])


def test_index_labels_scores_and_ties_are_those_of_the_example(data):
    if data.packed:
        assert {"index", "label", "scores", "tie"}.isdisjoint(next(data.train_iterator(batch_size=4, seed=0)))
        return
    examples = data.examples("train")
    for batch in itertools.islice(data.train_iterator(batch_size=4, seed=0), 8):
        for row, index in enumerate(batch["index"]):
            example = examples[index]
            responses = [said(turns)[0] for turns in example.responses]
            count = len(responses)
            assert decoded(data, batch)[row].tolist()[:count] == responses
            prompt = data.prompt("train", index)
            np.testing.assert_array_equal(batch["tokens"][row, :count, : len(prompt)], [prompt] * count)
            if data.kind == "unpaired":
                assert batch["label"][row] == example.label
            if data.kind == "ranked":
                assert not any(batch[key][row, count:].any() for key in (*ROWS, "scores"))
                assert (np.diff(batch["scores"][row, :count]) <= 0).all()
            if example.scores is not None:
                np.testing.assert_array_equal(batch["scores"][row, :count], np.float32(example.scores))
            if data.source.ties:
                assert batch["tie"][row] == (example.scores[0] - example.scores[1] <= 0.3)
        for key in ("label", "scores", "tie"):
            assert key not in batch or batch[key].dtype == np.float32
    assert data.responses == {"sft": 1, "pairs": 2, "unpaired": 1 + data.source.mismatched, "ranked": 4}[data.kind]


def test_mismatched_responses_are_of_the_next_example_with_another_prompt(jsonl):
    records = [{"prompt": f"{'pq'[i % 2]}", "response": f"r{i}", "label": i % 3 == 0} for i in range(9)]
    data = prepare("unpaired", jsonl(*records), mismatched=True)
    batches = list(data.train_iterator(batch_size=4, seed=0, epochs=2))
    rows = np.concatenate([decoded(data, b) for b in batches])[:18]
    order = np.concatenate([b["index"] for b in batches])[:18].reshape(2, 9)
    for epoch, of_epoch in zip(order, rows.reshape(2, 9, 2), strict=True):
        for place, (own, other) in enumerate(of_epoch):
            following = [*epoch[place + 1 :], *epoch[:place]]
            expected = next(i for i in following if i % 2 != epoch[place] % 2)
            assert (own, other) == (f"r{epoch[place]}", f"r{expected}")
    whole = prepare("unpaired", jsonl(*records), mismatched=True).train_iterator(batch_size=9, seed=0)
    np.testing.assert_array_equal(next(whole)["tokens"], np.concatenate([b["tokens"] for b in batches])[:9])


def test_a_mismatched_response_that_does_not_fit_is_passed_over_or_left_out(jsonl):
    long, short = {"prompt": "p" * 10, "response": "r"}, {"prompt": "q", "response": "s" * 10}
    data = prepare("unpaired", jsonl(*({**r, "label": 1} for r in (long, short))), length=13, mismatched=True)
    (batch,) = data.evaluation_iterator(batch_size=2, split="train")
    assert decoded(data, batch).tolist() == [["r", ""], ["s" * 10, "r"]]
    assert not any(batch[key][0, 1].any() for key in ROWS)
    with pytest.raises(DataError, match="one prompt alone: mismatched needs two; train has one"):
        prepare("unpaired", jsonl(UNPAIRED, {**UNPAIRED, "response": "s"}), mismatched=True)


def test_examples_that_do_not_fit(jsonl):
    prompt = chat("aa", "b", "c")
    records = [
        {"prompt": prompt, "chosen": "d", "rejected": "eee"},
        {"prompt": "x" * 9, "chosen": "y", "rejected": "z"},
    ]
    path = jsonl(*records)
    assert prepare("pairs", path, length=11).info["too_long"] == {"skipped": 0, "shortened": 0}
    with pytest.raises(DataError, match=r"a\.jsonl:1: too long: it has 10 tokens, 9 fit"):  # bos aa b eos c eee eos
        prepare("pairs", path, length=8)
    with pytest.raises(DataError, match="no example to train on"):
        prepare("pairs", path, length=8, truncate="skip")
    data = prepare("pairs", jsonl(*records, PAIR), length=8, truncate="skip")
    assert data.info["too_long"] == {"skipped": 2, "shortened": 0}
    assert len(data.examples("train")) == 1
    data = prepare("pairs", jsonl(records[0]), length=8, truncate="drop_turns")
    assert data.info["too_long"] == {"skipped": 0, "shortened": 1}
    (batch,) = data.evaluation_iterator(batch_size=1, split="train")
    texts = [spelled(TOKENIZER, row[:n]) for row, n in zip(batch["tokens"][0], (3, 5), strict=True)]
    assert texts == ["<bos>cd", "<bos>ceee"]
    assert decoded(data, batch).tolist() == [["d", "eee"]]
    assert spelled(TOKENIZER, data.prompt("train", 0)) == "<bos>c"
    with pytest.raises(DataError, match=r"a\.jsonl:2: too long: its last exchange alone has 12 tokens, 9 fit"):
        prepare("pairs", jsonl(records[0], records[1]), length=8, truncate="drop_turns")


@pytest.mark.parametrize(
    "record", [{"messages": chat("p", "a", "q", "r")}, {"prompt": chat("p", "a", "q"), "response": "r"}]
)
@pytest.mark.parametrize("loss", ["response", "last_turn", "all"])
def test_what_is_learnt_of_demonstrations(jsonl, record, loss):
    data = prepare("sft", jsonl(record), loss=loss)
    (batch,) = data.evaluation_iterator(batch_size=1, split="train")
    learnt = spelled(TOKENIZER, batch["targets"][batch["loss_mask"] > 0])
    both = "messages" in record
    assert (
        learnt
        == {"all": "pa<eos>qr<eos>", "last_turn": "r<eos>", "response": "a<eos>r<eos>" if both else "r<eos>"}[loss]
    )


def test_bpe_sees_the_train_split_only(jsonl):
    records = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    config = {"name": "pairs", "paths": jsonl(*records), "heldout_fraction": 0.3, "template": "chatml"}
    data = prepare_responses(config, {"name": "bpe", "vocab_size": 290}, 64)
    texts = [t for e in data.examples("train") for turns in (e.prompt, *e.responses) for t in said(turns)]
    assert 0 < len(data.examples("validation")) < 60
    assert data.tokenizer == train_bpe(texts, 290)
    assert (
        next(data.train_iterator(batch_size=2, seed=0))["tokens"] == data.tokenizer.special_id("<|im_start|>")
    ).any()


def test_fingerprints_and_missing_validation(jsonl):
    path = jsonl(PAIR, {**PAIR, "prompt": "q"})
    first = prepare("pairs", path)
    assert first.fingerprint == prepare("pairs", path).fingerprint
    config = {"name": "pairs", "paths": path, "heldout_fraction": 0.0}
    others = [
        prepare("pairs", path, length=17),
        prepare("pairs", path, template="zephyr", length=64),
        prepare_responses(config, {"name": "bpe", "vocab_size": 267}, 16),
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 4
    with pytest.raises(DataError, match="no held-out examples"):
        first.evaluation_iterator(batch_size=2)
    with pytest.raises(ValueError, match="split='test' is not supported"):
        first.examples("test")
    with pytest.raises(KeyError, match="did you mean 'bytes'"):
        prepare_responses({"name": "pairs", "paths": path}, {"name": "byte"}, 16)
    with pytest.raises(DataError, match=r"a\.jsonl:1: refused by the tokenizer: 'p' at character 0"):
        prepare_responses({"name": "pairs", "paths": path}, {"name": "nucleotides"}, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 5, "process_count": 2}, "nearest: 4"),
    ],
)
def test_bad_iterator_options(jsonl, options, words):
    with pytest.raises(ValueError, match=words):
        prepare("pairs", jsonl(PAIR)).train_iterator(**{"batch_size": 4, "seed": 0, **options})
