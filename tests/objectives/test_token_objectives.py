"""What holds for every objective of tokens: padding has no influence, sums add up, extremes are finite, and gradients
are those of finite differences in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from objectives import OBJECTIVES
from tests.trees import fast_jit

BATCH, TOKENS, CLASSES, WIDTH = 4, 6, 7, 5
LAYERS, HEADS = 2, 3
F32 = 5e-6


def draw(seed=0, scale=2.0):
    """Arrays by argument name, and the mask that says what counts."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, TOKENS)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    mask[:, 1] = 1.0
    return rng, shape, mask, lambda *extra: (scale * rng.normal(size=(*shape, *extra))).astype(np.float32)


def language(seed, scale, *names, **more):
    rng, shape, mask, normal = draw(seed, scale)
    found = {"logits": normal(CLASSES), "targets": rng.integers(0, CLASSES, shape)}
    return found | {name: make(rng, shape, mask, normal) for name, make in more.items()} | dict.fromkeys(
        names, mask
    ), mask


def layers(seed, scale):
    rng, shape, mask, _ = draw(seed, scale)
    one, two = scale * rng.normal(size=(2, LAYERS, *shape, WIDTH)).astype(np.float32)
    return {"features": one, "original_features": two, "mask": mask}, mask


def melle(seed, scale):
    rng, shape, mask, normal = draw(seed, scale)
    names = ("frames", "refined", "mean", "log_variance", "targets")
    found = {name: normal(WIDTH) for name in names}
    found["log_variance"] = np.clip(found["log_variance"], -80, 80)  # e^v has to be a float32
    return found | {"stop_logits": normal(), "loss_mask": mask, "stop": rng.random(shape) < 0.3}, mask


def heads(seed, scale):
    rng, shape, mask, _ = draw(seed, scale)
    logits = (scale * rng.normal(size=(HEADS, *shape, CLASSES))).astype(np.float32)
    return {"logits": logits, "targets": rng.integers(0, CLASSES, shape), "loss_mask": mask}, None


def teacher(rng, shape, mask, normal):
    return normal(CLASSES)


# name -> (arguments and what counts, options, axis of the rows of arguments that have another than 0)
CASES = {
    "cross_entropy": (lambda s, c: language(s, c, "loss_mask"), {"z_loss": 1e-3, "label_smoothing": 0.1}),
    "masked_language_model": (lambda s, c: language(s, c, "selected"), {}),
    "instruction_modelling": (
        lambda s, c: language(s, c, "response_mask", prompt_mask=lambda rng, shape, mask, _: 0 * mask),
        {},
    ),
    "weighted_cross_entropy": (
        lambda s, c: language(s, c, "loss_mask", quality=lambda rng, shape, *_: rng.random(shape).astype(np.float32)),
        {},
    ),
    "selective_cross_entropy": (
        lambda s, c: language(s, c, "loss_mask", ref_nll=lambda rng, shape, mask, normal: np.abs(normal())),
        {"scope": "sequence", "ratio": 0.5},
    ),
    "multi_token_prediction": (heads, {}),
    "vector_regression": (
        lambda s, c: (
            lambda d: ({"predictions": d[3](WIDTH), "targets": d[3](WIDTH), "loss_mask": d[2], "weights": d[3]()}, d[2])
        )(draw(s, c)),
        {},
    ),
    "melle": (melle, {}),
    "logit_distillation": (lambda s, c: language(s, c, "loss_mask", teacher_logits=teacher), {"beta": 0.3}),
    "top_k_distillation": (
        lambda s, c: (
            lambda d, kept: (
                {
                    "logits": d[3](CLASSES),
                    "teacher_tokens": np.argsort(kept, axis=-1)[..., :3],
                    "teacher_logps": np.log(np.sort(kept, axis=-1)[..., :3]),
                    "loss_mask": d[2],
                },
                d[2],
            )
        )(draw(s, c), np.random.default_rng(s).dirichlet(np.ones(CLASSES), (BATCH, TOKENS)).astype(np.float32)),
        {},
    ),
    "function_matching": (
        lambda s, c: (lambda d: ({"logits": d[3](CLASSES), "teacher_logits": d[3](CLASSES), "valid": d[2]}, d[2]))(
            draw(s, c)
        ),
        {"temperature": 2.0},
    ),
    "feature_distillation": (
        lambda s, c: (lambda d: ({"features": d[3](WIDTH), "teacher_features": d[3](WIDTH), "loss_mask": d[2]}, d[2]))(
            draw(s, c)
        ),
        {"form": "cosine"},
    ),
    "gradient_ascent": (lambda s, c: language(s, c, "loss_mask"), {"max_nll": 4.0}),
    "retain_kl": (
        lambda s, c: (lambda d: ({"logits": d[3](CLASSES), "ref_logits": d[3](CLASSES), "mask": d[2]}, d[2]))(
            draw(s, c)
        ),
        {},
    ),
    "rerouting": (layers, {}),
    "rerouting_retain": (layers, {}),
}
NAMES = sorted(CASES)


