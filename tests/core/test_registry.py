"""Registries and their errors."""

import pytest

from zoo.core.registry import Registry, check_choice, check_keys, nearest


def test_register_get_and_order():
    shapes = Registry("shape")

    @shapes.register("square")
    def square():
        return 4

    shapes.register("circle")(1)
    assert shapes.get("square") is square
    assert shapes.names() == ["square", "circle"]
    shapes.items().clear()
    assert shapes.names() == ["square", "circle"], "items is a copy"
    with pytest.raises(ValueError, match="shape 'circle' is already registered"):
        shapes.register("circle")(2)
    with pytest.raises(KeyError, match="unknown shape 'sqare'; did you mean 'square'"):
        shapes.get("sqare")


def test_errors_suggest_the_nearest_name():
    check_choice("kind", "rms", ("rms", "layer"))
    with pytest.raises(ValueError, match="kind='rmss' is not supported; did you mean \"'rms'\""):
        check_choice("kind", "rmss", ("rms", "layer"))
    check_keys("model", ["width"], ["width", "layers"])
    with pytest.raises(ValueError, match="model has no option 'widht'; did you mean 'width'"):
        check_keys("model", ["widht"], ["width", "layers"])
    assert nearest("zzz", ["a", "b"]) == "allowed: a, b"
    assert nearest("a", []) == "allowed: none"
