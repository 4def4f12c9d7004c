"""Teachers, frozen leaves and adapters in the training step, and through the configs of runs."""

import functools

import jax
import numpy as np
import optax
import pytest

import objectives
import zoo
from launch import config as config_lib
from launch import data as data_lib
from launch import distillation, start, step
from launch.config import ConfigError
from launch.configs import mamba_in_llama
from launch.run import build
from tests.launch.test_step import draw_batch
from tests.mixers.based_oracles import hedgehog_features
from tests.mixers.numpy_oracles import normalise, turn
from tests.objectives.test_attention_distillation import loops
from tests.trees import FLOAT32_TOLERANCE, assert_close, assert_trees_equal, redraw, to_float64
from zoo.core.params import flatten, partition, update

MAPS = ("*/[qk]_map/*",)
SIZES = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 24, "vocab_size": 64}


@functools.cache
def attention_models(keep):
    """(teacher, its parameters, student, its parameters with maps that are not the identity)."""
    teacher = zoo.create("llama-tiny", **SIZES, attention_scale=0.7)
    params = redraw(teacher.param_specs(), 5)
    student, converted = zoo.convert(teacher, params, to="hedgehog", keep=keep, key=jax.random.key(0))
    mask = start.trainable(student.param_specs(), {"trainable": MAPS, "frozen": ()})
    rng = np.random.default_rng(6)
    maps = {f"{which}_map": {"weight": np.eye(4) + 0.4 * rng.standard_normal((2, 4, 4, 4)),
                             "bias": 0.4 * rng.standard_normal((2, 4, 4))} for which in "qk"}  # fmt: skip
    layers = [layer for layer in range(2) if keep == 0 or layer not in keep]
    for path, _, _ in student.config.in_order():
        if "hedgehog" in path:
            stacked = path.startswith("layers/")
            own = jax.tree.map(lambda leaf, at=layers if stacked else layers[0]: np.float32(leaf[at]), maps)
            for name, value in own.items():
                converted = update(converted, f"{path}/mixer/{name}", value)
    return teacher, params, student, converted, mask


@functools.cache
def attention_loss(keep):
    """(value, gradient) of the attention loss as a compiled function of a batch."""
    teacher, params, student, chosen, _ = attention_models(keep)
    objective = objectives.create("attention_distillation")
    loss = distillation.attention_loss(student, teacher, objective, 12)
    both = jax.jit(functools.partial(step.summed_gradients, lambda p, b, k: loss(p, b, k, params)))
    return both(chosen, draw_batch(4), jax.random.key(0))


def test_attention_loss_of_the_first_layer_is_its_definition():
    _, params, student, chosen, _ = attention_models((1,))
    batch = draw_batch(4)
    old, exact = to_float64(params), to_float64(chosen)
    layer = jax.tree.map(lambda leaf: leaf[0], old["layers"])["0_attention"]
    (name,) = [path for path, _, sub in student.config.in_order() if "hedgehog" in path]
    stage, name = name.split("/")
    new = exact[stage][name]["mixer"]
    new = jax.tree.map(lambda leaf: leaf[0], new) if stage == "layers" else new
    config = dict(student.config.stages()[stage])[name].mixer
    total = rows = 0.0
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in sorted(set(segments) - {0}):
            x = old["embedding"][tokens[segments == segment]]
            x = np.stack([normalise(student.config.final_norm, layer["norm"], row) for row in x])
            q, k = (np.einsum("td,dhk->thk", x, layer["mixer"][part]) for part in "qk")
            q, k = ([[turn(config.rotary, head, i) for head in row] for i, row in enumerate(a)] for a in (q, k))
            k = np.asarray(k)[:, [0, 0, 1, 1]]
            phi = [
                np.asarray(
                    [
                        [hedgehog_features(config.feature_map, new[which], h, a[i][h]) for h in range(4)]
                        for i in range(len(x))
                    ]
                )
                for which, a in (("q_map", q), ("k_map", k))
            ]
            documents = np.zeros((1, len(x)), int)
            value, _, count = loops(
                np.asarray(q)[None], k[None], phi[0][None], phi[1][None], documents, True, 0.7, 1e-12
            )
            total, rows = total + value, rows + count
    output, _ = attention_loss((1,))
    assert_close(output.loss_sum, total, FLOAT32_TOLERANCE)
    assert float(output.weight) == rows


def test_attention_loss_sums_layers_and_moves_the_maps_alone():
    """Layers learn apart from each other: activations are the teacher's."""
    whole, grads = attention_loss(0)
    parts = [attention_loss((kept,))[0] for kept in (0, 1)]
    assert_close(whole.loss_sum, sum(float(part.loss_sum) for part in parts), FLOAT32_TOLERANCE)
    mask = attention_models(0)[-1]
    of_maps, others = partition(grads, mask)
    assert len(jax.tree.leaves(of_maps)) == 4
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_maps))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_feature_maps_learn_while_all_else_stays():
    teacher, params, student, chosen, mask = attention_models(0)
    loss = distillation.attention_loss(student, teacher, objectives.create("attention_distillation"), 12)
    optimizer = optax.adam(3e-2)
    train_step = jax.jit(step.make_train_step(loss, optimizer, lambda _: 3e-2, trainable=mask))
    state = step.init_state(student.param_specs(), optimizer, seed=0, ema=False, trainable=mask, params=chosen)
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == 4
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, draw_batch(4), params)
        losses.append(float(metrics["kl"]))
    assert losses[-1] < 0.5 * losses[0]
    moved, kept = partition(jax.tree.map(lambda a, b: bool((a != b).any()), state.params, chosen), mask)
    assert all(jax.tree.leaves(moved))
    assert not any(jax.tree.leaves(kept))


