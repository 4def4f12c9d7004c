import itertools
import json
import math

import grain
import hypothesis
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st

from pipelines import DataError, bits_per_byte, evaluation_iterator, train_iterator, unigram_bits_per_byte

KEYS = {"tokens", "targets", "loss_mask", "segment_ids", "positions"}
BOS, EOS = 1, 2


def make_documents(lengths):
    """[bos] tokens [eos]; every token is unique, so that a pair names its place in the corpus."""
    fresh = itertools.count(10)
    return [np.array([BOS, *itertools.islice(fresh, n), EOS], np.uint16) for n in lengths]


DOCUMENTS = make_documents([5, 1, 40, 0, 13, 7, 22, 3, 64, 9])
DOCUMENT_LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def train(documents=DOCUMENTS, **options):
    return train_iterator(documents, **{"length": 8, "batch_size": 4, "seed": 3, "shuffle_rows": 5, **options})


def pairs_of(batches):
    """All (input, target) pairs that carry loss."""
    found = []
    for batch in batches:
        keep = batch["loss_mask"] > 0
        found += zip(batch["tokens"][keep].tolist(), batch["targets"][keep].tolist(), strict=True)
    return found


def expected_pairs(documents):
    return [pair for document in documents for pair in itertools.pairwise(document.tolist())]


def assert_equal_batches(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def rows_by_hand(documents, length):
    """Oracle: the rows of one pass, position by position."""
    rows, row, segment, position = [], [], 0, 0
    for document in documents:
        for index, (token, target) in enumerate(itertools.pairwise(document.tolist())):
            if len(row) == length:
                rows.append(row)
                row = []
            if index == 0 or not row:
                segment, position = (segment + 1 if row else 1), 0
            row.append((token, target, 1, segment, position))
            position += 1
    rows.append(row + [(0, 0, 0, 0, 0)] * (length - len(row)))
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    return dict(zip(names, np.moveaxis(np.array(rows), -1, 0), strict=True))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(lengths=DOCUMENT_LENGTHS, length=st.integers(1, 20), batch_size=st.integers(1, 4))
def test_evaluation_rows_are_those_packed_by_hand(lengths, length, batch_size):
    documents = make_documents(lengths)
    batches = list(evaluation_iterator(documents, length=length, batch_size=batch_size))
    expected = rows_by_hand(documents, length)
    count = len(expected["tokens"])
    assert len(batches) == math.ceil(count / batch_size)
    for key, rows in expected.items():
        found = np.concatenate([batch[key] for batch in batches])
        np.testing.assert_array_equal(found[:count], rows, err_msg=key)
        assert not found[count:].any()


# Grain's index shuffle is slow on very small sets (10 ms an index): few examples.
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    lengths=DOCUMENT_LENGTHS, length=st.integers(1, 20), window=st.integers(1, 9), epochs=st.integers(1, 2)
)
def test_training_predicts_every_token_after_bos_once_an_epoch(lengths, length, window, epochs):
    documents = make_documents(lengths)
    batches = list(train(documents, length=length, batch_size=3, epochs=epochs, shuffle_rows=window))
    assert sorted(pairs_of(batches)) == sorted(expected_pairs(documents) * epochs)


def test_rows_keep_their_contract():
    for batch in itertools.islice(train(), 30):
        assert batch.keys() == KEYS
        for key in KEYS:
            assert batch[key].shape == (4, 8)
            assert batch[key].dtype == (np.float32 if key == "loss_mask" else np.int32)
        segment, position = batch["segment_ids"], batch["positions"]
        np.testing.assert_array_equal(batch["loss_mask"], segment > 0)
        inside = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
        np.testing.assert_array_equal(position[:, 1:], np.where(inside, position[:, :-1] + 1, 0))
        starts = np.diff(segment, axis=1) != 0
        assert (np.diff(segment, axis=1)[starts] == 1).all()
        assert (segment[:, 0] == 1).all()
        assert not position[:, 0].any()
        assert (batch["tokens"] != EOS).all()
        np.testing.assert_array_equal(batch["tokens"][:, 1:] == BOS, starts)


def test_a_fixed_seed_fixes_the_batches_and_another_changes_them():
    first, again, other = (list(itertools.islice(train(seed=seed), 12)) for seed in (3, 3, 4))
    assert_equal_batches(first, again)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_epochs_differ_in_order():
    order = [token for pair in pairs_of(train(epochs=2, shuffle_rows=1)) for token in pair[1:]]
    half = len(order) // 2
    assert sorted(order[:half]) == sorted(order[half:])
    assert order[:half] != order[half:]


