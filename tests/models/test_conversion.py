"""Attention as linear recurrences: what is carried over, what is new, and what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.trees import ORACLE_TOLERANCE, assert_close, assert_trees_equal, fast_jit, redraw
from zoo.adapters import lora
from zoo.core.context import SeqContext
from zoo.core.params import count, flatten, update
from zoo.mixers import Attention, Mamba2Attention, mixer_of
from zoo.models.conversion import carry_over

TINY = {"width": 16, "hidden": 24, "vocab_size": 32}
SILU_OF_ONE = 1.2784645427610738  # silu of it is 1


@functools.cache
def teacher(name="llama-tiny", **options):
    model = zoo.create(name, **{**TINY, **options})
    return model, redraw(model.param_specs(), 3)


def convert(model, params, **options):
    return zoo.convert(model, params, key=jax.random.key(1), **options)


def sites(model, params):
    """(mixer config, {path in the sublayer: leaf}) of every sublayer in order."""
    for path, index, sub in model.config.in_order():
        stage, name = path.split("/")
        yield sub.mixer, {at: np.asarray(leaf)[index] for at, leaf in flatten(params[stage][name]).items()}


def kept(model):
    mixers = [sub.mixer for _, _, sub in model.config.in_order()]
    return [i // 2 for i, mixer in enumerate(mixers) if type(mixer) is Attention]


def test_without_decay_and_norm_it_is_unnormalised_linear_attention():
    """With exp(dt A) = 1, dt = 1, D = 0 and a gate of 1: y_t = sum_{s <= t} (q_t . k_s) v_s through o, in float64."""
    model, params = teacher(qkv_bias=True)
    new, new_params = convert(model, params, to="mamba2_attention", keep=0, mixer={"conv_width": None, "norm": None})
    (name, sub), *_ = new.config.sublayers().items()
    layer = 2
    mixer = jax.tree.map(lambda leaf: leaf[layer], new_params["layers"][name]["mixer"])
    gate = jnp.zeros_like(mixer["z"]).at[0].set(SILU_OF_ONE)
    mixer |= {
        "A_log": jnp.full(4, -60.0), "dt": 0 * mixer["dt"], "dt_bias": jnp.full(4, math.log(math.e - 1)),
        "D": jnp.zeros(4), "z": gate,
    }  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 11, 16)).astype(np.float32)
    x[..., 0] = 1.0  # the channel that the gate reads
    y, _ = fast_jit(functools.partial(mixer_of(sub.mixer).mix, config=sub.mixer))(
        mixer, x, SeqContext.contiguous(jnp.zeros(2, jnp.int32), 11)
    )
    old = {key: np.asarray(leaf[layer], np.float64) for key, leaf in params["layers"]["0_attention"]["mixer"].items()}
    q, k, v = (np.einsum("btd,dhk->bthk", np.float64(x), old[key]) + old[f"{key}_bias"] for key in "qkv")
    expected = np.zeros(y.shape)
    for b, t, h in np.ndindex(2, 11, 4):
        head = sum((q[b, t, h] @ k[b, s, h // 2]) * v[b, s, h // 2] for s in range(t + 1))
        expected[b, t] += head @ old["o"][h]
    assert_close(y, expected, ORACLE_TOLERANCE)


@pytest.mark.parametrize("to", ["mamba2_attention", pytest.param("hedgehog", marks=pytest.mark.slow)])
def test_what_both_have_is_bitwise_the_teachers(to):
    model, params = teacher()
    new, new_params = convert(model, params, to=to, keep=2)
    assert kept(new) == [1, 3]
    drawn = [leaves for _, leaves in sites(new, new.init(jax.random.key(1)))]
    for i, ((old, ours), (mixer, leaves)) in enumerate(zip(sites(model, params), sites(new, new_params), strict=True)):
        assert_trees_equal({path: leaves[path] for path in ours}, ours)
        if type(mixer) is type(old):
            assert mixer == old
            assert set(leaves) == set(ours)
        else:
            added = set(leaves) - set(ours)
            assert len(added) == {"mamba2_attention": 8, "hedgehog": 4}[to]
            assert_trees_equal({p: leaves[p] for p in sorted(added)}, {p: drawn[i][p] for p in sorted(added)})
    for path in ("embedding", "head"):
        np.testing.assert_array_equal(new_params[path], params[path])
    logits = fast_jit(lambda p, t: new.apply(p, t).logits)(new_params, jnp.arange(14).reshape(2, 7))
    assert np.isfinite(logits).all()
    again = zoo.create(new.family, **new.options)
    assert again.config == new.config


def test_a_conversion_goes_on_from_another():
    """Step by step equals at once, but for the leaves that the first step drew and training may have changed."""
    model, params = teacher()
    half, half_params = convert(model, params, to="mamba2_attention", keep=2)
    trained = update(half_params, "layers/0_mamba2_attention/mixer/D", jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
    quarter, quarter_params = convert(half, trained, to="mamba2_attention", keep=4)
    assert kept(quarter) == [3]
    skips = [leaves["mixer/D"] for mixer, leaves in sites(quarter, quarter_params) if type(mixer) is Mamba2Attention]
    np.testing.assert_array_equal(skips, [[1, 2, 3, 4], [1, 1, 1, 1], [5, 6, 7, 8]])
    queries = [leaves["mixer/q"] for _, leaves in sites(quarter, quarter_params) if "mixer/q" in leaves]
    np.testing.assert_array_equal(queries, params["layers"]["0_attention"]["mixer"]["q"])
    with pytest.raises(ValueError, match=r"sublayer 2 \(mamba2_attention\) cannot become attention"):
        convert(quarter, quarter_params, to="mamba2_attention", keep=2)
    with pytest.raises(ValueError, match="to='hedgehog' must be that of the earlier conversion"):
        convert(half, half_params, to="hedgehog", keep=4)


@pytest.mark.parametrize(
    ("layers", "keep", "stay", "written"),
    [
        (32, 2, range(1, 32, 2), (0, 4, 16, 0)),
        (32, 4, range(3, 32, 4), (0, 8, 8, 0)),
        (32, 8, (7, 15, 23, 31), (0, 16, 4, 0)),
        (28, 8, (7, 15, 23), None),
        (6, (0, 1, 5), (0, 1, 5), None),
        (6, 0, (), (0, 2, 6, 0)),
    ],
)
def test_which_layers_stay(layers, keep, stay, written):
    """The layers of the paper's 50, 25 and 12.5 %, in a pattern as short as they allow."""
    config = zoo.create("converted", base="llama-7b", base_options={"layers": layers}, to="hedgehog", keep=keep).config
    assert [i // 2 for i, (_, _, sub) in enumerate(config.in_order()) if type(sub.mixer) is Attention] == list(stay)
    assert len(config.in_order()) == 2 * layers
    if written is not None:
        assert (len(config.first), len(config.pattern), config.repeats, len(config.last)) == written


def test_parameter_counts():
    """Llama 2 7B, half of its attention converted: z and dt, convolution with biases, dt_bias, A_log and D, norm."""
    new = zoo.create("converted", base="llama-7b", to="mamba2_attention", keep=2)
    added = 4096 * (4096 + 32) + 5 * 3 * 4096 + 3 * 32 + 4096
    base = zoo.create("llama-7b")
    assert count(new.param_specs()) == count(base.param_specs()) + 16 * added
    hedgehog = zoo.create("converted", base="mistral-7b", to="hedgehog", keep=0)
    assert (
        count(hedgehog.param_specs()) == count(zoo.create("mistral-7b").param_specs()) + 32 * 2 * 32 * (128 + 1) * 128
    )


def test_adapters_are_carried():
    model, params = teacher()
    adapted = lora.attach(params, model.param_specs(), "layers/*/[qv]", rank=2, alpha=4.0, key=jax.random.key(0))
    new, new_params = convert(model, adapted, to="hedgehog", keep=2)
    weight = new_params["layers"]["0_hedgehog"]["mixer"]["q"]
    np.testing.assert_array_equal(weight.a, adapted["layers"]["0_attention"]["mixer"]["q"].a[::2])
    merged = carry_over(model.config, lora.merge(adapted), new.config, jax.random.key(1))
    assert_trees_equal(lora.merge(new_params), merged)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ({}, {"to": "mamba"}, "convert: to='mamba' is not supported; did you mean"),
        ({}, {"keep": 5}, r"keep=5 must be 0 for none, or n = 2\.\.4"),
        ({}, {"keep": (0, 4)}, r"keep=\[0, 4\] must name some, not all, of the attention layers 0\.\.3"),
        ({}, {"mixer": {"heads": 8}}, r"mixer\['heads'\]=8 must be the attention's 4"),
        ({}, {"mixer": {"head_width": 8}}, r"mixer\['head_width'\]=8 must be the attention's 4"),
        ({}, {"mixer": {"conv_widht": 3}}, "did you mean 'conv_width'"),
        ({}, {"mixer": {"conv_width": 1}}, "conv_width must be >= 2 or None, got 1"),
        ({"qk_norm": "head"}, {}, "cannot express Attention.qk_norm=.*, only None"),
        ({"attention_soft_cap": 3.0}, {}, "cannot express Attention.soft_cap=3.0, only None"),
        ({"name": "mamba-tiny"}, {}, "mamba-tiny has no attention layer"),
        ({"name": "hgrn-tiny"}, {}, "hgrn-tiny has mixers that depend on their layer"),
    ],
    ids=str,
)
def test_refusals_name_field_and_value(base, options, message):
    base = dict(base)
    name = base.pop("name", "llama-tiny")
    sizes = TINY if name == "llama-tiny" else {}
    with pytest.raises(ValueError, match=message):
        zoo.create("converted", base=name, base_options={**sizes, **base}, **{"to": "mamba2_attention", **options})


