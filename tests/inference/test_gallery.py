"""A gallery of texts, and one of images whose features are kept on disk."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mamo
from mamo.config.schema import RunConfig
from mamo.trainer import TrainingRun
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld
from tests.tiny import spread_weights

N = 7
TEXTS = ["a red circle", "two blue squares", "a small green triangle"]


@pytest.fixture
def model(tiny: Callable[..., RunConfig]) -> mamo.Model:
    """Untrained; its weights are spread so that scores differ."""
    run = TrainingRun(tiny(data={"text_max_tokens": 40}, evaluation={"batch_size": 3}))
    torch.manual_seed(1)
    spread_weights(run.task.network, least_ndim=2)
    run.task.network.eval()
    return mamo.Model(run.predictor, run.config, "", {})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    world = SceneWorld("easy", WORLD_SEED)
    for k in range(N):
        Image.fromarray(render(world.scene("test", k), (16, 16))).save(tmp_path / f"{k}.bmp")
    return [tmp_path / f"{k}.bmp" for k in range(N)]


@pytest.fixture
def encoded(model: mamo.Model) -> list[int]:
    """How many images each call of the image encoder was given."""
    counts: list[int] = []
    encoder = model.network.backbone.image_encoder
    encoder.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    return counts


def test_a_second_index_encodes_nothing_and_says_the_same(
    model: mamo.Model, files: list[Path], encoded: list[int], tmp_path: Path
) -> None:
    """Bug: the file is written and never read; rows, or shortlisted images, of another picture; other bits on disk."""
    ranked = model.index(files).retrieve(TEXTS, k=2, rerank_k=2)
    encoded.clear()
    cold = model.index(files, cache=tmp_path / "cache")
    assert sum(encoded) == N
    encoded.clear()
    warm = model.index([str(file) for file in files], cache=str(tmp_path / "cache"))
    assert encoded == []
    assert len(warm) == N
    found = warm.retrieve(TEXTS, k=2, rerank_k=2)
    assert found == cold.retrieve(TEXTS, k=2, rerank_k=2)
    features = load_file(next((tmp_path / "cache").iterdir()))["feature"]
    torch.testing.assert_close(features, model.encode_image(files), rtol=0, atol=0)
    for best, expected in zip(found, ranked):
        assert [index for index, _ in best] == [index for index, _ in expected]
        assert [score for _, score in best] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_a_text_encodes_its_shortlist_alone(
    model: mamo.Model, files: list[Path], encoded: list[int], tmp_path: Path
) -> None:
    """Bug: every image is encoded again for a text, or an image once for each text that shortlists it."""
    gallery = model.index(files, cache=tmp_path / "cache")
    shortlists = model.similarity(files, TEXTS).T.topk(3, dim=1).indices
    encoded.clear()
    gallery.retrieve(TEXTS, k=1, rerank_k=3)
    assert sum(encoded) == len(set(shortlists.flatten().tolist())) < N
    assert max(encoded) <= 3  # the batch size: of a large union only a group is in memory


@pytest.mark.parametrize("has_itm", [True, False])
def test_texts_are_ranked_for_each_image_as_pairs_are_scored(
    model: mamo.Model, files: list[Path], encoded: list[int], has_itm: bool
) -> None:
    """Bug: images and texts exchanged in a pair, a row of another query, a text scored that is on no shortlist."""
    texts = [*TEXTS, "a", "a large yellow star is left of a small red circle"]
    similarity = model.similarity(files, texts)
    shortlists = similarity.topk(3, dim=1).indices.tolist()
    asked = [file for file in files for _ in range(3)]
    scores = model.match(asked, [texts[item] for items in shortlists for item in items]).logit().view(-1, 3)
    if not has_itm:
        model.network.itm, scores = None, similarity.topk(3, dim=1).values
    gallery = model.index_texts(texts)
    assert len(gallery) == len(texts)
    encoded.clear()
    found = gallery.retrieve(files, k=2, rerank_k=3)
    assert sum(encoded) == N  # once each, whatever they shortlist
    assert len({best[0][0] for best in found}) > 1
    for best, shortlist, score in zip(found, shortlists, scores, strict=True):
        expected = sorted(zip(score.tolist(), shortlist), reverse=True)[:2]
        assert [index for index, _ in best] == [index for _, index in expected]
        assert [value for _, value in best] == pytest.approx([value for value, _ in expected], abs=1e-3)


def change_weight(model: mamo.Model, files: list[Path]) -> None:
    with torch.no_grad():
        model.network.backbone.image_projection.weight[0, 0] += 1e-3


def change_pixel(model: mamo.Model, files: list[Path]) -> None:
    """One byte, at the same size and time of change."""
    before, content = files[2].stat(), bytearray(files[2].read_bytes())
    content[-1] ^= 255
    files[2].write_bytes(content)
    os.utime(files[2], ns=(before.st_atime_ns, before.st_mtime_ns))


def change_size(model: mamo.Model, files: list[Path]) -> None:
    data = model.config.data.model_copy(update={"image_size_px": 2 * model.config.data.image_size[0]})
    model.config = model.config.model_copy(update={"data": data})


def change_precision(model: mamo.Model, files: list[Path]) -> None:
    model.network.bfloat16()


def change_order(model: mamo.Model, files: list[Path]) -> None:
    files.reverse()


def test_what_changes_a_feature_changes_the_file(
    model: mamo.Model, files: list[Path], encoded: list[int], tmp_path: Path
) -> None:
    """Bug: features of other weights, pictures, sizes, precision or another order are taken for this gallery's."""
    changes = (change_weight, change_pixel, change_size, change_precision, change_order)
    model.index(files, cache=tmp_path / "cache")
    for n_files, change in enumerate(changes, 2):
        change(model, files)
        encoded.clear()
        model.index(files, cache=tmp_path / "cache")
        assert sum(encoded) == N, n_files
        assert len(list((tmp_path / "cache").iterdir())) == n_files


