"""The step: accumulation, the guard, moving average, schedules, decay masks, utilisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import objectives
from launch import flops, optimizer, step
from zoo.core import params as params_lib
from zoo.core.params import flatten
from zoo.models import create

ROUNDING = 2e-6  # of gradients of order one, summed in another order


def model(name="llama-tiny"):
    """A model that compiles fast."""
    if name == "samba-tiny":
        return create(name, width=16, layers=2, heads=2, kv_heads=1, hidden=32, window=8, state=4, vocab_size=64)
    return create(name, width=16, layers=1, heads=2, kv_heads=1, hidden=32, vocab_size=64)


def draw_batch(rows=8, length=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)  # ragged: a mean of means would be another number
    segment_ids = (np.arange(length) < lengths[:, None]).astype(np.int32)
    segment_ids[0, 3:] *= 2
    positions = np.where(segment_ids == 2, np.arange(length) - 3, np.arange(length)) * (segment_ids > 0)
    return {
        "tokens": rng.integers(0, 64, (rows, length), dtype=np.int32),
        "targets": rng.integers(0, 64, (rows, length), dtype=np.int32),
        "loss_mask": (segment_ids > 0).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": positions.astype(np.int32),
    }


@functools.cache
def sgd_step(accumulation, learning_rate=1.0, ema_decay=0.0):
    """A jitted step, and a state; with SGD of rate one the update is the gradient."""
    zoo_model = model()
    transformation = optax.sgd(learning_rate)
    loss = step.language_model_loss(zoo_model, objectives.create("cross_entropy", z_loss=1e-2))
    function = step.make_train_step(
        loss, transformation, lambda _: learning_rate, accumulation=accumulation, ema_decay=ema_decay
    )
    init = functools.partial(step.init_state, zoo_model.param_specs(), transformation, seed=0, ema=ema_decay > 0)
    return jax.jit(function), jax.jit(init)()


def test_accumulation_is_the_whole_batch():
    batch = draw_batch()
    results = []
    for accumulation in (1, 2, 8):
        function, state = sgd_step(accumulation)
        results.append((*function(state, batch), state))
    (whole, metrics, before), *others = results
    assert float(metrics["tokens"]) == batch["loss_mask"].sum()
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), whole.params, before.params)
    assert max(jax.tree.leaves(moved)) > 1e-2
    for new, accumulated_metrics, _ in others:
        for a, b in zip(*map(jax.tree.leaves, (new.params, whole.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)
        for name in ("loss", "nll", "accuracy", "grad_norm", "z_loss"):
            np.testing.assert_allclose(accumulated_metrics[name], metrics[name], rtol=10 * ROUNDING)


def test_the_loss_is_a_mean_over_tokens():
    """Packing, padding and the masked mean, against rows that are run alone."""
    batch = draw_batch(rows=3)
    function, state = sgd_step(1)
    _, metrics = function(state, batch)
    total, weight = 0.0, 0
    apply = jax.jit(lambda tokens: model().apply(state.params, tokens).logits)
    for row in range(3):
        for segment in set(batch["segment_ids"][row]) - {0}:
            inside = batch["segment_ids"][row] == segment
            tokens, targets = batch["tokens"][row][inside], batch["targets"][row][inside]
            alone = np.pad(tokens, (0, 12 - len(tokens)))  # what follows cannot be seen
            logits = np.asarray(apply(alone[None])[0, : len(tokens)], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= log_p[np.arange(len(targets)), targets].sum()
            weight += len(targets)
    np.testing.assert_allclose(metrics["nll"], total / weight, rtol=1e-5)


@pytest.mark.parametrize("where", ["mask", "learning_rate"])
def test_guard_keeps_the_state(where):
    batch = draw_batch()
    if where == "mask":
        batch["loss_mask"][0, 0] = np.nan
    function, state = sgd_step(2, learning_rate=np.inf if where == "learning_rate" else 1.0, ema_decay=0.5)
    new, metrics = function(state, batch)
    assert not bool(metrics["finite"])
    for a, b in zip(*map(jax.tree.leaves, (new, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moving_average():
    function, state = sgd_step(1, ema_decay=0.75)
    new, metrics = function(state, draw_batch())
    assert bool(metrics["finite"])
    assert int(new.step) == 1
    for average, old, param in zip(*map(jax.tree.leaves, (new.ema, state.params, new.params)), strict=True):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * param, atol=ROUNDING)


def test_bfloat16_compute_keeps_float32_parameters():
    zoo_model = create("llama-tiny", dtype="bfloat16", width=16, layers=1, heads=2, kv_heads=1, hidden=32)
    loss = step.language_model_loss(zoo_model, objectives.create("cross_entropy"))
    params = params_lib.abstract(zoo_model.param_specs())
    gradients = lambda p: step.summed_gradients(loss, p, draw_batch(), jax.random.key(0))  # noqa: E731
    jaxpr, (_, grads) = jax.make_jaxpr(gradients, return_shape=True)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype(jnp.float32)}
    assert "bf16[8,12,16]" in str(jaxpr)


def test_microbatches_take_every_kth_row():
    batch = {"x": jnp.arange(12).reshape(6, 2)}
    split = step._microbatches(batch, 3)["x"]
    np.testing.assert_array_equal(split[1], batch["x"][1::3])


def schedule(name, **given):
    return optimizer.make_schedule({"learning_rate": 2.0, "schedule": {"name": name, "steps": 100, **given}})


def test_schedules_by_hand():
    warm = schedule("constant", warmup_steps=4)
    np.testing.assert_allclose([warm(i) for i in (0, 1, 3, 4, 99)], [0.5, 1, 2, 2, 2])
    cosine = schedule("cosine", warmup_steps=20, final_fraction=0.1)
    np.testing.assert_allclose([cosine(i) for i in (9, 20, 60, 100, 500)], [1, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    middles = {"linear": 0.505, "cosine": 0.505, "sqrt": 0.01 + 0.99 * (1 - 0.5**0.5), "exponential": 0.1}
    for decay, middle in middles.items():
        wsd = schedule("wsd", warmup_steps=10, decay_fraction=0.4, decay=decay, final_fraction=0.01)
        np.testing.assert_allclose([wsd(i) for i in (10, 60, 80, 100)], [2, 2, 2 * middle, 0.02], rtol=1e-5)


def test_decay_mask():
    """Of all parameters of Samba, exactly those without the tag are decayed."""
    specs = model("samba-tiny").param_specs()
    decayed = {path for path, value in flatten(optimizer.decay_mask(specs, ("no_decay",))).items() if value}
    assert decayed == {
        "embedding",
        *(f"layers/0_mamba/mixer/{name}" for name in ("in_proj", "conv", "x_proj", "dt_proj", "out_proj")),
        *(f"layers/{index}_mlp/mixer/{name}" for index in (1, 3) for name in ("gate", "up", "down")),
        *(f"layers/2_attention/mixer/{name}" for name in "qkvo"),
    }
    without = flatten(optimizer.decay_mask(specs, ("no_decay", "embedding")))
    assert not without["embedding"]


def test_adamw_by_hand():
    """One step of AdamW after clipping, in float64."""
    specs = {
        "w": params_lib.Spec((3, 4), ("a", "b")),
        "scale": params_lib.Spec((4,), ("b",), tags=frozenset({"no_decay"})),
    }
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.5, "clip_norm": 0.1}
    config = {"name": "adamw", "learning_rate": 0.1, "schedule": {"name": "constant", "steps": 1}, **options}
    transformation, _ = optimizer.make(config, specs)
    rng = np.random.default_rng(0)
    params, grads = ({name: rng.normal(size=s.shape).astype(np.float32) for name, s in specs.items()} for _ in range(2))
    updates, _ = jax.jit(lambda g, p: transformation.update(g, transformation.init(p), p))(grads, params)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    for path, update in flatten(updates).items():
        g = np.asarray(flatten(grads)[path], np.float64) * 0.1 / norm
        decay = 0.0 if "no_decay" in flatten(specs)[path].tags else 0.5
        # The bias corrections cancel the factors 1 - b of the first step.
        expected = -0.1 * (g / (np.abs(g) + 1e-3) + decay * np.asarray(flatten(params)[path], np.float64))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-7, err_msg=path)


def test_unknown_names_and_options_suggest_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'cosine'"):
        schedule("cosin")
    with pytest.raises(ValueError, match="did you mean 'warmup_steps'"):
        schedule("cosine", warmup=3)
    with pytest.raises(ValueError, match="final_fraction > 0"):
        schedule("wsd", decay="exponential")
    config = {"learning_rate": 1.0, "schedule": {"name": "constant", "steps": 1}}
    with pytest.raises(KeyError, match="did you mean 'adamw'"):
        optimizer.make({"name": "admw", **config}, {})
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        optimizer.make({"name": "adamw", "wight_decay": 0.1, **config}, {})


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, peak):
    assert flops.peak_flops(kind) == peak


def test_utilisation():
    assert flops.utilisation(1e9, 137.5e3, "TPU v4", 1) == pytest.approx(0.5)
    assert flops.utilisation(1e9, 1.0, "cpu", 1) is None
    zoo_model = create("llama-135m")
    # Without attention, 6 FLOPs per parameter and token.
    assert flops.train_flops_per_token(zoo_model, 1) == pytest.approx(6 * 134.5e6, rel=0.01)
