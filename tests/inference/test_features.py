"""Frozen features and what is read out of them, against passes and votes of one's own."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mamo
from mamo.commands.embed import main as embed_command
from mamo.commands.probe import main as probe_command
from mamo.inference.features import Templates, judge_features, read_templates, top_accuracies
from mamo.world.rendering import render
from mamo.world.scene import SceneWorld
from tests.tiny import spread_weights

WORLD = SceneWorld("easy", 0)


def write_pairs(folder: Path, n: int) -> Path:
    rows = []
    for k in range(n):
        Image.fromarray(render(WORLD.scene("test", k), (20, 16))).save(folder / f"{k}.png")
        rows.append({"image": f"{k}.png", "caption": [f"a red circle {'and ' * k}a ring", "a square"][: 1 + k % 2]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def stirred(monkeypatch: pytest.MonkeyPatch, pretrained: Path) -> mamo.Model:
    """A model with larger random weights, which `mamo.load` gives; two images a batch."""
    model = mamo.load(pretrained)
    torch.manual_seed(0)
    spread_weights(model.network, least_ndim=2)
    evaluation = model.config.evaluation.model_copy(update={"batch_size": 2})
    model.config = model.config.model_copy(update={"evaluation": evaluation})
    monkeypatch.setattr("mamo.inference.loading.load", lambda path: model)
    return model


def test_a_file_of_pairs_gives_image_text_and_fused(stirred: mamo.Model, tmp_path: Path) -> None:
    """Bug: a caption fused with the picture of another row, features of padded texts, rows in another order."""
    file, to = write_pairs(tmp_path, 5), tmp_path / "out" / "f.safetensors"
    embed_command(["run", "--images", str(file), "--to", str(to)])
    found = load_file(to)
    assert found.keys() == {"image", "image_itc", "text", "text_itc", "fused", "image_index"}
    assert found["image_index"].tolist() == [0, 1, 1, 2, 3, 3, 4]
    lines = [json.loads(line) for line in to.with_suffix(".jsonl").read_text().splitlines()]
    captions = [text for line in lines for text in line["captions"]]
    images = [line["image"] for line in lines]
    assert len(captions) == 7
    torch.testing.assert_close(found["image_itc"], stirred.encode_image(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["text_itc"], stirred.encode_text(captions), atol=1e-5, rtol=1e-4)
    logits = stirred.network.itm(found["fused"])
    probability = stirred.match([images[k] for k in found["image_index"]], captions)
    torch.testing.assert_close((logits[:, 1] - logits[:, 0]).sigmoid(), probability, atol=1e-5, rtol=1e-4)
    backbone = stirred.network.backbone
    with torch.inference_mode():
        single = backbone.image_encoder(stirred.processor.images(images[3:4]))
    torch.testing.assert_close(found["image"][3], single[0, 0], atol=1e-5, rtol=1e-4)


def test_a_folder_gives_images_and_no_file_is_overwritten(stirred: mamo.Model, tmp_path: Path) -> None:
    """Bug: features without the names of their images, or a file of the user's lost."""
    write_pairs(tmp_path, 3)
    to = tmp_path / "f.safetensors"
    arguments = ["run", "--images", str(tmp_path), "--to", str(to)]
    embed_command(arguments)
    assert load_file(to).keys() == {"image", "image_itc"}
    names = [json.loads(line)["image"] for line in to.with_suffix(".jsonl").read_text().splitlines()]
    assert names == [str(tmp_path / f"{k}.png") for k in range(3)]
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"f\.(safetensors|jsonl): exists; .*--overwrite"):
        embed_command(arguments)
    embed_command([*arguments, "--overwrite"])
    assert len(load_file(to)["image"]) == 2
    with pytest.raises(ValueError, match=r"--to: .*f\.npz must end with \.safetensors"):
        embed_command(["run", "--images", str(tmp_path), "--to", str(tmp_path / "f.npz")])
    (tmp_path / "1.png").write_bytes(b"x")
    with pytest.raises(mamo.BadSampleError, match=r"1\.png"):
        embed_command([*arguments, "--overwrite"])


