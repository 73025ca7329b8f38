"""Frozen features of a model: files of embeddings, linear and nearest-neighbour probes, zero-shot classification.

Legend: I images, T texts, C classes, P templates, D width.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from mamo.data.class_images import LabelledImages, list_images
from mamo.data.files import read_text
from mamo.data.output import OutputFolder
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import read_pairs, write_json_lines
from mamo.data.processor import ImageLike
from mamo.inference.model import Model

NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
PLACEHOLDER = "{}"


def read_images(source: Path) -> list[PairRecord]:
    """Return the images below a folder, without captions, or the pairs of a file, or of (a glob of) tar shards.

    Raises:
        ValueError: there are none; and as `read_pairs`.
    """
    if source.is_dir() and not any(source.glob("*.tar")):
        found = list_images(source)
        return [PairRecord(name, (), name, number, str(source)) for number, name in enumerate(found, 1)]
    return list(read_pairs(source))


def embed(model: Model, records: Sequence[PairRecord]) -> dict[str, Tensor]:
    """Compute the frozen features of images, of their captions, and of the pairs.

    Args:
        model: reads the images as in evaluation.
        records: images with their captions, in order.

    Returns:
        On the CPU, float32: `image` [I, D], the pooled output of the image encoder; with captions also `text` [T, D],
        that of the text encoder, `fused` [T, D], the fused [CLS] of each caption with its image, and `image_index`
        int64 [T], the image of each caption. Where the model was trained with ITC also `image_itc` and `text_itc`, the
        L2-normalised features that ITC compares.

    Raises:
        BadSampleError: an image cannot be read.
    """
    found: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for part in _batches(records, model.config.evaluation.batch_size):
            pixels = torch.stack([model.processor.resize(load_image(record.image)) for record in part])
            for name, values in _embed_batch(model, pixels, part).items():
                found.setdefault(name, []).append(values.float().cpu())
    features = {name: torch.cat(values) for name, values in found.items()}
    n_captions = [len(record.captions) for record in records]
    if sum(n_captions):
        features["image_index"] = torch.arange(len(records)).repeat_interleave(torch.tensor(n_captions))
    return features


def _batches(records: Sequence[PairRecord], size: int) -> Iterator[Sequence[PairRecord]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def _embed_batch(model: Model, pixels: Tensor, records: Sequence[PairRecord]) -> dict[str, Tensor]:
    backbone, device = model.network.backbone, next(model.network.parameters()).device
    has_itc = model.network.get_head("temperature") is not None
    encoded = backbone.image_encoder(pixels.to(device))
    found = {"image": backbone.image_encoder.pool(encoded)}
    if has_itc:
        found["image_itc"] = backbone.image_feature(encoded)
    captions = [caption for record in records for caption in record.captions]
    if not captions:
        return found
    rows = torch.arange(len(records)).repeat_interleave(torch.tensor([len(record.captions) for record in records]))
    fusion, embedded = backbone.fusion, backbone.fusion.embed_image(encoded)
    names = ["text", "text_itc", "fused"] if has_itc else ["text", "fused"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(captions), len(records)):  # no more pairs at once than images
        part = slice(start, start + len(records))
        ids, lengths = (value.to(device) for value in model.processor.texts(captions[part]))
        is_valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        words = backbone.text_encoder(ids, is_valid)
        parts["text"].append(backbone.text_encoder.pool(words))
        if has_itc:
            parts["text_itc"].append(backbone.text_feature(words))
        cls = fusion.text_positions(torch.zeros(len(ids), 1, dtype=torch.int64, device=device))
        text = fusion.embed_text(words, is_valid)
        parts["fused"].append(fusion.fuse(embedded, text, is_valid, cls, rows[part].to(device))[:, 0])
    return found | {name: torch.cat(values) for name, values in parts.items()}


def write_features(
    to: Path, features: dict[str, Tensor], records: Sequence[PairRecord], model_name: str, overwrite: bool = False
) -> Path:
    """Write the features as safetensors, and next to them the images and captions as JSON Lines; return that file.

    Raises:
        ValueError: the suffix is not .safetensors, or a file exists and `overwrite` is False.
    """
    if to.suffix != ".safetensors":
        raise ValueError(f"--to: {to} must end with .safetensors")
    listed = to.with_suffix(".jsonl")
    with OutputFolder(to.parent, overwrite) as output:
        meta = {"model": model_name, "shapes": json.dumps({name: list(v.shape) for name, v in features.items()})}
        save_file({name: value.contiguous() for name, value in features.items()}, output.path(to.name), meta)
        rows = ({"image": str(record.image), "captions": list(record.captions)} for record in records)
        write_json_lines(output.path(listed.name), rows)
    return listed


# ---- probes of classes ----------------------------------------------------------------------------------------------


def image_features(model: Model, images: Sequence[ImageLike]) -> Tensor:
    """Return the pooled output of the image encoder, float32 [I, D] on the CPU. Raises BadSampleError."""
    step, device = model.config.evaluation.batch_size, next(model.network.parameters()).device
    encoder, found = model.network.backbone.image_encoder, list[Tensor]()
    with torch.inference_mode():
        for start in range(0, len(images), step):
            pixels = model.processor.images(images[start : start + step])
            found.append(encoder.pool(encoder(pixels.to(device))).float().cpu())
    return torch.cat(found)


def probe_classes(model: Model, train: LabelledImages, test: LabelledImages) -> dict[str, float]:
    """Classify images from frozen features; see `judge_features`.

    Raises:
        ValueError: fewer than two classes, or a test label that no training image has.
    """
    if len(train.classes) < 2:
        raise ValueError(f"{train.source}: has one class, {train.classes[0]!r}; a probe needs two or more")
    unknown = sorted(set(test.labels) - set(train.labels))
    if unknown:
        raise ValueError(f"{test.source}: label {unknown[0]!r} is of no training image of {train.source}")
    fit, judged = (image_features(model, part.images) for part in (train, test))
    return judge_features(fit, train.labels, judged, test.labels)


def judge_features(
    fit: Tensor, fit_labels: Sequence[str], test: Tensor, test_labels: Sequence[str]
) -> dict[str, float]:
    """Return accuracies in percent of read-outs of features float [I, D].

    `linear` is logistic regression (C = 1) on standardised features, `knn` the vote of the 20 nearest training images,
    each with weight exp(cosine / 0.07) (Wu et al. 2018; DINO), and `majority` always the commonest training label.
    """
    x, y = fit.numpy(), test.numpy()
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, fit_labels)
    n = min(NEIGHBOURS, len(fit_labels))
    knn = KNeighborsClassifier(n, metric="cosine", weights=_neighbour_weights).fit(x, fit_labels)
    commonest = Counter(fit_labels).most_common(1)[0][0]
    return {
        "linear": 100 * float(linear.score(y, test_labels)),
        "knn": 100 * float(knn.score(y, test_labels)),
        "majority": 100 * sum(label == commonest for label in test_labels) / len(test_labels),
    }


def _neighbour_weights(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return exp(cosine / temperature) of cosine distances, up to a factor."""
    weights: npt.NDArray[np.float64] = np.exp(-distance / KNN_TEMPERATURE)
    return weights


