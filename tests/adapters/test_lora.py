"""LoRA against explicit dense matrices W + s A B."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.trees import (
    FLOAT32_TOLERANCE,
    GRADIENT_TOLERANCE,
    ROUNDING_TOLERANCE,
    assert_close,
    assert_trees_equal,
    fast_jit,
    redraw,
)
from zoo.adapters import lora
from zoo.core import sharding
from zoo.core.compat import make_mesh
from zoo.core.linear import Weight, linear
from zoo.core.params import Spec, abstract, check_tree, combine, count, flatten, initialise, partition

TINY = [name for name in zoo.list_models() if name.endswith("-tiny")]
IN_EVERY_RUN = ("llama-tiny", "mamba-tiny", "samba-tiny")  # the others behind -m slow
EVERY_MATRIX = "layers/*"
MERGE_TOLERANCE = 1e-4  # logits after four layers in which x(W + sAB) replaces xW + s(xA)B


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def attach(params, specs, pattern, **options):
    """lora.attach, compiled quickly: an outer jit decides for the inner one."""
    return fast_jit(lambda p: lora.attach(p, specs, pattern, **options))(params)


def randomised(params, seed=5):
    """Adapters whose B is not zero."""
    mask = lora.trainable_mask(params)
    leaves, structure = jax.tree.flatten(params)
    chosen = jax.tree.leaves(mask)
    new = [0.3 * draw(x.shape, seed + i) if m else x for i, (x, m) in enumerate(zip(leaves, chosen, strict=True))]
    return jax.tree.unflatten(structure, new)


@pytest.mark.parametrize(
    ("eqn", "x_shape", "a_shape", "b_shape"),
    [
        ("btd,df->btf", (2, 3, 8), (8, 2), (2, 6)),
        ("btd,dhk->bthk", (2, 3, 8), (8, 2), (2, 4, 5)),
        ("bthv,hvd->btd", (2, 3, 4, 5), (4, 5, 2), (2, 8)),
    ],
)
def test_contract_equals_the_dense_weight(eqn, x_shape, a_shape, b_shape):
    x, a, b = draw(x_shape, 0), draw(a_shape, 1), draw(b_shape, 2)
    base = draw((*a_shape[:-1], *b_shape[1:]), 3)
    weight = lora.LowRank(base, a, b, 0.7)
    assert isinstance(weight, Weight)
    fan_in = int(np.prod(a_shape[:-1]))
    flat = np.float64(base).reshape(fan_in, -1) + 0.7 * np.float64(a).reshape(fan_in, 2) @ np.float64(b).reshape(2, -1)
    dense = flat.reshape(base.shape)
    expected = np.einsum(eqn, np.float64(x), dense)
    assert_close(linear(x, weight, eqn), expected, FLOAT32_TOLERANCE, "y")
    assert_close(weight.materialise(), dense, FLOAT32_TOLERANCE, "dense")
    over = lora.LowRank(weight, 2 * a, b, 0.5)  # an adapter over an adapter
    twice = (flat + np.float64(a).reshape(fan_in, 2) @ np.float64(b).reshape(2, -1)).reshape(base.shape)
    assert_close(linear(x, over, eqn), np.einsum(eqn, np.float64(x), twice), FLOAT32_TOLERANCE, "two adapters")
    assert linear(x.astype(jnp.bfloat16), over, eqn).dtype == jnp.bfloat16


def test_init_is_kaiming_uniform_and_keyed_by_path():
    specs = {
        "m": Spec((4, 4, 30), ("heads", "value", "embed"), inputs=2),
        "n": Spec((64, 3), ("embed", "mlp"), inputs=1),
    }
    params = redraw(specs, 1)
    both = attach(params, specs, ["m", "n"], rank=8, alpha=4.0, key=jax.random.key(0))
    alone = attach(params, specs, "n", rank=8, alpha=4.0, key=jax.random.key(0))
    np.testing.assert_array_equal(both["n"].a, alone["n"].a)
    for name, bound in (("m", 1 / 4), ("n", 1 / 8)):
        assert not np.asarray(both[name].b).any()
        assert both[name].scale == 0.5
        largest = np.abs(both[name].a).max()
        assert 0.9 * bound < largest <= bound
        assert abs(np.std(both[name].a) - bound / np.sqrt(3)) < 0.1 * bound


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow]) for name in TINY]
)
def test_every_preset_takes_adapters(name):
    """Attached: bitwise unchanged. Trained: equal to its merge, scanned and unrolled; detached: the base."""
    model = zoo.create(name)
    specs, tokens = model.param_specs(), jnp.arange(2 * 7).reshape(2, 7) * 31 % 512
    params = redraw(specs, 2)
    run = fast_jit(lambda p: model.apply(p, tokens).logits)
    adapted = attach(params, specs, EVERY_MATRIX, rank=3, alpha=6.0, key=jax.random.key(1))
    matrices = [path for path, spec in flatten(specs).items() if spec.inputs and path.startswith("layers")]
    assert len(jax.tree.leaves(adapted)) == len(jax.tree.leaves(params)) + 2 * len(matrices)
    quantised = name == "matmulfree-tiny"  # adapters move latent weights before they are quantised: a tie may tip over
    same, merge = (ROUNDING_TOLERANCE,) * 2 if quantised else (FLOAT32_TOLERANCE, MERGE_TOLERANCE)
    assert_close(run(adapted), run(params), same, "B = 0")
    trained = randomised(adapted)
    merged = lora.merge(trained)
    check_tree(merged, specs)
    y = run(trained)
    assert np.abs(y - run(params)).max() > 1e-3, "the adapters have no effect"
    assert_close(run(merged), y, merge, "merged")
    if name in ("samba-tiny", "llama-tiny"):
        assert_close(run(zoo.unroll(trained, model.config)), y, FLOAT32_TOLERANCE, "unrolled")
    assert_trees_equal(lora.detach(trained), params, "detached")


def test_gradients_and_optimiser_state_of_the_adapters_alone():
    """d a and d b of a model are the chain rule of the dense weight's gradient: dA = s dW B^T, dB = s A^T dW."""
    model = zoo.create("samba-tiny", layers=2)
    specs, tokens = model.param_specs(), jnp.arange(2 * 5).reshape(2, 5) * 31 % 512
    base = redraw(specs, 3)
    params = randomised(attach(base, specs, "layers/*/o", rank=3, alpha=1.5, key=jax.random.key(1)))
    loss = lambda p: jnp.mean(jnp.sin(model.apply(p, tokens).logits))  # noqa: E731
    train, frozen = partition(params, lora.trainable_mask(params))
    paths = list(flatten(train))
    assert paths == ["layers/2_attention/mixer/o/a", "layers/2_attention/mixer/o/b"]
    gradients = fast_jit(jax.grad(lambda t: loss(combine(t, frozen))))(train)
    dense = fast_jit(jax.grad(loss))(lora.merge(params))["layers"]["2_attention"]["mixer"]["o"]
    o = params["layers"]["2_attention"]["mixer"]["o"]
    of_a = 0.5 * np.einsum("lhvd,lrd->lhvr", np.float64(dense), np.float64(o.b))
    of_b = 0.5 * np.einsum("lhvr,lhvd->lrd", np.float64(o.a), np.float64(dense))
    assert_close(gradients["layers"]["2_attention"]["mixer"]["o"].a, of_a, GRADIENT_TOLERANCE, "d a")
    assert_close(gradients["layers"]["2_attention"]["mixer"]["o"].b, of_b, GRADIENT_TOLERANCE, "d b")

    optimiser = optax.adam(1e-2)
    state = optimiser.init(train)
    assert count(state[0].mu) == count(train)
    updates, _ = optimiser.update(gradients, state)
    new = combine(optax.apply_updates(train, updates), frozen)
    assert_trees_equal(lora.detach(new), base, "the base must not move")
    assert loss(new) < loss(params)