def test_read_outs_against_a_vote_and_a_line_of_ones_own() -> None:
    """Bug: neighbours by distance instead of by angle, a vote without weights, training accuracy."""
    rng = np.random.default_rng(0)
    labels = ["a", "b", "b"] * 20
    centres = {"a": np.array([3.0, 0, 0, 1]), "b": np.array([0, 3.0, 0, 1])}
    fit = np.stack([centres[name] + rng.normal(size=4) for name in labels])
    test_labels = ["a", "b"] * 10
    test = np.stack([centres[name] * 5 + rng.normal(size=4) * 4 for name in test_labels])
    found = judge_features(torch.from_numpy(fit), labels, torch.from_numpy(test), test_labels)
    cosine = (test / np.linalg.norm(test, axis=1)[:, None]) @ (fit / np.linalg.norm(fit, axis=1)[:, None]).T
    right = 0
    for row, label in zip(cosine, test_labels, strict=True):
        votes: Counter[str] = Counter()
        for k in np.argsort(-row)[:20]:
            votes[labels[k]] += float(np.exp(row[k] / 0.07))
        right += votes.most_common(1)[0][0] == label
    assert found["knn"] == pytest.approx(100 * right / 20)
    assert found["majority"] == 50
    assert found["linear"] >= 75
    swapped = judge_features(
        torch.from_numpy(fit), labels, torch.from_numpy(fit), ["b" if x == "a" else "a" for x in labels]
    )
    assert swapped["linear"] < 20


def test_classes_and_zero_shot_on_folders_and_csv(
    stirred: mamo.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: labels by the order of the test folder, a class's text for another one, templates that are not averaged."""
    for split, first in (("train", 0), ("test", 100)):
        for k in range(12):
            scene = WORLD.scene("test", first + k)
            folder = tmp_path / split / ("pale_one" if k % 2 else "red_one")
            folder.mkdir(parents=True, exist_ok=True)
            shade = (255, 250, 250) if k % 2 else (200, 10, 10)
            picture = render(scene, (16, 16))
            picture[::2] = shade
            Image.fromarray(picture).save(folder / f"{k}.png")
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted((tmp_path / "test").rglob("*.png"))]
    (tmp_path / "test.csv").write_text("image,label\n" + "\n".join(rows))
    for test in (tmp_path / "test", tmp_path / "test.csv"):
        probe_command(["classes", "run", "--train", str(tmp_path / "train"), "--test", str(test)])
        shown = capsys.readouterr().out
        assert "2 classes, 12 training images, 12 test images" in shown
        assert "linear            100.0" in shown
        assert "majority           50.0" in shown
    (tmp_path / "templates.txt").write_text("a {} shape\n\nthere is a {}\n")
    images_and_texts = ["--images", str(tmp_path / "test.csv"), "--templates", str(tmp_path / "templates.txt")]
    probe_command(["zero-shot", "run", *images_and_texts])
    shown = capsys.readouterr().out
    images = [str(tmp_path / row.split(",")[0]) for row in rows]
    texts = [[f"a {name} shape", f"there is a {name}"] for name in ("pale one", "red one")]
    means = torch.stack([stirred.encode_text(several).mean(dim=0) for several in texts])
    guess = (stirred.encode_image(images) @ (means / means.norm(dim=1, keepdim=True)).T).argmax(dim=1)
    expected = 100 * np.mean([("pale_one", "red_one")[k] in row for k, row in zip(guess.tolist(), rows, strict=True)])
    assert f"top1              {expected:5.1f}" in shown
    (tmp_path / "test.csv").write_text("image,label\ntest/red_one/0.png,blue_one\n")
    with pytest.raises(ValueError, match=r"test\.csv: label 'blue_one' is of no training image"):
        probe_command(["classes", "run", "--train", str(tmp_path / "train"), "--test", str(tmp_path / "test.csv")])
    with pytest.raises(ValueError, match="has one class, 'blue_one'"):
        probe_command(["zero-shot", "run", *images_and_texts])


def test_top_accuracies_by_hand() -> None:
    """Bug: a tie counts as right, so that equal scores are right always; a mean over images instead of classes."""
    scores = torch.tensor(
        [[3.0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]]
    )
    found = top_accuracies(scores, torch.tensor([0, 0, 4, 5]))
    assert found["top1"] == 25
    assert found["top5"] == 75
    assert found["mean_per_class"] == pytest.approx(100 * (0.5 + 0 + 0) / 3)
    assert found["chance"] == pytest.approx(100 / 7)
    assert "top5" not in top_accuracies(torch.eye(5), torch.arange(5))


def test_templates_need_one_placeholder(tmp_path: Path) -> None:
    """Bug: a template without the class, so that all classes have the same text."""
    file = tmp_path / "t.txt"
    file.write_text("a photo of a {}\n\n  a {} .\n")
    assert read_templates(file).of("guinea_pig") == ["a photo of a guinea pig", "a guinea pig ."]
    assert Templates(file, ("{}: {x}",)).of("a") == ["a: {x}"]
    for text, message in (("x\n", r"t\.txt:1: needs one \{\}"), ("{}\n{} {}\n", r":2: needs"), ("\n", "no template")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_templates(file)
