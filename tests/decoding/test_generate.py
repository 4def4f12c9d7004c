"""Generation against the full forward recomputed for every token, and against itself under every way of running it."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.decoding.tokenizers import PieceTokenizer
from zoo.core import params as params_lib
from zoo.core.context import SeqContext
from zoo.decoding import Sampling, generate, prefill, prepare

GREEDY = Sampling(temperature=0)
LOGPROB_TOLERANCE = 2e-4
STATE_TOLERANCE = 2e-5
SLOWDOWN = 1.3  # allowed time per token of the last tokens over the first ones

SIZES = {"vocab_size": 60, "width": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "layers": 2}
MODELS = {
    "samba": functools.partial(zoo.create, "samba-tiny", **SIZES, window=6),
    "mamba": functools.partial(zoo.create, "mamba-tiny", vocab_size=60, width=32, layers=2),
    "llama": functools.partial(zoo.create, "llama-tiny", **SIZES, max_length=64),
}
PROMPTS = [[5, 3, 9], [7] * 4 + list(range(10, 21)), [42], list(range(30, 52)), [1, 2, 2]]
NEW = 20


@functools.cache
def model_and_params(name):
    model = MODELS[name]()
    rng = np.random.default_rng(0)

    def redraw(path, spec):  # around what keeps a model of random matrices lively: no weight stays where it began
        centre = 1.0 if "norm" in path.split("/") else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(spec.shape), spec.dtype)

    return model, params_lib.map_specs(redraw, model.param_specs())


@functools.cache
def together(name):
    model, params = model_and_params(name)
    return generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)


@functools.partial(jax.jit, static_argnames="model")
def full_forward(params, tokens, length, *, model):
    ctx = SeqContext.from_lengths(length[None], tokens.shape[1])
    logits = model.apply(params, tokens, ctx=ctx, logits="last").logits[0, 0]
    return logits, jnp.argmax(logits), jnp.max(jax.nn.log_softmax(logits))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_full_forward(name):
    model, params = model_and_params(name)
    for prompt, result in zip(PROMPTS, together(name), strict=True):
        tokens, want, logprobs = list(prompt), [], []
        for _ in range(NEW):
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(tokens)] = tokens
            _, token, logprob = full_forward(params, padded, np.int32(len(tokens)), model=model)
            want.append(int(token))
            logprobs.append(float(logprob))
            tokens.append(want[-1])
        assert result.tokens == want
        assert result.finish_reason == "length"
        assert result.text is None
        chex.assert_trees_all_close(np.array(result.logprobs), np.array(logprobs), atol=LOGPROB_TOLERANCE)
    assert len({token for result in together(name) for token in result.tokens}) > 10  # not one fixed point


@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_equals_the_row_in_a_ragged_batch(name):
    model, params = model_and_params(name)
    (alone,) = generate(model, params, PROMPTS[1:2], max_new_tokens=NEW, sampling=GREEDY)
    assert alone.tokens == together(name)[1].tokens


@pytest.mark.parametrize("options", [{"prefill_chunk": 1, "block": 1}, {"prefill_chunk": 5, "block": 7}])
def test_chunk_and_block_do_not_matter(options):
    model, params = model_and_params("samba")
    got = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, **options)
    assert [r.tokens for r in got] == [r.tokens for r in together("samba")]


def test_chunks_do_not_matter_for_full_attention():
    model, params = model_and_params("llama")
    got = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, prefill_chunk=4)
    assert [r.tokens for r in got] == [r.tokens for r in together("llama")]


def test_scan_equals_unrolled_and_prepared_parameters_are_accepted():
    model, params = model_and_params("samba")
    for prepared in (params, prepare(model, params, unrolled=True)):
        got = generate(model, prepared, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, unrolled=False)
        assert [r.tokens for r in got] == [r.tokens for r in together("samba")]


def test_prepare_casts_matrices_alone():
    model = zoo.create("samba-tiny", **SIZES, window=6, dtype="bfloat16")
    prepared = params_lib.flatten(prepare(model, model_and_params("samba")[1], unrolled=False))
    specs = params_lib.flatten(model.param_specs())
    assert {path for path, leaf in prepared.items() if leaf.dtype == jnp.bfloat16} == {
        path for path, spec in specs.items() if spec.inputs
    }


def test_sampling_is_reproducible_and_rows_are_independent():
    model, params = model_and_params("mamba")
    run = functools.partial(
        generate, model, params, max_new_tokens=NEW, sampling=Sampling(temperature=1.3, top_k=30, top_p=0.95)
    )
    tokens = [r.tokens for r in run(PROMPTS, key=jax.random.key(7))]
    assert tokens == [r.tokens for r in run(PROMPTS, key=jax.random.key(7), block=3)]
    assert tokens != [r.tokens for r in run(PROMPTS, key=jax.random.key(8))]
    assert tokens[0] == run(PROMPTS[:1], key=jax.random.key(7))[0].tokens
    key = jax.random.fold_in(jax.random.key(7), 4)[None]
    assert tokens[4] == run(PROMPTS[4:], key=key)[0].tokens


def test_first_and_second_tokens_follow_the_model():
    """Same prompt in 2,000 rows: frequencies of the first token, and of the second one given the commonest first."""
    model, params = model_and_params("mamba")
    results = generate(
        model, params, [[5, 3, 9]] * 2000, max_new_tokens=2, sampling=Sampling(top_k=4), key=jax.random.key(0)
    )
    drawn = np.array([r.tokens for r in results])
    for given, column in (([], drawn[:, 0]), ([int(drawn[0, 0])], drawn[drawn[:, 0] == drawn[0, 0], 1])):
        tokens = [5, 3, 9, *given]
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(full_forward(params, padded, np.int32(len(tokens)), model=model)[0], np.float64)
        best = np.argsort(-logits)[:4]
        expected = np.exp(logits[best]) / np.exp(logits[best]).sum()
        counts = np.array([(column == token).sum() for token in best])
        assert counts.sum() == column.size
        deviation = np.abs(counts / column.size - expected)
        assert (deviation < 5 * np.sqrt(expected * (1 - expected) / column.size) + 1e-9).all()


def test_finish_reasons_and_rows_that_end_early():
    model, params = model_and_params("samba")
    plain = together("samba")
    eos = plain[0].tokens[4]
    results = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, eos_id=(eos, 59), pad_id=11)
    for result, reference in zip(results, plain, strict=True):
        ends = [i for i, token in enumerate(reference.tokens) if token in (eos, 59)]
        length = ends[0] + 1 if ends else NEW
        assert result.tokens == reference.tokens[:length]
        assert len(result.logprobs) == length
        assert result.finish_reason == ("eos" if ends else "length")
    assert {"eos", "length"} == {r.finish_reason for r in results}


def test_padding_leaves_the_state_of_rows_alone():
    """A row whose prompt has ended, and a row that is done, keep their state to the bit."""
    model, params = model_and_params("samba")
    state, logits = prefill(model, params, [[5, 3, 9], list(range(40))], prefill_chunk=8)
    alone, alone_logits = prefill(model, params, [[5, 3, 9], [1, 2, 2, 1, 0]], prefill_chunk=8)
    row = lambda tree: jax.tree.map(lambda a: np.asarray(a[:, 0]), tree.layers)  # noqa: E731
    chex.assert_trees_all_close(row(state), row(alone), atol=STATE_TOLERANCE)
    chex.assert_trees_all_close(logits[0], alone_logits[0], atol=STATE_TOLERANCE)
    before = row(state)
    poisoned = {**params, "embedding": params["embedding"].at[59].set(jnp.nan)}
    ctx = SeqContext(state.next_position[:, None], jnp.array([[0], [1]]))
    apply = jax.jit(functools.partial(model.apply, logits="none"))
    after = apply(poisoned, jnp.array([[59], [4]]), ctx=ctx, state=state).state
    chex.assert_trees_all_equal(row(after), before)
    np.testing.assert_array_equal(after.next_position, [3, 41])


def text_run(**options):
    model, params = model_and_params("samba")
    shown = {b: ([], []) for b in range(len(PROMPTS))}

    def on_tokens(row, tokens, text):
        shown[row][0].extend(tokens)
        shown[row][1].append(text)

    results = generate(
        model,
        params,
        PROMPTS,
        max_new_tokens=NEW,
        sampling=GREEDY,
        tokenizer=options.pop("tokenizer", PieceTokenizer(60)),
        on_tokens=on_tokens,
        **options,
    )
    for row, result in enumerate(results):
        assert shown[row][0] == result.tokens
        assert "".join(shown[row][1]) == result.text
    return results


@pytest.mark.parametrize("block", [7, 32])
def test_streamed_text_and_stop_strings(block):
    plain = text_run(block=block)
    tokenizer = PieceTokenizer(60)
    for result, reference in zip(plain, together("samba"), strict=True):
        assert result.tokens == reference.tokens
        assert result.text == tokenizer.decode_bytes(result.tokens).decode("utf-8", "replace")
    # Stop strings that cross tokens: the six characters around the 9th token of rows 0 and 3.
    stops = []
    for row in (0, 3):
        at = len(tokenizer.decode_bytes(plain[row].tokens[:9]).decode("utf-8", "replace"))
        stops.append(plain[row].text[max(at - 3, 0) : at + 3])
    results = text_run(block=block, stop=stops)
    for result, reference in zip(results, plain, strict=True):
        starts = [i for s in stops if (i := reference.text.find(s)) >= 0]
        if starts:
            assert result.text == reference.text[: min(starts)]
            assert len(result.tokens) < NEW
        else:
            assert result == reference
        assert result.finish_reason == ("stop" if starts else "length")
        assert result.tokens == reference.tokens[: len(result.tokens)]
    assert results[0].finish_reason == results[3].finish_reason == "stop"


def test_end_of_sequence_is_the_tokenizers_and_has_no_text():
    eos = together("samba")[1].tokens[6]
    tokenizer = PieceTokenizer(60, eos_id=eos)
    result = text_run(tokenizer=tokenizer)[1]
    assert result.finish_reason == "eos"
    assert result.tokens[-1] == eos
    assert result.text == tokenizer.decode_bytes(result.tokens[:-1]).decode("utf-8", "replace")
    assert text_run(tokenizer=tokenizer, eos_id=())[1].finish_reason == "length"


def test_ids_beyond_the_tokenizer_are_never_drawn():
    results = text_run(tokenizer=PieceTokenizer(25))
    assert max(token for r in results for token in r.tokens) < 25
    assert max(token for r in together("samba") for token in r.tokens) >= 25


def test_texts_are_encoded():
    model, params = model_and_params("samba")
    run = functools.partial(generate, model, params, max_new_tokens=3, sampling=GREEDY, tokenizer=PieceTokenizer(60))
    assert run(["abcabbcab"]) == run([[0, 1, 2, 0, 1, 1, 2, 0, 1]])
    assert run([]) == []


def test_similar_calls_compile_once():
    from zoo.decoding.generate import _decode_block, _prefill_chunk

    model, params = model_and_params("mamba")
    params = prepare(model, params)
    run = functools.partial(generate, model, params, sampling=GREEDY, prefill_chunk=8, block=4)
    before = _prefill_chunk._cache_size(), _decode_block._cache_size()
    run([[1] * 5, [2] * 20], max_new_tokens=9)
    run([[1] * 30, [2] * 9], max_new_tokens=13, eos_id=3, pad_id=1)
    run([[1] * 6, [2] * 7], max_new_tokens=2, eos_id=4)
    after = _prefill_chunk._cache_size(), _decode_block._cache_size()
    assert after[0] - before[0] == 1
    assert after[1] - before[1] == 1


def test_not_finite_logits_are_an_error():
    model, params = model_and_params("llama")
    broken = {**params, "embedding": params["embedding"].at[42, 0].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="row 2: the logits of new token 0"):
        generate(model, broken, PROMPTS, max_new_tokens=2, sampling=GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1], [4, 60]]}, r"prompts\[1\]\[1\] is 60, outside the vocabulary 0\.\.59"),
        ({"prompts": [[1, -3]]}, r"prompts\[0\]\[1\] is -3"),
        ({"prompts": [[1.5]]}, r"prompts\[0\] must be a flat list of integers"),
        ({"prompts": [1, 2]}, r"write \[prompt\]"),
        ({"prompts": ["ab"]}, r"prompts\[0\] is a text and there is no tokenizer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be >= 1"),
        ({"block": 0}, "block must be >= 1"),
        ({"pad_id": 60}, "pad_id=60 is outside"),
        ({"eos_id": 60}, "eos_id=60 is outside"),
        ({"stop": ["x"]}, r"stop=\('x',\) needs a tokenizer"),
        ({"stop": [""], "tokenizer": PieceTokenizer(60)}, "non-empty strings"),
        ({"tokenizer": PieceTokenizer(61)}, "61 ids.*only 60"),
        ({"sampling": Sampling()}, "give a key"),
        ({"prompts": [[1], [1] * 50], "max_new_tokens": 15}, r"prompts\[1\] has 50 tokens.* 65 positions.* is 64"),
        ({"max_new_tokens": 10, "max_length": 9}, r"11 positions, but max_length is 9 .*max_new_tokens <= 8"),
    ],
)
def test_bad_input_is_named_at_the_door(options, message, monkeypatch):
    model, params = model_and_params("llama")
    monkeypatch.setattr(type(model), "apply", None)  # nothing may run
    with pytest.raises(ValueError, match=message):
        generate(model, params, **{"prompts": [[1]], "max_new_tokens": 2, "sampling": GREEDY, **options})


def test_recurrent_models_have_no_longest_length():
    model, params = model_and_params("samba")
    got = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, max_length=4)
    assert [r.tokens for r in got] == [r.tokens for r in together("samba")]


def test_samba_state_has_one_size_at_any_length():
    model, params = model_and_params("samba")
    specs = [model.state_specs(3, length) for length in (1, 1000, 10**9)]
    shapes = [jax.tree.map(lambda s: (s.shape, s.dtype), spec, is_leaf=params_lib.is_spec) for spec in specs]
    assert shapes[0] == shapes[1] == shapes[2]
    sizes = {
        params_lib.nbytes(prefill(model, params, [[1] * length] * 3, prefill_chunk=8)[0]) for length in (5, 8, 100)
    }
    assert sizes == {params_lib.nbytes(specs[0])}
    assert 0 < params_lib.nbytes(model.state_specs(1)) * 3 == params_lib.nbytes(specs[0])


@pytest.mark.slow
def test_twenty_thousand_tokens_at_constant_memory_and_speed():
    from zoo.decoding.generate import _decode_block

    model = zoo.create("samba-tiny")
    params = prepare(model, model.init(jax.random.key(0)))
    total, block = 20_000, 100
    run = functools.partial(
        generate, model, params, [[1, 2, 3]], sampling=Sampling(top_k=50), key=jax.random.key(1), block=block
    )
    run(max_new_tokens=block)  # compiles
    compiled, times, live = _decode_block._cache_size(), [time.perf_counter()], []

    def on_tokens(row, tokens, text):
        assert len(tokens) == block
        times.append(time.perf_counter())
        live.append(sum(array.nbytes for array in jax.live_arrays()))

    (result,) = run(max_new_tokens=total, on_tokens=on_tokens)
    assert len(result.tokens) == total
    assert _decode_block._cache_size() == compiled
    assert set(live) == {live[0]}
    per_token = np.diff(times) / block
    window = 2_000 // block
    first, last = np.median(per_token[:window]), np.median(per_token[-window:])
    print(f"{total} tokens in {times[-1] - times[0]:.2f} s; {first * 1e6:.0f} and {last * 1e6:.0f} us per token at the")
    print(f"beginning and the end; {live[0]:,} bytes of live arrays, {len(set(result.tokens))} distinct tokens")
    assert last <= SLOWDOWN * first
