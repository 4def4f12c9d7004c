"""Generated tasks: groups against matrices, targets against oracles, examples that depend on seed and index alone."""

import collections
import json

import numpy as np
import pytest

from pipelines import TaskDataset, make_task
from pipelines.synthetic import MQAR, StateTracking, group
from tests.pipelines.test_packing import assert_equal_batches

DRAWS = 2000
STANDARD_ERRORS = 5.0  # of a share of DRAWS

ORDERS = {"s2": 2, "s3": 6, "s5": 120, "a4": 12, "a5": 60, "z7": 7, "a4xz5": 60, "z2xs3": 12}


def _matrices(permutations):
    """e_p -> e_(a(p)), one matrix per element."""
    return np.eye(permutations.shape[1], dtype=int)[permutations].transpose(0, 2, 1)


@pytest.mark.parametrize("name", ORDERS)
def test_groups(name):
    """The table is that of permutation matrices; the generators reach every element."""
    found = group(name)
    matrices = _matrices(found.permutations)
    assert len(found) == ORDERS[name] == len({m.tobytes() for m in matrices})
    np.testing.assert_array_equal(matrices[0], np.eye(len(matrices[0])))
    rng = np.random.default_rng(0)
    for a, b in rng.integers(len(found), size=(40, 2)):
        np.testing.assert_array_equal(matrices[found.table[a, b]], matrices[a] @ matrices[b])
    assert (np.sort(found.table, axis=0) == np.arange(len(found))[:, None]).all()
    assert (np.sort(found.table, axis=1) == np.arange(len(found))).all()
    reached = {0}
    while (more := {int(found.table[a, g]) for a in reached for g in found.generators} | reached) != reached:
        reached = more
    assert len(reached) == len(found)
    assert found.generators[0] == 0


def test_even_permutations_have_determinant_one():
    assert (np.linalg.det(_matrices(group("a5").permutations)) > 0).all()
    assert (np.linalg.det(_matrices(group("a4").permutations)) > 0).all()


@pytest.mark.parametrize("inputs", ["elements", "generators"])
def test_targets_are_the_running_products(inputs):
    task = StateTracking(group="s5", inputs=inputs, seed=3)
    matrices = _matrices(task.elements.permutations)
    tokens, targets, asked = task.example("train", 5, 40)
    product = np.eye(5, dtype=int)
    for token, target in zip(tokens, targets, strict=True):
        product = product @ matrices[token]
        np.testing.assert_array_equal(matrices[target], product)
    assert asked.all()
    assert (task.ids, task.answers) == (120, 120)
    seen = {int(t) for i in range(20) for t in task.example("train", i, 40).tokens}
    assert seen == set(task.elements.generators) if inputs == "generators" else len(seen) > 100


@pytest.mark.parametrize(("passes", "fill"), [(1, True), (1, False), (2, True)])
def test_a_dictionary_solves_recall(passes, fill):
    """Reading the pairs from left to right into a dict answers every query, and every key is asked for once."""
    task = MQAR(vocab_size=64, pairs=5, passes=passes, random_non_queries=fill)
    length, shown = 40, 10 * passes
    for index in range(50):
        tokens, targets, asked = task.example("train", index, length)
        memory = dict(tokens[:shown].reshape(-1, 2).tolist())
        assert len(memory) == 5
        assert all(1 <= key < 32 <= value < 64 for key, value in memory.items())
        assert len(set(memory.values())) == 5
        np.testing.assert_array_equal(tokens[:10], tokens[shown - 10 : shown])
        places = np.flatnonzero(asked)
        assert (places >= shown).all()
        assert (places % 2 == 0).all()
        assert sorted(tokens[places]) == sorted(memory)
        assert [memory[key] for key in tokens[places].tolist()] == targets[places].tolist()
        between = np.delete(tokens[shown:], places - shown)
        assert between.any() == fill
    assert (task.ids, task.answers) == (64, 32)


