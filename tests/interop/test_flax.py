"""The Linen and NNX doors: same numbers as the functional model, partitioning metadata, a training step."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import spmd
from jax.sharding import PartitionSpec as P

import zoo
from tests.trees import FLOAT32_TOLERANCE, assert_close, assert_trees_close, assert_trees_equal, redraw
from zoo.adapters import lora
from zoo.core.context import SeqContext
from zoo.core.params import flatten
from zoo.interop import linen as linen_door
from zoo.interop import nnx as nnx_door

MODEL = zoo.create("samba-tiny", layers=2, width=16, heads=2, kv_heads=1, hidden=24, vocab_size=32, window=4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
CTX = SeqContext.from_lengths([9, 6], 9)
RULES = (("layers", None), ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"))


def loss_of(logits):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]))


def functional_step(params, optimiser):
    """Loss and new parameters of one step without Flax."""
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: loss_of(MODEL.apply(p, TOKENS).logits)))(params)
    updates, _ = optimiser.update(gradient, optimiser.init(params))
    return loss, optax.apply_updates(params, updates)


@pytest.fixture(scope="module")
def params():
    return redraw(MODEL.param_specs(), 1)


@pytest.fixture(scope="module")
def expected(params):
    state = MODEL.init_state(2, 12)
    first = jax.jit(lambda p: MODEL.apply(p, TOKENS, ctx=CTX, state=state))(params)
    return state, first, jax.jit(lambda p, s: MODEL.apply(p, TOKENS[:, :1], state=s))(params, first.state)


@pytest.fixture(scope="module")
def stepped(params):
    return functional_step(params, optax.sgd(0.1))


def test_linen_init_and_metadata():
    module = linen_door.as_module(MODEL)
    variables = jax.jit(module.init)(jax.random.key(0), TOKENS)
    assert set(variables) == {"params"}
    plain = nn.unbox(variables)["params"]
    specs = flatten(MODEL.param_specs())
    assert {path: leaf.shape for path, leaf in flatten(plain).items()} == {p: s.shape for p, s in specs.items()}
    assert 0.015 < float(jnp.std(plain["embedding"])) < 0.025
    for path, spec in specs.items():
        box = variables["params"]
        for name in path.split("/"):
            box = box[name]
        assert isinstance(box, nn.LogicallyPartitioned)
        assert nn.get_partition_spec(box) == P(*spec.axes)
    mesh_axes = nn.logical_to_mesh(nn.get_partition_spec(variables), RULES)
    mixer = mesh_axes["params"]["layers"]["1_mlp"]["mixer"]
    assert mixer["up"] == P(None, "fsdp", "tensor")


def test_linen_apply_is_bitwise_the_functional_model(params, expected):
    module, (state, first, second) = linen_door.as_module(MODEL), expected
    boxed = jax.tree.map(
        lambda spec, value: nn.LogicallyPartitioned(value, names=spec.axes),
        MODEL.param_specs(),
        params,
        is_leaf=lambda leaf: isinstance(leaf, zoo.Spec),
    )
    for variables in ({"params": params}, {"params": boxed}):
        out = jax.jit(lambda v: module.apply(v, TOKENS, CTX, state))(variables)
        assert_trees_equal(out, first)
        out = jax.jit(lambda v, s: module.apply(v, TOKENS[:, :1], state=s))(variables, out.state)
        assert_trees_equal(out, second)
    assert module.apply({"params": params}, TOKENS, logits="none").logits is None
    with pytest.raises(ValueError, match="lacks embedding of model 'samba-tiny'"):
        module.apply({"params": {k: v for k, v in params.items() if k != "embedding"}}, TOKENS)


def test_linen_takes_adapted_parameters(params):
    adapted = lora.attach(params, MODEL.param_specs(), "layers/*/q", rank=2, alpha=1.0, key=jax.random.key(0))
    out = linen_door.as_module(MODEL).apply({"params": adapted}, TOKENS)
    assert_close(out.logits, MODEL.apply(params, TOKENS).logits, FLOAT32_TOLERANCE, "logits")


def test_linen_training_step(params, stepped):
    module, optimiser = linen_door.as_module(MODEL), optax.sgd(0.1)

    @jax.jit
    def step(variables, opt_state):
        loss, gradient = jax.value_and_grad(lambda v: loss_of(module.apply(v, TOKENS).logits))(variables)
        updates, opt_state = optimiser.update(gradient, opt_state)
        return loss, optax.apply_updates(variables, updates), opt_state

    variables = {"params": params}
    loss, variables, _ = step(variables, optimiser.init(variables))
    assert_close(loss, stepped[0], FLOAT32_TOLERANCE, "loss")
    assert_trees_close(variables["params"], stepped[1], FLOAT32_TOLERANCE, "parameters")


def test_nnx_init_and_metadata():
    module = nnx_door.as_module(MODEL, jax.random.key(0))
    fresh = module.tree()
    assert_trees_equal(fresh, MODEL.init(jax.random.key(0)))
    keys = []
    spy = types.SimpleNamespace(param_specs=MODEL.param_specs, init=lambda key: keys.append(key) or fresh)
    nnx_door.as_module(spy, nnx.Rngs(params=3))
    assert keys == [nnx.Rngs(params=3).params()]
    state = nnx.state(module, nnx.Param)
    names = {"/".join(str(k) for k in path): leaf for path, leaf in nnx.to_flat_state(nnx.get_partition_spec(state))}
    specs = flatten(MODEL.param_specs())
    assert {path.removeprefix("params/") for path in names} == set(specs)
    for path, spec in specs.items():
        assert names[f"params/{path}"].get_value() == P(*spec.axes), path
    with spmd.logical_axis_rules(RULES):
        resolved = nnx.get_partition_spec(state)["params"]["layers"]["1_mlp"]["mixer"]["up"].get_value()
    assert resolved == P(None, "fsdp", "tensor")


def test_nnx_call_is_bitwise_the_functional_model(params, expected):
    module, (state, first, second) = nnx_door.Module(MODEL, params), expected
    assert_trees_equal(module.tree(), params)
    out = nnx.jit(lambda m: m(TOKENS, CTX, state))(module)
    assert_trees_equal(out, first)
    assert_trees_equal(nnx.jit(lambda m, s: m(TOKENS[:, :1], state=s))(module, out.state), second)
    graph, leaves = nnx.split(module)
    assert_trees_equal(nnx.merge(graph, leaves).tree(), params)


def test_nnx_training_step(params, stepped):
    module = nnx_door.Module(MODEL, jax.tree.map(jnp.array, params))
    optimiser = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimiser):
        loss, gradient = nnx.value_and_grad(lambda m: loss_of(m(TOKENS).logits))(module)
        optimiser.update(module, gradient)
        return loss

    loss = step(module, optimiser)
    assert_close(loss, stepped[0], FLOAT32_TOLERANCE, "loss")
    assert_trees_close(module.tree(), stepped[1], FLOAT32_TOLERANCE, "parameters")
    assert module.params["layers"]["1_mlp"]["mixer"]["up"].get_metadata("out_sharding") == ("layers", "embed", "mlp")