def test_parameters_of_another_model_are_refused():
    model, params = teacher()
    for change, message in (
        ({"width": 32}, r"the model has width=16 and is to have 32; set it to 16"),
        ({"rope_theta": 1e6}, r"sublayer 2 \(attention\) has rotary=Rotary\(theta=10000"),
        ({"layers": 2}, "the models have 8 and 4 sublayers"),
    ):
        other = zoo.create("converted", base="llama-tiny", base_options={**TINY, **change}, to="mamba2_attention")
        with pytest.raises(ValueError, match=message):
            carry_over(model.config, params, other.config, jax.random.key(0))
    other = zoo.create("converted", base="llama-tiny", base_options={**TINY, "kv_heads": 4}, to="hedgehog", keep=0)
    with pytest.raises(ValueError, match="has kv_heads=2 and is to have 4"):
        carry_over(model.config, params, other.config, jax.random.key(0))
    damaged = update(params, "layers/0_attention/mixer/q", jnp.zeros((4, 16, 4, 5)))
    with pytest.raises(ValueError, match=r"parameters do not fit the model: .*mixer/q"):
        convert(model, damaged, to="hedgehog", keep=0)


def test_in_another_dtype():
    model, params = teacher()
    other = zoo.create("converted", base="llama-tiny", base_options={**TINY, "param_dtype": "bfloat16"}, to="hedgehog")
    carried = carry_over(model.config, params, other.config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(carried)} == {jnp.dtype(jnp.bfloat16)}
    assert dataclasses.replace(other.config, param_dtype="float32") == convert(model, params, to="hedgehog")[0].config