# ---- zero-shot classification ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Templates:
    """Texts with one `{}` for the name of a class."""

    source: Path
    texts: tuple[str, ...]

    def of(self, label: str) -> list[str]:
        """Return the texts of a class; underscores of its label become spaces."""
        name = label.replace("_", " ")
        return [text.replace(PLACEHOLDER, name) for text in self.texts]


def read_templates(file: Path) -> Templates:
    """Read prompt templates, one a line; blank lines are skipped.

    Raises:
        ValueError: no template, or one without exactly one `{}` (with file and line).
    """
    texts = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        text = line.strip()
        if text and text.count(PLACEHOLDER) != 1:
            raise ValueError(f"{file}:{number}: needs one {PLACEHOLDER} for the name of the class, got {text!r:.80}")
        if text:
            texts.append(text)
    if not texts:
        raise ValueError(f"{file}: contains no template; write one a line, such as: a photo of a {PLACEHOLDER}")
    return Templates(file, tuple(texts))


def classify_zero_shot(model: Model, images: LabelledImages, templates: Templates) -> dict[str, float]:
    """Classify images by the ITC similarity to their classes' texts (CLIP's rule).

    The feature of a class is the normalised mean of its templates' normalised features.

    Returns:
        In percent: `top1`, `top5` (with more than five classes), `mean_per_class` and `chance`.

    Raises:
        ValueError: fewer than two classes.
        MissingHeadError: the model was trained without ITC.
    """
    if len(images.classes) < 2:
        raise ValueError(f"{images.source}: has one class, {images.classes[0]!r}; classification needs two or more")
    texts = model.encode_text([text for label in images.classes for text in templates.of(label)])  # [C P, D]
    classes = functional.normalize(texts.view(len(images.classes), len(templates.texts), -1).mean(dim=1), dim=1)
    scores = (model.encode_image(list(images.images)) @ classes.T).cpu()  # [I, C]
    return top_accuracies(scores, torch.tensor([images.classes.index(label) for label in images.labels]))


def top_accuracies(scores: Tensor, label: Tensor) -> dict[str, float]:
    """Return the accuracies of scores float [I, C] against labels int64 [I]; see `classify_zero_shot`.

    A class with the same score as the right one counts as ranked before it.
    """
    right = scores.gather(1, label[:, None])
    rank = (scores >= right).sum(dim=1) - 1  # [I], 0 is the best
    found = {"top1": rank < 1} | ({"top5": rank < 5} if scores.shape[1] > 5 else {})
    values = {name: 100 * float(is_in.double().mean()) for name, is_in in found.items()}
    per_class = [float((rank[label == k] < 1).double().mean()) for k in sorted(set(label.tolist()))]
    return {**values, "mean_per_class": 100 * sum(per_class) / len(per_class), "chance": 100 / scores.shape[1]}
