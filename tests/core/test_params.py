"""Spec trees: initialisation keyed by path, stacking, counts, masks, checks, partition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.trees import assert_trees_equal
from zoo.core import params as lib
from zoo.core.params import Spec

NORMAL = jax.nn.initializers.normal(1.0)
KEY = jax.random.key(3)


def tree(**extra):
    return {
        "a": Spec((3, 4), ("embed", "mlp"), NORMAL, inputs=1, tags=frozenset({"no_decay"})),
        "deep": {"b": Spec((5,), ("embed",), NORMAL, jnp.bfloat16), **extra},
    }


def test_adding_a_parameter_changes_no_other_leaf():
    small = lib.initialise(tree(), KEY)
    large = lib.initialise(tree(a=Spec((3, 4), ("embed", "mlp"), NORMAL), z=Spec((2,), ("embed",), NORMAL)), KEY)
    np.testing.assert_array_equal(small["a"], large["a"])
    np.testing.assert_array_equal(small["deep"]["b"], large["deep"]["b"])
    assert not np.array_equal(large["a"], large["deep"]["a"]), "equal names at other paths must differ"
    assert small["deep"]["b"].dtype == jnp.bfloat16
    assert not np.array_equal(small["a"], lib.initialise(tree(), jax.random.key(4))["a"])


def test_adding_layers_changes_no_other_layer():
    two, three = (lib.initialise(lib.stack(tree(), n), KEY) for n in (2, 3))
    assert_trees_equal(jax.tree.map(lambda x: x[:2], three), two)
    assert not np.array_equal(two["a"][0], two["a"][1]), "layers must differ"
    assert two["a"].shape == (2, 3, 4)
    assert lib.stack(tree(), 2)["a"].axes == ("layers", "embed", "mlp")
    for i, layer in enumerate(lib.unstack(two, 2)):
        assert_trees_equal(layer, jax.tree.map(lambda x, i=i: x[i], two))


def test_adding_a_sublayer_or_depth_changes_no_other_leaf_of_a_model():
    model = zoo.create("samba-tiny", layers=2, width=8, heads=1, kv_heads=1, hidden=8, vocab_size=8)
    deeper = zoo.create("samba-tiny", layers=4, width=8, heads=1, kv_heads=1, hidden=8, vocab_size=8, tied=False)
    small, large = lib.flatten(model.init(KEY)), lib.flatten(deeper.init(KEY))
    assert "head" in large
    for path, leaf in small.items():
        if path.endswith(("out_proj", "/o", "/down")):
            continue  # their scale depends on the depth
        same = large[path][:1] if path.startswith("layers") else large[path]
        np.testing.assert_array_equal(leaf, same, err_msg=path)


def test_abstract_count_and_bytes():
    specs = tree()
    assert lib.count(specs) == 17
    assert lib.nbytes(specs) == 12 * 4 + 5 * 2
    params = lib.initialise(specs, KEY)
    assert (lib.count(params), lib.nbytes(params)) == (17, 58)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params) == lib.abstract(specs)
    assert lib.tagged(specs, "no_decay") == {"a": True, "deep": {"b": False}}
    assert list(lib.flatten(specs)) == ["a", "deep/b"]


def test_spec_refuses_nonsense():
    with pytest.raises(ValueError, match=r"\(3, 4\) needs 2 axis names"):
        Spec((3, 4), ("embed",))
    with pytest.raises(ValueError, match=r"positive.*\(0,\)"):
        Spec((0,), ("embed",))
    with pytest.raises(ValueError, match=r"inputs must be in 0\.\.1, got 2"):
        Spec((3,), ("embed",), inputs=2)


def test_check_tree_names_every_problem():
    specs, params = tree(), lib.initialise(tree(), KEY)
    lib.check_tree(params, specs)
    bad = {"a": params["a"][:2], "deep": {"c": params["a"]}}
    with pytest.raises(ValueError, match="do not fit") as error:
        lib.check_tree(bad, specs)
    for part in ("missing deep/b (5,)", "unexpected deep/c", "a has shape (2, 4), expected (3, 4)"):
        assert part in str(error.value)


def test_partition_and_combine_are_inverse():
    params = lib.initialise(tree(), KEY)
    mask = {"a": False, "deep": {"b": True}}
    selected, rest = lib.partition(params, mask)
    assert [len(jax.tree.leaves(side)) for side in (selected, rest)] == [1, 1]
    assert_trees_equal(lib.combine(selected, rest), params)
    gradient = jax.grad(lambda s: jnp.sum(lib.combine(s, rest)["deep"]["b"].astype(jnp.float32)))(selected)
    assert list(lib.flatten(gradient)) == ["deep/b"]


def test_paths_of_dataclasses():
    state = zoo.create("mamba-tiny").state_specs(1, 8)
    assert list(lib.flatten(state)) == ["next_position", "layers/0_mamba/conv", "layers/0_mamba/ssm"]
    assert dataclasses.is_dataclass(state)