def test_a_damaged_file_is_made_again(
    model: mamo.Model, files: list[Path], encoded: list[int], tmp_path: Path, caplog: Any
) -> None:
    """Bug: a file cut off by a full disk ends in a traceback, is used as it is, or is replaced in silence."""
    whole = model.index(files, cache=tmp_path / "cache").retrieve(TEXTS)
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    for damaged in (content[:-5], content[:20], b""):
        file.write_bytes(damaged)
        encoded.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = model.index(files, cache=tmp_path / "cache")
        assert sum(encoded) == N
        assert len(caplog.messages) == 1
        assert f"encoding its {N} images again" in caplog.text
        assert file.read_bytes() == content
        assert again.retrieve(TEXTS) == whole


def test_a_full_disk_leaves_no_part_of_a_file(
    model: mamo.Model, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bug: half a file under the final name, a temporary one left behind, or hours of encoding thrown away."""

    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        assert [other.name.startswith(".") for other in path.parent.iterdir()] == [True]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mamo.inference.gallery.save_file", half)
    assert len(model.index(files, cache=tmp_path / "cache").retrieve(TEXTS, k=1)) == len(TEXTS)
    assert list((tmp_path / "cache").iterdir()) == []
    assert "No space left on device" in caplog.text


def test_what_cannot_be_kept_is_told(model: mamo.Model, files: list[Path], tmp_path: Path) -> None:
    """Bug: a traceback, or an error that comes after hours of encoding."""
    cache = tmp_path / "cache"
    for images, where, kind, message in (
        ([Image.open(files[0])], cache, ValueError, "a list of image files"),
        ([tmp_path / "absent.bmp"], cache, mamo.BadSampleError, r"absent\.bmp: FileNotFoundError: No such file"),
        (files, files[0], ValueError, r"cache=.*0\.bmp cannot be used as a folder"),
        ([], cache, mamo.EmptyGalleryError, "the gallery is empty"),
    ):
        with pytest.raises(kind, match=message):
            model.index(images, cache=where)


def test_the_content_of_a_cached_file_is_checked(
    model: mamo.Model, files: list[Path], encoded: list[int], tmp_path: Path, caplog: Any
) -> None:
    """Bug: features with a flipped bit, of another model or without a digest are ranked by, without a word."""
    whole = model.index(files, cache=tmp_path / "cache").retrieve(TEXTS)
    (file,) = (tmp_path / "cache").iterdir()
    content, good = file.read_bytes(), load_file(file)
    flipped = bytearray(content)
    start = content.index(good["feature"].numpy().tobytes())
    damaged: list[dict[str, torch.Tensor] | bytes] = []
    for place in range(start, start + good["feature"].nbytes, 97):
        flipped[place] ^= 127
        damaged.append(bytes(flipped))
        flipped[place] ^= 127
    nan, wide = torch.full_like(good["feature"], torch.nan), torch.randn(N, good["feature"].shape[1] + 4)
    other = torch.roll(good["feature"], 1, dims=0)
    damaged += [{**good, "feature": feature} for feature in (nan, wide, other, good["feature"].half())]
    damaged += [{"feature": good["feature"]}, {**good, "digest": good["digest"][:5]}]
    for found in damaged:
        if isinstance(found, bytes):
            file.write_bytes(found)
        else:
            save_file(found, file)
        encoded.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = model.index(files, cache=tmp_path / "cache")
        assert sum(encoded) == N
        assert f"encoding its {N} images again" in caplog.text
        assert file.read_bytes() == content
    assert again.retrieve(TEXTS) == whole
    file.rename(renamed := file.with_name("kept"))
    change_weight(model, files)
    model.index(files, cache=tmp_path / "cache")
    (own,) = {*(tmp_path / "cache").iterdir()} - {renamed}
    renamed.replace(own)  # the first model's features under the second one's name
    encoded.clear()
    model.index(files, cache=tmp_path / "cache")
    assert sum(encoded) == N


@pytest.mark.parametrize("cached", [True, False])
def test_features_that_are_not_numbers_are_refused(
    model: mamo.Model, files: list[Path], cached: bool, tmp_path: Path
) -> None:
    """Bug: a model whose weights are NaN ranks a gallery in some order, and keeps it on disk."""
    with torch.no_grad():
        model.network.backbone.image_projection.weight[0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{N} of {N} items, the first at 0, have features that are not finite"):
            model.index(files, cache=tmp_path / "cache" if cached else None)
    assert not (tmp_path / "cache").exists() or not [*(tmp_path / "cache").iterdir()]