def student_config(config, teacher):
    """The softmax attention of `finished` as Mamba-2, learned from the run itself, and an adapter of an MLP."""
    config.model = {"name": "converted", "to": "mamba2_attention", "keep": 0, "vocab_size": None}
    config.initial = {"name": "run", "workdir": str(teacher)}
    config.teacher = {"name": "initial"}
    config.objective = {"name": "logit_distillation", "ce_weight": 0.1}
    config.adapter = {"name": "lora", "pattern": ("layers/1_mlp/mixer/*",), "rank": 2, "alpha": 4.0}
    config.trainable = ("*_mamba2_attention/mixer/*", "*/[ab]")
    config.ema_decay = 0.0
    return config


@pytest.mark.slow
def test_a_converted_run_learns_from_the_one_it_starts_from(finished, config, tmp_path):
    teacher = build(config.copy_and_resolve_references(), finished).restore_params()[1]
    run = build(student_config(config, finished), tmp_path)
    assert run.config["model"]["base"] == "samba-tiny"
    assert_trees_equal(run.teacher, teacher)
    state = run.init()
    before = jax.tree.map(np.asarray, state.params)
    adapted = before["layers"]["1_mlp"]["mixer"]["up"]
    np.testing.assert_array_equal(adapted.base, teacher["layers"]["1_mlp"]["mixer"]["up"])
    assert not np.any(adapted.b)
    new = before["layers"]["2_mamba2_attention"]["mixer"]
    for name in "qkvo":
        np.testing.assert_array_equal(new[name], teacher["layers"]["2_attention"]["mixer"][name])
    batches = data_lib.train_batches(run.data, run.config)
    losses = []
    with run.active():
        for _ in range(20):
            state, metrics = run.train_step(state, run.place(next(batches)), run.teacher)
            losses.append(float(metrics["kl"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    for path, leaf in flatten(state.params).items():
        changed = np.any(np.asarray(leaf) != flatten(before)[path])
        assert changed == ("_mamba2_attention/mixer/" in path or path.endswith(("/a", "/b"))), path
    assert_trees_equal(run.teacher, teacher)  # and none of its buffers was donated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": {"name": "runs"}}, r"config\.initial: name='runs' is not supported; did you mean"),
        ({"initial": {"name": "run"}}, r"config\.initial: name 'run' needs workdir"),
        ({"initial": {"name": "run", "workdir": "nowhere"}}, r"config\.initial: .*holds no run"),
        ({"initial": {"name": "run", "workdir": "nowhere", "checkpoint": 3}}, "checkpoint=3 must be 'best', 'last' or"),
        ({"initial": {"name": "hf", "folder": "nowhere"}}, r"config\.initial: .*nowhere is no folder"),
        ({"model.base": "llama-tiny", "model.base_options": {"width": 32}, "teacher": {"name": "run", "workdir": "no"}},
         r"config\.teacher: .*holds no run"),
        ({"teacher": {"name": "none"}}, r"needs config\.teacher: initial, run or hf"),
        ({"objective": {"name": "cross_entropy"}}, r"config\.objective='cross_entropy' reads none"),
        ({"objective": {"name": "attention_distillation"}}, "needs a model converted to 'hedgehog'"),
        ({"objective": {"name": "attention_distillation", "causal": False}}, "no option 'causal'"),
        ({"objective": {"name": "attention_distillation"}, "model.to": "hedgehog", "trainable": ("*",)},
         "at most the teacher's window, 8"),
        ({"trainable": ("*_mamba2/mixer/*",)}, r"config\.trainable: '\*_mamba2/mixer/\*' matches no parameter; did"),
        ({"frozen": ("*",)}, r"leave nothing"),
        ({"model.mixer": {"heads": 3}}, r"config\.model: convert: mixer\['heads'\]=3 must be the attention's 2"),
        ({"adapter": {"name": "lora", "rank": 2}}, r"config\.adapter: name 'lora' needs pattern"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(finished, config, tmp_path, change, message):
    student_config(config, finished)
    config.data.directory = str(finished)
    config.model["mixer"] = None
    for path, value in change.items():
        *parents, last = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(ConfigError, match=message):
        build(config, tmp_path).init()


def test_a_folder_of_hugging_face_as_the_start(config, tmp_path):
    """Its model is converted as it is, without a base in the config."""
    model = zoo.create("llama-tiny", **{**SIZES, "vocab_size": 264}, rope_theta=5e4)
    params = redraw(model.param_specs(), 7)
    zoo.to_hf(model, params, tmp_path / "hf")
    config.model = {"name": "converted", "to": "mamba2_attention", "keep": 2, "vocab_size": None}
    config.initial = {"name": "hf", "folder": str(tmp_path / "hf")}
    config.teacher = {"name": "initial"}
    config.objective = {"name": "logit_distillation"}
    run = build(config, tmp_path)
    assert run.model.config.pattern[2].mixer.rotary.theta == 5e4
    assert_trees_equal(run.teacher, params)
    layers = run.init().params["layers"]
    for index, name in enumerate(("0_mamba2_attention", "2_attention")):
        for leaf in "qkvo":
            np.testing.assert_array_equal(
                layers[name]["mixer"][leaf][0], params["layers"]["0_attention"]["mixer"][leaf][index]
            )


def test_a_second_conversion_takes_the_first_ones_options(finished):
    given = {"name": "converted", "to": "mamba2_attention", "keep": 0}
    with pytest.raises(ValueError, match="has no option 'width'"):
        start.conversion_of_run({**given, "width": 3}, str(finished))


@pytest.mark.parametrize("variant", mamba_in_llama.STARTS)
def test_variants_are_plain_and_whole(variant):
    config_lib.check(mamba_in_llama.get_config(variant))
