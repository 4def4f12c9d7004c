"""What the README says of the code is what the code says."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def _presets():
    spec = importlib.util.spec_from_file_location("presets", ROOT / "docs" / "presets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_presets_is_fresh():
    text = (ROOT / "README.md").read_text()
    assert _presets().updated(text) == text, "run python docs/presets.py"


def test_commands_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for config in ("quickstart", "samba"):
        assert f"launch/configs/{config}.py" in text
        assert (ROOT / "launch" / "configs" / f"{config}.py").exists()
    for target in text.split("](")[1:]:
        path = target.split(")")[0]
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
