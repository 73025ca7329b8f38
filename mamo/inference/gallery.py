"""Retrieve from encoded images or texts: a shortlist by ITC, re-ranked by ITM.

An image's tokens take hundreds of times the memory of its feature (ViT-B/16 at 256 px: 790 KB against 1 KB), and only
shortlisted images need them. A large gallery therefore caches features in a file and encodes the shortlisted images
again; a small one keeps the tokens in memory.

Legend: Q queries, K shortlisted items a query, N pairs, I images, D width of the shared space.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.data.images import BadSampleError
from mamo.evaluation.results import versions
from mamo.evaluation.scorer import EncodedImages, EncodedTexts, ImageTokens, ReencodedImages, Scorer
from mamo.models.weights import save_file

logger = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 1024
"""Rows of the similarity matrix, queries by items, in memory at a time."""
Encode = Callable[[Sequence[Any]], EncodedImages]
EncodeTexts = Callable[[Sequence[str]], EncodedTexts]
Query = TypeVar("Query")
Match = Callable[[Any, Tensor, Tensor], Tensor]
"""Encoded queries, rows of queries int64 [N], rows of items int64 [N] -> ITM scores float32 [N] of these pairs."""


class Hit(tuple[int, float]):
    """A retrieved item: the tuple (index in the gallery, score), with names.

    >>> import mamo
    >>> hit = mamo.load("runs/scenes").index(["a.jpg", "b.jpg"]).retrieve(["a red circle"])[0][0]
    >>> index, score = hit
    >>> hit.item == ["a.jpg", "b.jpg"][index], hit.score == score, hit.score_name
    (True, True, 'itm_logit')
    """

    item: Any
    """The image or text as it was put into the gallery, such as a path."""
    score_name: str
    """`itm_logit`: match minus mismatch logit of ITM, or its match logit, as `evaluation.itm_score` says;
    `itc_cosine`: cosine similarity of the ITC features."""

    def __new__(cls, index: int, score: float, item: Any, score_name: str) -> "Hit":
        """Create a hit."""
        hit = super().__new__(cls, (index, score))
        hit.item, hit.score_name = item, score_name
        return hit

    @property
    def position(self) -> int:
        """Return the index of the item in the gallery."""
        return self[0]

    @property
    def score(self) -> float:
        """Return the score; `score_name` says what it is."""
        return self[1]

    def __repr__(self) -> str:
        return f"Hit({self[0]}, {self.item!r:.80}, {self.score_name}={self[1]:.4g})"

    def __reduce__(self) -> Any:
        """Pickle the hit with its names."""
        return Hit, (self[0], self[1], self.item, self.score_name)


class EmptyGalleryError(ValueError):
    """A gallery without images or texts.

    >>> import mamo
    >>> mamo.load("runs/scenes").index([])
    Traceback (most recent call last):
    mamo.inference.gallery.EmptyGalleryError: index: the gallery is empty
    """


class Gallery(Generic[Query]):
    """Encoded images to retrieve by text (`Model.index`), or texts to retrieve by image (`Model.index_texts`).

    >>> import mamo
    >>> model = mamo.load("runs/scenes")
    >>> gallery = model.index(["a.jpg", "b.jpg"])
    >>> len(gallery)
    2
    >>> (best,) = gallery.retrieve(["a red circle"], k=2)
    >>> sorted(index for index, score in best)
    [0, 1]

    With the features of many image files cached on disk:

    >>> large = model.index(["a.jpg", "b.jpg"], cache="runs/scenes/cache")
    >>> large.retrieve(["a red circle"], k=2)[0][0][0] == best[0][0]
    True

    Retrieve texts by image:

    >>> captions = model.index_texts(["a red circle", "a blue square", "two green stars"])
    >>> [len(best) for best in captions.retrieve(["a.jpg", "b.jpg"], k=2)]
    [2, 2]
    """

    def __init__(
        self,
        feature: Tensor,
        encode: Callable[[Sequence[Query]], Any],
        match: Match | None,
        items: Sequence[Any] | None = None,
    ) -> None:
        """Create a gallery from features float32 [items, D].

        Args:
            feature: ITC features of the items.
            items: as hits name them; their indices by default.
            encode: encodes queries; its result has a `feature` [Q, D].
            match: computes ITM scores of pairs; None for no re-ranking.

        Raises:
            ValueError: a feature is infinite or NaN.
        """
        _check_finite(feature)
        self._feature, self._encode, self._match = feature, encode, match
        self.items = range(len(feature)) if items is None else items

    def __len__(self) -> int:
        return len(self._feature)

    def retrieve(self, queries: Sequence[Query], k: int = 5, rerank_k: int = 32) -> list[list[Hit]]:
        """Return the best `k` items of each query, best first.

        The `rerank_k` most similar items by ITC are re-ranked by ITM if the model has that head, as in the evaluation.
        The score is then the matching logit, else the cosine similarity; see `Hit`.

        Raises ValueError for `k` above `rerank_k` or below 1 and for queries that are not a list, BadSampleError for an
        unreadable image.
        """
        for name, value in (("k", k), ("rerank_k", rerank_k)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"retrieve: {name} must be a whole number, not {value!r:.80}")
        if k < 1:
            raise ValueError(f"retrieve: k = {k} must be at least 1")
        if k > rerank_k:
            raise ValueError(f"retrieve: k = {k} must be at most rerank_k = {rerank_k}; increase rerank_k")
        with torch.inference_mode():
            encoded = self._encode(queries)
            parts = [
                (feature @ self._feature.T).topk(min(rerank_k, len(self)), dim=1)
                for feature in torch.split(encoded.feature, _QUERIES_AT_ONCE)
            ]
            score, shortlist = (torch.cat(several).cpu() for several in zip(*parts, strict=True))  # [Q, K]
            if self._match is not None:
                rows = torch.arange(len(shortlist)).repeat_interleave(shortlist.shape[1])
                score = self._match(encoded, rows, shortlist.flatten()).view(shortlist.shape)
            best, order = score.topk(min(k, shortlist.shape[1]), dim=1)
            items = shortlist.gather(1, order)
        name = "itc_cosine" if self._match is None else "itm_logit"
        return [
            [Hit(index, value, self.items[index], name) for index, value in zip(*pair, strict=True)]
            for pair in zip(items.tolist(), best.tolist())
        ]


def gallery_of_texts(scorer: Scorer, encode: EncodeTexts, images: Encode, texts: Sequence[str]) -> Gallery[Any]:
    """Build the gallery of `Model.index_texts`. Raises EmptyGalleryError without texts, ValueError for invalid ones."""
    if not len(texts):
        raise EmptyGalleryError("index_texts: the gallery is empty")
    encoded = encode(texts)

    def match(queries: ImageTokens, rows: Tensor, items: Tensor) -> Tensor:
        return scorer.itm_scores(queries, encoded, rows, items, scorer.itm_score)

    return Gallery(encoded.feature, images, match if scorer.network.get_head("itm") is not None else None, texts)


def _of_images(scorer: Scorer, texts: EncodeTexts, images: ImageTokens, items: Sequence[Any]) -> Gallery[str]:
    def match(queries: EncodedTexts, rows: Tensor, items: Tensor) -> Tensor:
        return scorer.itm_scores(images, queries, items, rows, scorer.itm_score)

    return Gallery(images.feature, texts, match if scorer.network.get_head("itm") is not None else None, items)


def gallery_of_images(
    scorer: Scorer,
    texts: EncodeTexts,
    encode: Encode,
    images: Sequence[Any],
    config: RunConfig,
    cache: str | Path | None,
) -> Gallery[str]:
    """Build the gallery of `Model.index`.

    The name of a file in `cache` is the digest of the weights, the image contents (in order), the settings and the
    library versions; it is used only for these. The file has a digest of that name and of its features. One that
    cannot be read, or has another digest, is rebuilt with a warning.

    Raises:
        EmptyGalleryError: no images.
        BadSampleError: names an unreadable image.
        ValueError: with `cache`, images that are not files, or a `cache` that cannot be a folder.
    """
    if not len(images):
        raise EmptyGalleryError("index: the gallery is empty")
    if cache is None:
        return _of_images(scorer, texts, encode(images), images)
    if not all(isinstance(image, str | Path) for image in images):
        raise ValueError("index: a cache needs a list of image files")
    settings = {
        "model": config.model.model_dump(mode="json"),
        "image_size_px": config.data.image_size,
        "batch_size": scorer.batch_size,  # batch size and device change the last bits of a feature
        "device": scorer.device.type,
        "versions": {**versions(), "pillow": version("pillow")},
    }
    file = Path(cache) / f"embeddings-{_key(scorer.network, images, settings)}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # raised before hours of encoding
        raise ValueError(f"index: cache={cache} cannot be used as a folder: {error}") from error
    feature = _read(file, len(images))
    if feature is None:
        steps = range(0, len(images), scorer.batch_size)
        feature = torch.cat([encode(images[start : start + scorer.batch_size]).feature for start in steps])
        _check_finite(feature)
        _write(file, feature)
    return _of_images(scorer, texts, ReencodedImages(feature.to(scorer.device), images, encode), images)


def _check_finite(feature: Tensor) -> None:
    is_bad = ~feature.isfinite().all(dim=1)
    if is_bad.any():
        first = int(is_bad.nonzero()[0, 0])
        raise ValueError(
            f"index: {int(is_bad.sum())} of {len(feature)} items, the first at {first}, have features that are not "
            "finite; check the weights of the model"
        )


def _key(network: nn.Module, files: Iterable[str | Path], settings: Values) -> str:
    """Return the SHA-256 of the weights, the contents of the image files and the settings, in hex digits."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in network.state_dict().items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for path in files:
        try:
            with Path(path).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise BadSampleError(f"{path}: {type(error).__name__}: {error.strerror}") from None
    return found.hexdigest()


def _read(file: Path, n_images: int) -> Tensor | None:
    """Read features float32 [I, D] from a file; None if it is missing or damaged."""
    if not file.exists():
        return None
    try:
        stored = load_file(file)
        feature, digest = stored["feature"], stored["digest"]
        if feature.ndim != 2 or len(feature) != n_images:
            raise ValueError(f"features {list(feature.shape)} for {n_images} images")
        if not torch.equal(digest, _digest(file, feature)):
            raise ValueError("its content is not what was written for this model and these images")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged (%s): encoding its %d images again", file, error, n_images)
        return None
    return feature


def _digest(file: Path, feature: Tensor) -> Tensor:
    """Return the SHA-256 of a file's name and its features on the CPU, uint8 [32]."""
    found = hashlib.sha256(f"{file.name} {feature.dtype} {list(feature.shape)}".encode())
    found.update(feature.contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def _write(file: Path, feature: Tensor) -> None:
    """Write features float32 [I, D] atomically; log a full disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        feature = feature.cpu().contiguous()
        save_file({"feature": feature, "digest": _digest(file, feature)}, temporary)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        logger.warning("%s cannot be written (%s): the next index will encode its images again", file, error)