def test_specs_count_shard_and_initialise():
    model = zoo.create("llama-tiny")
    specs = model.param_specs()
    adapted = lora.param_specs(specs, ["layers/*/q", "layers/*/down"], rank=4, alpha=8.0)
    per_layer = 4 * (64 + 4 * 16) + 4 * (192 + 64)
    assert count(adapted) == count(specs) + 4 * per_layer
    params = attach(redraw(specs, 6), specs, ["layers/*/q", "layers/*/down"], rank=4, alpha=8.0,
                         key=jax.random.key(1))  # fmt: skip
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == abstract(adapted)
    q = adapted["layers"]["0_attention"]["mixer"]["q"]
    assert (q.a.axes, q.b.axes) == (("layers", "embed", "rank"), ("layers", "rank", "heads", "key"))
    mesh = make_mesh({"data": 1})
    sharded = initialise(adapted, jax.random.key(0), sharding.shardings(adapted, mesh, sharding.resolve_rules("dp")))
    assert jax.tree.structure(sharded) == jax.tree.structure(params)


def test_save_and_restore_as_a_plain_dict():
    model = zoo.create("llama-tiny", layers=2)
    specs, base = model.param_specs(), redraw(model.param_specs(), 4)
    once = randomised(attach(base, specs, "layers/*/[qv]", rank=2, alpha=1.0, key=jax.random.key(0)))
    twice = randomised(attach(once, specs, "layers/*/q", rank=3, alpha=1.0, key=jax.random.key(1)), 9)
    for params in (once, twice):
        packed = lora.to_dict(params)
        assert list(packed) == ["layers"]
        assert set(packed["layers"]["0_attention"]["mixer"]) == {"q", "v"}
        assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(packed))
        restored = lora.from_dict(base, jax.tree.map(np.asarray, packed))
        assert jax.tree.structure(restored) == jax.tree.structure(params)
        assert_trees_equal(restored, params)
    assert lora.to_dict(base) == {}
    packed = lora.to_dict(once)
    packed["layers"]["0_attention"]["mixer"]["k"] = packed["layers"]["0_attention"]["mixer"].pop("q")
    with pytest.raises(ValueError, match=r"layers/0_attention/mixer/k.*do not fit"):
        lora.from_dict(base, packed)
    packed["layers"]["0_attentoin"] = packed["layers"].pop("0_attention")
    with pytest.raises(ValueError, match="did you mean '0_attention'"):
        lora.from_dict(base, packed)


def test_errors_name_the_nearest_path():
    specs = zoo.create("llama-tiny").param_specs()
    params = abstract(specs)
    for pattern in ("layers/0_attention/mixer/qq", ["layers/*/q", "layers/0_attention/mixer/qq"]):
        with pytest.raises(ValueError, match="did you mean 'layers/0_attention/mixer/q'"):
            lora.attach(params, specs, pattern, rank=2, alpha=1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="matches no matrix"):  # tied tables and norms are no matrices
        lora.attach(params, specs, "embedding", rank=2, alpha=1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        lora.attach(params, specs, "layers/*", rank=0, alpha=1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="pattern is empty"):
        lora.attach(params, specs, [], rank=1, alpha=1.0, key=jax.random.key(0))