def test_row_windows_spread_a_long_document_over_batches():
    documents = make_documents([400, *[3] * 100])

    def most_rows_of_the_long_document(window):
        batches = train(documents, epochs=1, batch_size=8, shuffle_rows=window)
        return max((((b["targets"] > 9) & (b["targets"] < 410)).all(1)).sum() for b in batches)

    assert most_rows_of_the_long_document(1) == 8
    assert most_rows_of_the_long_document(1000) < 8


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("lengths", [[5, 1, 40, 0, 13, 7, 22], [7, 7, 15, 7, 23], [3] * 9])
def test_restored_from_json_at_any_batch_equals_uninterrupted(window, lengths):
    # [7, 7, 15, ..] ends rows exactly where documents end: the state then holds no remainder.
    documents = make_documents(lengths)
    options = {"length": 8, "batch_size": 2, "epochs": 2, "shuffle_rows": window}
    iterator = train(documents, **options)
    states, batches = [json.dumps(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    assert len(batches) > 4
    for done, state in enumerate(states[:-1]):
        restored = train(documents, **options)
        next(restored)  # restoring replaces whatever was read before
        restored.set_state(json.loads(state))
        assert_equal_batches(itertools.islice(restored, 4), batches[done : done + 4])


def test_orbax_checkpoint_of_the_iterator_continues_exactly(tmp_path, bpe_data):
    def make():
        return train_iterator(bpe_data.train, length=64, batch_size=4, seed=1, shuffle_rows=16)

    with ocp.CheckpointManager(tmp_path) as manager:
        iterator = make()
        for step in (0, 7):
            if step:
                for _ in range(7):
                    next(iterator)
            manager.save(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        for step in (0, 7):
            restored = make()
            manager.restore(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
            assert_equal_batches(itertools.islice(restored, 10), itertools.islice(make(), step, step + 10))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_are_the_one_process_batches_with_one_state(count):
    for make in (
        lambda **kw: train(epochs=2, **kw),
        lambda **kw: evaluation_iterator(DOCUMENTS, length=8, batch_size=4, **kw),
    ):
        whole = make()
        parts = [make(process_index=i, process_count=count) for i in range(count)]
        batches = list(zip(*parts, strict=True))  # strict: an equal number of batches for every process
        joined = [{key: np.concatenate([p[key] for p in batch]) for key in batch[0]} for batch in batches]
        assert batches[0][0]["tokens"].shape == (4 // count, 8)
        assert_equal_batches(joined, whole)
        assert {json.dumps(part.get_state()) for part in parts} == {json.dumps(whole.get_state())}


def test_resuming_with_another_number_of_processes_continues_the_same_batches():
    one = train()
    for _ in range(5):
        next(one)
    halves = [train(process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(6):
        joined = np.concatenate([next(half)["targets"] for half in halves])
        np.testing.assert_array_equal(joined, next(one)["targets"])


def test_evaluation_counts_every_byte_and_target(bpe_data, byte_data):
    for data in (bpe_data, byte_data):
        lengths = data.tokenizer.byte_lengths
        batches = list(evaluation_iterator(data.validation, length=100, batch_size=8, byte_lengths=lengths))
        assert sum(int(b["target_bytes"].sum()) for b in batches) == data.validation.num_bytes
        assert sum(int(b["loss_mask"].sum()) for b in batches) == data.validation.num_targets
        assert data.validation.num_bytes == sum(len(text) for text in data.texts("validation"))
        for batch in batches:
            assert not batch["target_bytes"][batch["loss_mask"] == 0].any()


def test_a_unigram_model_scored_through_the_batches_is_the_unigram_baseline(byte_data):
    train_text = b"".join(byte_data.texts("train"))
    counts = np.bincount(np.frombuffer(train_text, np.uint8), minlength=256) + 1.0
    nll = np.zeros(byte_data.tokenizer.vocab_size)  # eos is free here, as in the baseline
    nll[4:] = -np.log(counts / counts.sum())
    batches = evaluation_iterator(byte_data.validation, length=128, batch_size=16)
    total = sum(float((nll[b["targets"]] * b["loss_mask"]).sum()) for b in batches)
    baseline = unigram_bits_per_byte(byte_data.texts("train"), byte_data.texts("validation"))
    np.testing.assert_allclose(bits_per_byte(total, byte_data.validation.num_bytes), baseline, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 31}, "seed="),
        ({"epochs": 0}, "epochs=0"),
        ({"shuffle_rows": 0}, "shuffle_rows=0"),
        ({"batch_size": 5, "process_count": 2}, "nearest: 4"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_no_documents_is_an_error():
    with pytest.raises(DataError, match="no documents to train on"):
        train([])
    with pytest.raises(DataError, match="raise heldout_fraction"):
        evaluation_iterator([], length=8, batch_size=2)
