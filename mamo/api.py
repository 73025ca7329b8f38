"""A trained model as one object: features, matching, retrieval, grounding, masked words.

Images are paths, PIL images or uint8 tensors [3, H, W] of any size; texts are strings. Lists are worked on in batches.
What a caller can do wrong ends in a ValueError, each kind in its own class; see `load`.

Legend: I images, T texts, N pairs, D width of the shared space, K results.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mamo.config import Config, load_config
from mamo.data.images import BadSample
from mamo.data.processor import ImageLike, Processor
from mamo.evaluation.grounding import Box, best_proposal, to_image_size
from mamo.evaluation.scoring import EncodedImages, EncodedTexts, Scorer
from mamo.tasks.exported import FILES, TokenizerMismatchError, is_exported, read_exported, write_exported
from mamo.tasks.parts import Trained
from mamo.tasks.trained import load_trained
from mamo.training import checkpoint
from mamo.training.card import card
from mamo.training.checkpoint import CheckpointError
from mamo.training.precision import DeviceError, choose_device
from mamo.training.run_folder import CONFIG

__all__ = [
    "BadSample", "CheckpointError", "DeviceError", "EmptyGalleryError", "Gallery", "Grounding", "MissingHeadError",
    "Model", "Processor", "TokenizerMismatchError", "load",
]  # fmt: skip

HEAT_THRESHOLD = 0.5
"""Patches with at least this share of the largest heat belong to the box of `Model.ground`."""


class MissingHeadError(ValueError):
    """The model was trained without the head that a call needs; the message names the command that trains it.

    >>> import mamo
    >>> model = mamo.load("runs/scenes")
    >>> model.network.itm = None  # as if trained without matching
    >>> model.match(["a.jpg"], ["a red circle"])
    Traceback (most recent call last):
    mamo.api.MissingHeadError: match: this model was trained without itm; train it on ...
    """


class EmptyGalleryError(ValueError):
    """A gallery to retrieve from has no image.

    >>> import mamo
    >>> mamo.load("runs/scenes").index([])
    Traceback (most recent call last):
    mamo.api.EmptyGalleryError: index: the gallery is empty
    """


@dataclass(frozen=True, slots=True)
class Grounding:
    """Where in an image is what an expression says; all in pixels of the image's own size.

    >>> import mamo
    >>> found = mamo.load("runs/scenes").ground("a.jpg", "a red circle")
    >>> found.heat.shape  # a.jpg is 60 pixels wide and 40 high
    (40, 60)
    >>> bool(found.heat[found.point[1], found.point[0]] == found.heat.max())
    True
    """

    heat: NDArray[np.float64]
    """[H, W], not negative: Grad-CAM, interpolated from the patches."""
    point: tuple[int, int]
    """(x, y) of the hottest pixel."""
    box: Box
    """(x, y, width, height): the best proposal, or without proposals whole patches around the hottest one."""


def load(
    path: str | Path, device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["fp32", "bf16"] = "fp32"
) -> "Model":
    """Load a trained model.

    >>> import mamo
    >>> model = mamo.load("runs/scenes", device="cpu")
    >>> model.similarity(["a.jpg", "b.jpg"], ["a red circle"]).shape
    torch.Size([2, 1])

    Args:
        path: a run folder (its last checkpoint), a step folder, a folder that `save_pretrained` wrote, or the name of
            one on the hub (`user/name`, needs network).
        device: `auto` takes CUDA where there is any.
        precision: of weights and activations; scores are float32 always.

    Raises:
        CheckpointError: nothing there, damaged, of another architecture, or no checkpoint of ours. Only safetensors
            and JSON are read: no pickle is ever opened.
        TokenizerMismatchError: the tokenizer was exchanged; a CheckpointError.
        DeviceError: CUDA was asked for where there is none.

    The model's calls raise `MissingHeadError`, `BadSample` (not an image), `EmptyGalleryError` and, for other mistakes
    in arguments, plain ValueError, which all of these are.
    """
    folder, name = Path(path), str(path)
    if is_exported(folder):
        return _model(*read_exported(folder, choose_device(device)), precision)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        try:
            return Model.from_pretrained(name, device=device, precision=precision)
        except OSError as error:  # the mixin looks for config.json before it asks us
            raise CheckpointError(f"{name}: no such folder, and no hub name that can be fetched") from error
    folder = checkpoint.resolve(folder)
    config = load_config(folder / CONFIG)
    return _model(load_trained(folder, config, choose_device(device)), config, card(folder), precision)


class Model(ModelHubMixin):
    """What `load` gives.

    `network` is the torch module, `processor` what it reads with, `config` the configuration of its run, `card` its
    card as Markdown. `save_pretrained`, `from_pretrained` and `push_to_hub` are those of the Hugging Face hub:

    >>> import mamo
    >>> model = mamo.load("runs/scenes")
    >>> model.save_pretrained("exported")  # config.json, model.safetensors, tokenizer, README.md
    >>> again = mamo.Model.from_pretrained("exported")
    >>> bool((again.encode_text(["a red circle"]) == model.encode_text(["a red circle"])).all())
    True
    """

    def __init__(self, trained: Trained, processor: Processor, config: Config, card: str) -> None:
        self.network = trained.network
        self.processor = processor
        self.config = config
        self.card = card
        self._scorer = Scorer(
            trained.network,
            processor.tokenizer,
            trained.normalise,
            trained.device,
            processor.text_max_tokens,
            config.evaluation.batch_size,
        )

    def encode_image(self, images: Sequence[ImageLike]) -> Tensor:
        """L2-normalised ITC features, float32 [I, D].

        >>> import mamo
        >>> mamo.load("runs/scenes").encode_image(["a.jpg", "b.jpg"]).norm(dim=1).round(decimals=3)
        tensor([1., 1.])

        Raises BadSample naming what is not an image, ValueError for an empty list.
        """
        self._need("temperature", "encode_image", "itc")
        with torch.inference_mode():
            return self._images(images).feature

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised ITC features, float32 [T, D].

        >>> import mamo
        >>> mamo.load("runs/scenes").encode_text(["a red circle"]).shape[0]
        1

        A text past the limit is cut, and that is logged once a model. Raises ValueError for an empty list.
        """
        self._need("temperature", "encode_text", "itc")
        with torch.inference_mode():
            return self._texts(texts).feature

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Cosine similarity of all images to all texts by ITC, float32 [I, T].

        >>> import mamo
        >>> mamo.load("runs/scenes").similarity(["a.jpg", "b.jpg"], ["red", "blue", "a circle"]).shape
        torch.Size([2, 3])
        """
        return self.encode_image(images) @ self.encode_text(texts).T

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Probability of ITM that image n shows what text n says, float32 [N].

        >>> import mamo
        >>> probability = mamo.load("runs/scenes").match(["a.jpg", "b.jpg"], ["a red circle", "a red circle"])
        >>> bool((0 < probability).all() and (probability < 1).all())
        True

        Raises ValueError where there are not as many images as texts.
        """
        self._need("itm", "match", "itm")
        if len(images) != len(texts):
            raise ValueError(f"match: {len(images)} images and {len(texts)} texts; give pairs")
        with torch.inference_mode():
            rows = torch.arange(len(images))
            return self._scorer.match(self._images(images), self._texts(texts), rows, rows).sigmoid()

    def index(self, images: Sequence[ImageLike]) -> "Gallery":
        """A gallery to retrieve from, each image encoded once; see `Gallery`. Raises EmptyGalleryError."""
        self._need("temperature", "index", "itc")
        if not images:
            raise EmptyGalleryError("index: the gallery is empty")
        with torch.inference_mode():
            return Gallery(self, self._images(images))

    def ground(self, image: ImageLike, expression: str, proposals: Sequence[Box] = ()) -> Grounding:
        """Where in the image is what the expression says: Grad-CAM of the match (`mamo.explain.grad_cam`).

        >>> import mamo
        >>> found = mamo.load("runs/scenes").ground("a.jpg", "a circle", proposals=[(0, 0, 30, 40), (30, 0, 30, 40)])
        >>> found.box in [(0, 0, 30, 40), (30, 0, 30, 40)]
        True

        Args:
            image: one image.
            expression: what to look for.
            proposals: boxes (x, y, width, height) to choose among, as in the evaluation; without any, the box holds
                the patches connected to the hottest one that have at least half of its heat.
        """
        self._need("itm", "ground", "itm")
        pixels = self.processor.pixels(image)
        size = (pixels.shape[1], pixels.shape[2])
        with torch.inference_mode():
            row = torch.zeros(1, dtype=torch.int64)
            heat = self._scorer.ground(self._images([pixels]), self._texts([expression]), row, row)[0]
        whole = to_image_size(heat, size)
        y, x = np.unravel_index(int(whole.argmax()), whole.shape)
        box = proposals[best_proposal(whole, proposals)] if proposals else _hot_box(heat, size)
        return Grounding(whole, (int(x), int(y)), box)

    def fill_mask(self, image: ImageLike, text: str) -> str:
        """`text` with each [MASK] replaced by the likeliest token, all at once.

        >>> import mamo
        >>> filled = mamo.load("runs/scenes").fill_mask("a.jpg", "a small [MASK] circle")
        >>> filled.startswith("a small"), "[MASK]" in filled
        (True, False)

        Raises ValueError where the text holds no [MASK] within the token limit.
        """
        self._need("mlm", "fill_mask", "mlm")
        tokenizer, limit = self.processor.tokenizer, self.processor.text_max_tokens
        mask = tokenizer.mask_token
        # the tokenizer reads "[MASK]" in a text as plain text, so that no caption can smuggle one in
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(mask)]
        joined = [tokenizer.cls_token_id, *ids[0]]
        for part in ids[1:]:
            joined += [tokenizer.mask_token_id, *part]
        joined = [*joined[: limit - 1], tokenizer.sep_token_id]
        slots = [k for k, token in enumerate(joined) if token == tokenizer.mask_token_id]
        if not slots:
            raise ValueError(f"fill_mask: no {mask} among the first {limit} tokens of {text!r}")
        with torch.inference_mode():
            texts = self._scorer.encode_texts(torch.tensor([joined]), torch.tensor([len(joined)]))
            row = torch.zeros(1, dtype=torch.int64)
            (words,) = self._scorer.fill(self._images([image]), texts, row, row, torch.tensor([slots])).tolist()
        for slot, token in zip(slots, words, strict=True):
            joined[slot] = token
        return str(tokenizer.decode(joined[1:-1]))

    def _need(self, head: str, call: str, loss: str) -> None:
        if getattr(self.network, head) is None:
            raise MissingHeadError(
                f"{call}: this model was trained without {loss}; train it on with "
                f"`python scripts/finetune.py --config configs/finetune/retrieval_scenes.yaml checkpoint=FOLDER`, or "
                f"pre-train with losses.weights.{loss} above 0"
            )

    def _images(self, images: Sequence[ImageLike]) -> EncodedImages:
        if isinstance(images, str | Path) or not len(images):
            raise ValueError(f"give a list of images, not {images!r}")
        step = self._scorer.batch_size

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(images), step):
                yield self.processor.images(images[start : start + step])

        return self._scorer.encode_images(batches())

    def _texts(self, texts: Sequence[str]) -> EncodedTexts:
        return self._scorer.encode_texts(*self.processor.texts(texts))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by `save_pretrained`."""
        write_exported(save_directory, self.network, self.processor.tokenizer, self.config, self.card)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        **_: Any,  # the mixin hands over what it read of config.json
    ) -> "Model":
        """Called by `from_pretrained`; raises as `load`."""
        where, folder = choose_device(device), Path(model_id)
        if not folder.is_dir():
            try:
                folder = Path(
                    snapshot_download(
                        model_id,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                        allow_patterns=list(FILES),
                    )
                )
            except (OSError, ValueError) as error:  # the hub's errors derive from these
                raise CheckpointError(f"{model_id}: no such folder, and no hub name that can be fetched") from error
        return _model(*read_exported(folder, where), precision)


class Gallery:
    """Encoded images to retrieve from; `Model.index` makes it.

    >>> import mamo
    >>> gallery = mamo.load("runs/scenes").index(["a.jpg", "b.jpg"])
    >>> len(gallery)
    2
    >>> (best,) = gallery.retrieve(["a red circle"], k=2)
    >>> sorted(index for index, score in best)
    [0, 1]
    """

    def __init__(self, model: Model, images: EncodedImages) -> None:
        self._model, self._images = model, images

    def __len__(self) -> int:
        return len(self._images.feature)

    def retrieve(self, texts: Sequence[str], k: int = 5, rerank_k: int = 32) -> list[list[tuple[int, float]]]:
        """The best `k` images of each text: (index in the gallery, score), best first.

        The `rerank_k` most similar by ITC are scored again by ITM, if the model has that head, as in the evaluation;
        the score is then the matching logit, else the cosine similarity.

        Raises ValueError for `k` above `rerank_k` or below 1.
        """
        if not 1 <= k <= rerank_k:
            raise ValueError(f"retrieve: k = {k} must lie between 1 and rerank_k = {rerank_k}")
        scorer = self._model._scorer
        with torch.inference_mode():
            encoded = self._model._texts(texts)
            similarity = encoded.feature @ self._images.feature.T  # [T, I]
            score, shortlist = (found.cpu() for found in similarity.topk(min(rerank_k, len(self)), dim=1))
            if self._model.network.itm is not None:
                rows = torch.arange(len(texts)).repeat_interleave(shortlist.shape[1])
                score = scorer.match(self._images, encoded, shortlist.flatten(), rows).view(shortlist.shape)
            best, order = score.topk(min(k, shortlist.shape[1]), dim=1)
            images = shortlist.gather(1, order)
        return [list(zip(*pair, strict=True)) for pair in zip(images.tolist(), best.tolist())]


def _model(trained: Trained, config: Config, card: str, precision: Literal["fp32", "bf16"]) -> Model:
    if precision == "bf16":
        trained.network.bfloat16()
    processor = Processor(trained.tokenizer, config.data.image_size, config.data.text_max_tokens)
    return Model(trained, processor, config, card)


def _hot_box(heat: Tensor, image_size_px: tuple[int, int]) -> Box:
    """The box (x, y, width, height) around the patches of heat [h, w] that are connected to the hottest one."""
    is_hot = (heat >= HEAT_THRESHOLD * heat.max())[None].float()
    found, grown = torch.zeros_like(is_hot), (heat == heat.max())[None].float()
    while not torch.equal(found, grown):
        found, grown = grown, functional.max_pool2d(grown, 3, stride=1, padding=1) * is_hot
    rows, columns = found[0].nonzero().unbind(dim=1)
    scale_y, scale_x = (side / patches for side, patches in zip(image_size_px, heat.shape))
    left, top = int(columns.min()) * scale_x, int(rows.min()) * scale_y
    return left, top, (int(columns.max()) + 1) * scale_x - left, (int(rows.max()) + 1) * scale_y - top
