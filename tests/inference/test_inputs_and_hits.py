"""Images as people have them, hits with names, and candidates of masked words."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mamo
from mamo.data.images import decode_image
from tests.tiny import spread_weights, values_of


@pytest.fixture(scope="module")
def model() -> mamo.Model:
    task = mamo.build(values_of())
    torch.manual_seed(0)
    spread_weights(task.network, least_ndim=2)
    return mamo.Model.from_task(task)


def pixels(seed: int = 0, channels: int = 3) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, channels), dtype=np.uint8)


def test_every_form_of_a_picture_is_the_same_picture(model: mamo.Model, tmp_path: Path) -> None:
    """Bug: height and width or the channels are exchanged, floats are cut to 0 and 1, one picture is read as rows."""
    array = pixels()
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, tensor, array / 255,
        array.astype(np.float32) / 255, tensor / 255, tensor.double() / 255, array[:, ::-1][:, ::-1],
        (array / 255).astype(">f8"), np.concatenate([array, np.full((20, 30, 1), 255, np.uint8)], axis=2),
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(model.processor.pixels(form), tensor), type(form)
    expected = model.encode_image([array])
    for one in [*forms, tensor[None], array[None], [array], (array,)]:
        found = model.encode_image(one)
        assert torch.equal(found, expected), type(one)
    grey = array[:, :, 0]
    wanted = decode_image(Image.fromarray(grey))
    for form in (grey, grey[:, :, None], grey / 255):
        assert torch.equal(model.processor.pixels(form), wanted)
    clear = np.dstack([array, np.zeros((20, 30), np.uint8)])
    assert model.processor.pixels(clear).unique().tolist() == [255]  # on white, as a file is


def test_several_pictures_are_a_batch_tensor_too(model: mamo.Model) -> None:
    """Bug: a batch is one picture, or its pictures are exchanged."""
    arrays = np.stack([pixels(k) for k in range(3)])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = model.encode_image(list(arrays))
    assert torch.equal(model.encode_image(arrays), expected)
    assert torch.equal(model.encode_image(tensors), expected)
    assert model.match(arrays[0], ["a red circle"]).shape == (1,)
    assert model.similarity(arrays[0], ["a", "b"]).shape == (1, 2)
    assert len(model.index(arrays[0])) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels().transpose(2, 0, 1), r"\[H, W, 3\], \[H, W, 4\] or \[H, W\], not \[3, 20, 30\]; move its channels"),
        (pixels() / 1.0, "an image of floats must have values from 0 to 1, not 0 to 255; undo its normalisation"),
        ((torch.from_numpy(pixels()).permute(2, 0, 1) / 255 - 0.5) / 0.2, r"values from 0 to 1, not -2\.5 to 2\.5"),
        (np.full((4, 4, 3), np.nan), "values from 0 to 1, not nan to nan"),
        (pixels().astype(np.int64), "an image array must be uint8, or float from 0 to 1, not int64"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"an image tensor must be uint8 or float \[3, H, W\], not uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"uint8, or float from 0 to 1, not int64 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"not \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), bool), "not bool"),
        (3, "an image must be a path, a PIL image, an array or a tensor, not int"),
    ],
)
def test_what_is_no_picture_is_named(model: mamo.Model, image: Any, message: str) -> None:
    """Bug: a normalised picture is read as noise, or channels first as a picture of three pixels' width."""
    with pytest.raises(mamo.BadSampleError, match=message) as caught:
        model.encode_image([image])
    assert "\n" not in str(caught.value)


def test_hits_name_the_item_and_the_score(model: mamo.Model, tmp_path: Path) -> None:
    """Bug: a hit has the path of another one, or a score that is said to be of the other kind."""
    files = [tmp_path / f"{k}.png" for k in range(4)]
    for k, file in enumerate(files):
        Image.fromarray(pixels(k)).save(file)
    for cache in (None, tmp_path / "cache"):
        (best,) = model.index(files, cache).retrieve(["a red circle"], k=3)
        for hit in best:
            index, score = hit
            assert hit == (index, score) == (hit.position, hit.score)
            assert (hit.item, hit.score_name) == (files[index], "itm_logit")
            probability = float(model.match(files[index], ["a red circle"]))
            assert math.isclose(1 / (1 + math.exp(-hit.score)), probability, rel_tol=1e-4, abs_tol=1e-5)
        assert repr(best[0]).startswith(f"Hit({best[0][0]}, ")
        again = pickle.loads(pickle.dumps(best))
        assert [(hit, hit.item) for hit in again] == [(hit, hit.item) for hit in best]
    texts = ["a star", "a red circle"]
    (found,) = model.index_texts(texts).retrieve(files[0], k=2)
    assert {hit.item for hit in found} == set(texts)
    itm, model.network.itm = model.network.itm, None
    (found,) = model.index(files).retrieve(["a star"], k=2)
    model.network.itm = itm
    cosine = model.similarity(files, ["a star"])[:, 0]
    assert [hit.score_name for hit in found] == ["itc_cosine"] * 2
    assert math.isclose(found[0].score, float(cosine.max()), rel_tol=1e-5)


def test_candidates_are_the_likeliest_tokens(model: mamo.Model) -> None:
    """Bug: probabilities of another mask, of the logits before the softmax, or in another order."""
    text, image = "a [MASK] circle and a [MASK]", pixels()
    found = model.mask_candidates(image, text, k=4)
    assert [len(several) for several in found] == [4, 4]
    vocabulary = len(model.processor.tokenizer)
    whole = model.mask_candidates(image, text, k=10**6)
    for several, best in zip(whole, found, strict=True):
        assert len(several) == vocabulary
        assert math.isclose(sum(one.probability for one in several), 1, rel_tol=1e-4)
        shares = [one.probability for one in several]
        assert shares == sorted(shares, reverse=True)
        assert several[:4] == best
    words = [several[0].token for several in found]
    filled = model.processor.tokenizer.convert_tokens_to_ids(words)
    decoded = model.fill_mask(image, text)
    assert model.processor.tokenizer.decode(filled[:1]) in decoded
    for k in (0, True, 2.5):
        with pytest.raises(ValueError, match="mask_candidates: k must be a whole number of at least 1"):
            model.mask_candidates(image, text, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask_candidates: no \[MASK\]"):
        model.mask_candidates(image, "none")


def test_the_command_of_a_missing_head_fits_the_data() -> None:
    """Bug: a model of one's own pictures is sent to the config of the embedded world."""
    data = {"source": "pairs", "train_file": "a.jsonl", "eval_file": "b.jsonl"}
    model = mamo.Model.from_task(mamo.build(values_of(data=data, losses={"weights": {"itm": 0.0}})))
    with pytest.raises(mamo.MissingHeadError) as caught:
        model.match(pixels(), ["x"])
    assert "--config retrieval_coco checkpoint=FOLDER losses.weights.itm=1 data.train_file=PAIRS" in str(caught.value)
