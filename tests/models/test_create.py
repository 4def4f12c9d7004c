"""create, describe, list_models: sizes and errors."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

import zoo
from zoo.core.params import count, nbytes
from zoo.models import PRESETS, LanguageModelConfig, Sublayer
from zoo.models.model import preset

PUBLISHED = [name for name in zoo.list_models() if PRESETS.get(name).parameters is not None]
ROUNDING = 0.0501  # millions: counts are published to one decimal


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    millions = count(zoo.create(name).param_specs()) / 1e6
    assert abs(millions - PRESETS.get(name).parameters) <= ROUNDING, f"{millions} against {PRESETS.get(name)}"


@pytest.mark.parametrize("size", [n.removeprefix("transformer-") for n in zoo.list_models() if "transformer-" in n])
def test_transformer_twins_have_sambas_size(size):
    twin, samba = zoo.create(f"transformer-{size}"), zoo.create(f"samba-{size}")
    a, b = count(twin.param_specs()), count(samba.param_specs())
    assert abs(a - b) <= 0.01 * b, f"{a} against {b}"
    for option in ("vocab_size", "width", "layers"):
        assert twin.options[option] == samba.options[option], option


def test_every_samba_has_a_twin():
    sizes = {n.removeprefix("samba-") for n in zoo.list_models() if n.startswith("samba-")}
    assert sizes == {n.removeprefix("transformer-") for n in zoo.list_models() if n.startswith("transformer-")}


def test_overrides_and_families():
    model = zoo.create("samba-tiny", window=7, dtype="bfloat16")
    assert model.config.pattern[2].mixer.window == 7
    assert model.config.dtype == "bfloat16"
    assert model.options["window"] == 7
    assert model.options["conv_width"] == 4, "defaults are resolved"
    family = zoo.create("mamba", vocab_size=7, width=8, layers=3)
    assert (family.name, family.family, family.config.repeats) == ("mamba", "mamba", 3)
    assert hash(model) != hash(zoo.create("samba-tiny"))


def test_errors_name_the_nearest():
    with pytest.raises(KeyError, match="unknown model 'smaba-tiny'; did you mean 'samba-tiny'"):
        zoo.create("smaba-tiny")
    with pytest.raises(ValueError, match="has no option 'widow'; did you mean 'window'"):
        zoo.create("samba-tiny", widow=3)
    with pytest.raises(ValueError, match="family 'mamba' needs vocab_size, width, layers"):
        zoo.create("mamba")
    with pytest.raises(ValueError, match="layers=3 must be even"):
        zoo.create("samba-tiny", layers=3)
    with pytest.raises(ValueError, match=r"kv_heads=3 must divide heads=4: one of \[1, 2, 4\]"):
        zoo.create("samba-tiny", kv_heads=3)
    with pytest.raises(ValueError, match="dtype='bf16' is not supported"):
        zoo.create("samba-tiny", dtype="bf16")
    with pytest.raises(ValueError, match="remat='ful' is not supported; did you mean"):
        zoo.create("samba-tiny", remat="ful")
    with pytest.raises(ValueError, match="heads=5 must divide width=64"):
        zoo.create("llama-tiny", heads=5)
    with pytest.raises(ValueError, match="no option 'wdith'; did you mean 'width'"):
        preset("never-registered", "samba", wdith=3)
    with pytest.raises(ValueError, match="already registered"):
        preset("samba-tiny", "samba", **PRESETS.get("samba-tiny").options)
    with pytest.raises(TypeError, match="str is no mixer config"):
        LanguageModelConfig(vocab_size=8, width=8, pattern=(Sublayer("mamba"),), repeats=1)
    with pytest.raises(ValueError, match="at least one Sublayer"):
        LanguageModelConfig(vocab_size=8, width=8, pattern=(), repeats=1)


def test_describe_adds_up():
    text = zoo.describe("samba-tiny", lengths=(64, 4096))
    model = zoo.create("samba-tiny")
    total = count(model.param_specs())
    assert f"{total:,}" in text
    assert f"{nbytes(model.state_specs(1, 64)):,}" in text
    groups = re.findall(r"^  (\S+) +([\d,]+)$", text.split("parameter group")[1], re.MULTILINE)
    assert sum(int(size.replace(",", "")) for _, size in groups) == total
    assert dict(groups)["embedding"] == f"{512 * 64:,}"
    grows, fixed = zoo.create("llama-tiny"), zoo.create("samba-tiny")
    assert nbytes(fixed.state_specs(1, 4096)) == nbytes(fixed.state_specs(1, 64)), "windows do not grow"
    assert nbytes(grows.state_specs(1, 4096)) > 60 * nbytes(grows.state_specs(1, 64))


def test_tags_and_dtypes():
    specs = zoo.create("qwen2-tiny", param_dtype="bfloat16").param_specs()
    assert specs["embedding"].tags == {"embedding"}
    assert specs["embedding"].dtype == jnp.bfloat16
    mixer = specs["layers"]["0_attention"]["mixer"]
    assert "no_decay" in mixer["q_bias"].tags
    assert "no_decay" in specs["final_norm"]["scale"].tags
    assert not mixer["q"].tags
    assert dataclasses.is_dataclass(mixer["q"])
