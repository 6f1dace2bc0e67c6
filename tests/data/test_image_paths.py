"""The path resolver: whatever a file names, only an image inside the root is found, and all else is a `DataError`."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbert.data.readers.base import ImageFolder, NoImageError
from mmbert.errors import DataError

PARTS = st.sampled_from(
    [
        "a.jpg",
        "sub",
        "b.jpg",
        "..",
        ".",
        "",
        "~",
        "out.jpg",
        "outside",
        "loop",
        "here",
        "x.jpg",
        "pipe",
        "c:",
        "\\",
        "A.JPG",
    ]
) | st.text(max_size=4)
NAMES = st.lists(PARTS, max_size=5).map("/".join) | st.text(max_size=12) | st.just("a" * 5000)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with images, and links in and out of it, of which some are loops."""
    root = tmp_path_factory.mktemp("tree") / "root"
    (root / "sub/here").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "sub/here/a.jpg", "../x.jpg"):
        (root / name).touch()
    (root / "out.jpg").symlink_to(root.parent / "x.jpg")
    (root / "sub/out.jpg").symlink_to("../../x.jpg")
    (root / "outside").symlink_to(root.parent)
    (root / "sub/outside").symlink_to("/")
    (root / "loop").symlink_to(root / "loop")
    (root / "here").symlink_to(root / "sub/here")
    (root / "sub/x.jpg").symlink_to(root / "a.jpg")
    os.mkfifo(root / "pipe")
    return root


@given(st.lists(NAMES, min_size=1, max_size=6))
def test_any_name_is_an_image_inside_the_root_or_a_data_error(tree: Path, names: list[str]) -> None:
    folder = ImageFolder(tree)  # several names: what one lookup remembers must not open a way for the next
    for name in names:
        try:
            file, plain = folder.find(name, "file:1")
        except DataError as error:
            assert error.place == "file:1"
            str(error).encode()
            continue
        assert os.path.realpath(file) == str(file) and file.is_relative_to(tree) and file.is_file()
        assert (tree / plain).samefile(file)


def test_the_names_that_lie_inside_are_found(tree: Path) -> None:
    folder = ImageFolder(tree)
    for name, real in {
        "a.jpg": "a.jpg", "./a.jpg": "a.jpg", "sub//b.jpg": "sub/b.jpg", "here/a.jpg": "sub/here/a.jpg",
        "sub/x.jpg": "a.jpg",
    }.items():  # fmt: skip
        assert folder.find(name, "")[0] == tree / real


def test_names_of_other_systems_get_a_hint(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    for name in ("a b.png", "cats/0.png", "caf\u00e9.png", "cafe\u0301s.png", "cats/\u00fc.png"):
        (tmp_path / name).touch()
    hints = {
        "cats\\0.png": "Write forward slashes: 'cats/0.png'.",
        "C:\\data\\cats\\0.png": "Write forward slashes, relative to that folder.",
        "a%20b.png": "Names are taken literally: there is 'a b.png'.",
        "x%2Ey.png": "Names are taken literally: percent escapes are not resolved.",
        "cafe\u0301.png": r"There is 'caf\xe9.png', the same name in Unicode form NFC",
        "caf\u00e9s.png": r"There is 'cafe\u0301s.png', the same name in Unicode form NFD",
        "cats/u\u0308.png": r"There is 'cats/\xfc.png', the same name in Unicode form NFC",
        "CATS/0.png": "its folder inside",
        "A b.PNG": "There is 'a b.png'",
    }
    for name, hint in hints.items():
        with pytest.raises(NoImageError) as error:
            ImageFolder(tmp_path).find(name, "file:1")
        assert hint in error.value.expected, error.value
        assert error.value.has_hint == ("its folder" not in hint)