def test_most_queries_come_early():
    """28 slots for 4 pairs in 64 tokens; with one pair the first slot is p(1), which is 0.25 at power 0.01."""
    task = MQAR(vocab_size=64, pairs=1)
    places = [int(np.flatnonzero(task.example("train", i, 58).asked)[0]) for i in range(DRAWS)]
    weight = np.arange(1, 29) ** -0.99
    expected, counts = weight / weight.sum(), collections.Counter(places)
    assert expected[0] == pytest.approx(0.25, abs=0.005)
    assert set(counts) <= set(range(2, 58, 2))
    for slot in (0, 1, 2, 27):
        p = expected[slot]
        assert abs(counts[2 + 2 * slot] / DRAWS - p) < STANDARD_ERRORS * np.sqrt(p * (1 - p) / DRAWS), slot
    even = MQAR(vocab_size=64, pairs=1, power=1.0)
    late = np.mean([np.flatnonzero(even.example("train", i, 58).asked)[0] >= 30 for i in range(DRAWS // 4)])
    assert abs(late - 0.5) < STANDARD_ERRORS * 0.5 / np.sqrt(DRAWS // 4)


@pytest.mark.parametrize("name", ["state_tracking", "mqar"])
def test_examples_depend_on_seed_split_and_index_alone(name):
    task, again, other = (make_task({"name": name, "seed": seed}) for seed in (1, 1, 2))
    rows = [task.example("train", i, 32).tokens for i in range(3)]
    for i in (2, 0, 1):  # in another order, from another object
        np.testing.assert_array_equal(again.example("train", i, 32).tokens, rows[i])
    for different in (rows[1], other.example("train", 0, 32).tokens, task.example("validation", 0, 32).tokens):
        assert (different != rows[0]).any()


def test_batches():
    data = TaskDataset(StateTracking(group="s3", train_examples=10, validation_examples=5, validation_length=9), 6)
    batches = list(data.train_iterator(batch_size=4, seed=0, epochs=2))
    rows = np.concatenate([batch["tokens"] for batch in batches])[:20]
    epoch = sorted(data.task.example("train", i, 6).tokens.tolist() for i in range(10))
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == epoch
    assert (rows[:10] != rows[10:]).any(), "another order in every epoch"
    assert {key: value.dtype.name for key, value in batches[0].items()} == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32"),
        "loss_mask": "float32",
    }
    np.testing.assert_array_equal(batches[0]["positions"], [range(6)] * 4)

    held_out = list(data.evaluation_iterator(batch_size=4))
    assert [batch["tokens"].shape for batch in held_out] == [(4, 9)] * 2
    np.testing.assert_array_equal(held_out[1]["tokens"][0], data.task.example("validation", 4, 9).tokens)
    for key in ("segment_ids", "loss_mask"):
        np.testing.assert_array_equal(held_out[1][key].any(axis=1), [True, False, False, False])
    halves = [list(data.evaluation_iterator(batch_size=4, process_index=i, process_count=2)) for i in (0, 1)]
    for whole, *parts in zip(held_out, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), whole["tokens"])


def test_iterators_continue_where_they_were():
    make = lambda: TaskDataset(MQAR(vocab_size=16, pairs=2), 12).train_iterator(batch_size=3, seed=5)  # noqa: E731
    first, second = make(), make()
    next(first)
    state = json.loads(json.dumps(first.get_state()))
    second.set_state(state)
    assert_equal_batches([next(first) for _ in range(2)], [next(second) for _ in range(2)])


def test_fingerprints():
    prints = [
        TaskDataset(task, 32).fingerprint
        for task in (StateTracking(), StateTracking(group="a5"), StateTracking(seed=1), MQAR(), MQAR(power=0.5))
    ]
    assert len(set(prints)) == len(prints)
    assert TaskDataset(StateTracking(), 32).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_task({"name": "mqra"}), "unknown task 'mqra'; did you mean 'mqar'"),
        (lambda: make_task({"name": "mqar", "pair": 3}), "no option 'pair'; did you mean 'pairs'"),
        (lambda: make_task({"pairs": 3}), "needs a 'name'"),
        (lambda: group("s6"), "group='s6' is unknown: s2 to s5"),
        (lambda: group("d4"), "group='d4' is unknown"),
        (lambda: group("s5xz2"), "has 240 elements, at most 120"),
        (lambda: StateTracking(inputs="element"), "inputs='element' is not supported; did you mean .*elements"),
        (lambda: StateTracking(seed=-1), "seed=-1 must be an int"),
        (lambda: StateTracking(train_examples=0), "train_examples=0 must be an int of at least 1"),
        (lambda: StateTracking().example("test", 0, 4), "split='test' is not supported"),
        (lambda: MQAR(vocab_size=8, pairs=4), "has 3 keys for pairs=4; it must be at least 10"),
        (lambda: MQAR(power=0.0), "power=0.0 must be > 0"),
        (lambda: TaskDataset(MQAR(pairs=4), 15), "even length of at least 16 .* got 15; the nearest is 16"),
        (lambda: TaskDataset(MQAR(pairs=4, validation_length=33), 32), "got 33; the nearest is 34"),
    ],
)
def test_errors_at_the_door(make, words):
    with pytest.raises((ValueError, KeyError), match=words):
        make()
