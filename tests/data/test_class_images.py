"""Images with labels: folders, CSV files, and mistakes in them."""

from pathlib import Path

import pytest
from PIL import Image

from mamo.data.class_images import list_images, read_labelled_images


def picture(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)
    return file


def test_labels_are_the_folders_below(tmp_path: Path) -> None:
    """Bug: the innermost folder as the label, a hidden file as an image, or an order that the file system chooses."""
    files = [picture(tmp_path / name) for name in ("b/2.png", "a/deep/er/1.PNG", "a/0.jpg", "b/.hidden.png")]
    (tmp_path / "a/notes.txt").write_text("x")
    picture(tmp_path / ".git/1.png")
    found = read_labelled_images(tmp_path)
    assert found.images == (str(files[2]), str(files[1]), str(files[0]))
    assert found.labels == ("a", "a", "b")
    assert found.classes == ("a", "b")
    assert list_images(tmp_path) == list(found.images)


def test_a_csv_file_in_either_order(tmp_path: Path) -> None:
    """Bug: columns by position, paths relative to the working folder, a comma in a label that splits it."""
    file = tmp_path / "sub" / "test.csv"
    file.parent.mkdir()
    file.write_text('\ufefflabel,image\n"tabby, grey",x/1.png\n\ndog, /abs/2.png \n', "utf-8")
    found = read_labelled_images(file)
    assert found.images == (str(tmp_path / "sub/x/1.png"), "/abs/2.png")
    assert found.labels == ("tabby, grey", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na,b\n", r"t\.csv:1: must be the header image,label, got \"path,class\""),
        ("image,label\na.png\n", r"t\.csv:2: needs an image and a label, got \"a.png\""),
        ("image,label\n\na.png,\n", r"t\.csv:3: needs an image and a label"),
        ("image,label\na,b,c\n", r"t\.csv:2: needs an image and a label, got \"a,b,c\""),
        ("image,label\n", r"t\.csv: contains no images"),
        ("", r"t\.csv:1: must be the header"),
        ("image,label\n" + "x" * 200_000 + ",b\n", r"t\.csv:2: not a row of CSV"),
    ],
)
def test_mistakes_in_a_csv_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    """Bug: a row without a label is dropped, or ends in a KeyError."""
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled_images(tmp_path / "t.csv")
    assert len(str(caught.value)) < 400


def test_mistakes_in_folders_are_named(tmp_path: Path) -> None:
    """Bug: an image outside of the classes gets its file name as its label."""
    with pytest.raises(ValueError, match="contains no image; known suffixes"):
        read_labelled_images(tmp_path)
    picture(tmp_path / "a/1.png")
    picture(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png is in no class folder"):
        read_labelled_images(tmp_path)
    with pytest.raises(ValueError, match=r"gone: .*; give a folder of class folders"):
        read_labelled_images(tmp_path / "gone")
