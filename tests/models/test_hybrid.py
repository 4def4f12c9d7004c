"""Hybrids by configuration: any pattern of mixers, and what is said of one that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import MLP, Attention, GatedLinearAttention
from zoo.mixers.contract import MIXERS
from zoo.mixers.gated_linear_attention import HeadGate
from zoo.models import LanguageModelConfig, Sublayer
from zoo.models.language_model import param_specs

SIZES = {"vocab_size": 64, "width": 32, "repeats": 2}
LINEAR = {"heads": 2, "key_width": 8, "value_width": 8}
ATTENTION = {"heads": 2, "kv_heads": 1, "head_width": 16}


def test_a_pattern_is_the_config_that_one_would_write():
    model = zoo.create(
        "hybrid",
        **SIZES,
        pattern="gated_linear_attention mlp attention:near attention:far mlp",
        mixers={
            "gated_linear_attention": {**LINEAR, "decay": {"type": "HeadGate", "normaliser": 4.0}},
            "mlp": {"hidden": 48, "out_init_std": 0.5},
            "attention:near": {**ATTENTION, "window": 8, "rotary": {"theta": 100.0}},
            "attention:far": {**ATTENTION, "rotary": None},
        },
        post_norm=True,
        norm="layer",
    )
    out = {"out_init_std": 0.02 / np.sqrt(10)}
    linear = GatedLinearAttention(**LINEAR, **out, decay=HeadGate(4.0))
    near = Attention(**ATTENTION, **out, window=8, rotary=Rotary(theta=100.0))
    far = Attention(**ATTENTION, **out, rotary=None)
    mlp = MLP(48, out_init_std=0.5)
    norm = Norm("layer")
    assert model.config == LanguageModelConfig(
        **SIZES, pattern=tuple(Sublayer(m, norm, norm) for m in (linear, mlp, near, far, mlp)), final_norm=norm
    )


def test_every_mixer_has_a_place():
    """All registered mixers in one model, by the names in the registry and the options of their examples."""
    examples = {name: mixer.examples[0] for name, mixer in MIXERS.items().items()}
    options = {name: {f: getattr(config, f) for f in config.__dataclass_fields__} for name, config in examples.items()}
    model = zoo.create("hybrid", vocab_size=64, width=16, repeats=1, pattern=tuple(options), mixers=options)
    assert [sublayer.mixer for sublayer in model.config.pattern] == list(examples.values())
    assert len(param_specs(model.config)["layers"]) == len(examples)


def test_documents_of_a_hybrid_do_not_meet():
    """Two rows whose first documents differ: the second ones, which are equal, never see that."""
    model = zoo.create("hybrid-tiny")
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 21), 0, 512)
    tokens = tokens.at[:, 9:].set(tokens[0, 9:])
    ctx = zoo.SeqContext.from_segment_ids(jnp.array([[1] * 9 + [2] * 12] * 2))
    logits = jax.jit(model.apply)(params, tokens, ctx=ctx).logits
    np.testing.assert_array_equal(logits[0, 9:], logits[1, 9:])
    assert jnp.abs(logits[0, :9] - logits[1, :9]).max() > 1e-3


@pytest.mark.parametrize(
    ("pattern", "mixers", "message"),
    [
        ("", {}, "names no mixer"),
        ("mlp atention", {}, "names the mixer 'atention'; did you mean 'attention'"),
        (
            "mlp",
            {"mlp": {"hidden": 8}, "mpl": {}},
            "mixers names 'mpl', which the pattern does not; did you mean 'mlp'",
        ),
        ("mlp", {"mlp": {"hiden": 8}}, r"mixers\['mlp'\] has no option 'hiden'; did you mean 'hidden'"),
        ("attention", {"attention": {"heads": 2}}, r"mixers\['attention'\] needs kv_heads, head_width"),
        ("attention", {"attention": {**ATTENTION, "kv_heads": 3}}, "kv_heads=3 must divide heads=2"),
        ("mlp", {"mlp": {"hidden": {"a": 1}}}, r"mixers\['mlp'\]\['hidden'\] takes no mapping"),
        (
            "gated_linear_attention",
            {"gated_linear_attention": {**LINEAR, "decay": {"rank": 4}}},
            r"\['decay'\]\['type'\]=None is not supported; allowed: ChannelGate, FixedDecay, HeadGate",
        ),
    ],
)
def test_errors_name_the_field(pattern, mixers, message):
    with pytest.raises(ValueError, match=message):
        zoo.create("hybrid", **SIZES, pattern=pattern, mixers=mixers)
