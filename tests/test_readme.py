"""What README and docs say of the code is what the code says."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures_and_gallery_are_fresh():
    script, text = _script("gallery"), (ROOT / "README.md").read_text()
    assert script.updated(text) == text, "run python docs/gallery.py"
    assert script.GALLERY.read_text() == script.gallery(), "run python docs/gallery.py"


def test_tables_and_pictures_of_kernels_are_fresh():
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert _script("kernels").updated(text) == text, "run python docs/kernels.py"
    pictures = _script("pictures")
    for op, picture in pictures.PICTURES.items():
        assert (pictures.FOLDER / f"{op}.svg").read_text() == pictures.draw(op, picture), "run python docs/pictures.py"
        assert f"](pictures/{op}.svg)" in text
    assert set(pictures.PICTURES) == {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/op.py")}


def test_commands_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for config in ("quickstart", "samba"):
        assert f"launch/configs/{config}.py" in text
        assert (ROOT / "launch" / "configs" / f"{config}.py").exists()
    for target in text.split("](")[1:]:
        path = target.split(")")[0].partition("#")[0]
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