def rows_first(name, argument):
    """The axis of the rows of a batch."""
    stacked = {"rerouting": "features", "rerouting_retain": "features", "multi_token_prediction": "logits"}
    return int(stacked.get(name, "none") in argument)


@functools.lru_cache
def compiled(name):
    def loss(floats, others):
        output = objectives.create(name, **CASES[name][1])(**floats, **others)
        return output.loss_sum, output

    return fast_jit(jax.value_and_grad(loss, has_aux=True))


def split(arguments):
    masks = ("selected", "valid")
    floats = {k: v for k, v in arguments.items() if v.dtype.kind == "f" and "mask" not in k and k not in masks}
    return floats, {k: v for k, v in arguments.items() if k not in floats}


def value_and_gradients(name, arguments):
    (_, output), gradients = compiled(name)(*split(arguments))
    return output, gradients


def test_every_objective_of_tokens_is_here():
    arguments = {"logits", "features", "predictions", "frames"}
    elsewhere = {"masked_diffusion"}  # tests/objectives/test_diffusion.py
    found = {n for n, entry in OBJECTIVES.items().items() if arguments & set(entry.inputs)}
    found = {n for n in found if OBJECTIVES.get(n).category not in ("preference", "reward", "rl")} - elsewhere
    assert found - {"learned_masked_diffusion"} == set(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_count_has_no_influence(name):
    """NaN in every array and wild labels where the mask is 0."""
    arguments, mask = CASES[name][0](1, 2.0)
    if mask is None:  # of several heads a position counts for one and not for another
        mask = np.ones((BATCH, TOKENS), np.float32)
        mask[1] = mask[3, 2:] = 0.0
        arguments["loss_mask"] = mask
    hidden = mask == 0
    poisoned = {}
    for argument, x in arguments.items():
        if x is arguments.get("loss_mask") or "mask" in argument or argument in ("selected", "valid", "stop"):
            poisoned[argument] = x
            continue
        place = hidden if x.ndim == 2 else hidden[..., None]
        poisoned[argument] = np.where(place, np.nan if x.dtype.kind == "f" else 10**6, x).astype(x.dtype)
    (clean, clean_gradients), (output, gradients) = (value_and_gradients(name, x) for x in (arguments, poisoned))
    for want, have in zip(jax.tree.leaves(clean), jax.tree.leaves(output), strict=True):
        assert float(want) == float(have)
    for argument, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, clean_gradients[argument], err_msg=argument)
        if argument in ("logits", "features", "predictions", "frames"):
            assert not np.asarray(gradient)[np.broadcast_to(hidden[..., None], gradient.shape)].any()
            assert np.asarray(gradient).any()


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_microbatches_are_those_of_the_whole(name):
    arguments, _ = CASES[name][0](2, 2.0)
    whole, gradients = value_and_gradients(name, arguments)
    parts = []
    for start in (0, 2):
        part = {k: np.take(v, [start, start + 1], axis=rows_first(name, k)) for k, v in arguments.items()}
        parts.append(value_and_gradients(name, part))
    for have, *split in zip(jax.tree.leaves(whole), *(jax.tree.leaves(output) for output, _ in parts), strict=True):
        np.testing.assert_allclose(have, sum(split), rtol=F32, atol=F32)
    for k, gradient in gradients.items():
        joined = np.concatenate([g[k] for _, g in parts], axis=rows_first(name, k))
        np.testing.assert_allclose(gradient, joined, rtol=F32, atol=F32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extremes_are_finite(name, scale):
    arguments, _ = CASES[name][0](3, scale)
    output, gradients = value_and_gradients(name, arguments)
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(output))
    for leaf in jax.tree.leaves((output, gradients)):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name):
    """Along a random direction, central differences of the float64 loss; arguments without a gradient stand still."""
    arguments, _ = CASES[name][0](4, 1.0)
    frozen = {"teacher_logits", "teacher_features", "ref_logits", "original_features", "ref_nll", "weights", "quality"}
    frozen |= {"teacher_logps"}
    if name == "vector_regression":
        frozen |= {"targets"}
    moved = "logits" if "logits" in arguments else "features" if "features" in arguments else None
    names = [moved] if moved else [k for k in arguments if arguments[k].dtype.kind == "f" and "mask" not in k]
    names = [k for k in names if k not in frozen]
    rng = np.random.default_rng(5)
    _, gradients = value_and_gradients(name, arguments)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(v, jnp.float64 if v.dtype.kind == "f" else None) for k, v in arguments.items()}
        directions = {k: rng.normal(size=arguments[k].shape) for k in names}
        step = 2e-3

        def loss(sign):
            moved = {k: wide[k] + sign * step * directions[k] for k in names}
            return float(compiled(name)(*split(wide | moved))[0][0])

        # fourth order: the losses are computed in float32 at most
        slope = (8 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12 * step)
    want = sum(float(np.sum(directions[k] * np.float64(gradients[k]))) for k in names)
    scale = sum(float(np.sum(np.abs(directions[k] * np.float64(gradients[k])))) for k in names)
    assert abs(slope - want) < 3e-3 * scale
