"""A trained model as one object: features, matching, retrieval, grounding, masked words, answers, reasoning.

Images are paths, PIL images or uint8 tensors [3, H, W] of any size; texts are strings. Lists are worked on in batches.
What a caller can do wrong ends in a ValueError, each kind in its own class; see `load`.

Legend: I images, T texts, N pairs, D width of the shared space, K results.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
from mamo.data.answers import ANSWERS
from mamo.data.images import BadSample
from mamo.data.processor import ImageLike, Processor
from mamo.data.reasoning import is_ordered
from mamo.data.records import clean_caption
from mamo.evaluation.answering import Answerer
from mamo.evaluation.grounding import Box, best_proposal, to_image_size
from mamo.evaluation.scoring import EncodedImages, EncodedTexts, Scorer
from mamo.gallery import EmptyGalleryError, Gallery, indexed
from mamo.tasks.exported import FILES, TokenizerMismatchError, is_exported, read_exported, write_exported
from mamo.tasks.parts import Trained
from mamo.tasks.trained import load_mamo
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
        CheckpointError: nothing there, damaged, of another architecture, an MLIM, or no checkpoint of ours. Only
            safetensors and JSON are read: no pickle is ever opened.
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
    trained, parts = load_mamo(folder, config, choose_device(device))
    return _model(trained, config, card(folder), parts.carried, precision)


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

    def __init__(
        self, trained: Trained, processor: Processor, config: Config, card: str, carried: Mapping[str, str]
    ) -> None:
        """`carried` are texts by file name that belong to the weights, such as the answer list of VQA."""
        self.network = trained.network
        self.processor = processor
        self.config = config
        self.card = card
        self.carried = carried
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

    def index(self, images: Sequence[ImageLike], cache: str | Path | None = None) -> "Gallery":
        """A gallery to retrieve from, each image encoded once; see `Gallery`. Raises EmptyGalleryError.

        With the folder `cache` ITC features alone are kept, in a file there, and shortlisted image files encoded again.
        """
        self._need("temperature", "index", "itc")
        with torch.inference_mode():
            return indexed(self._scorer, self._texts, self._images, images, self.config, cache)

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

    def answer(self, images: Sequence[ImageLike], questions: Sequence[str]) -> list[str]:
        """An answer to question n about image n, of the list that the model was fine-tuned with (VQA).

        >>> import mamo
        >>> answers = mamo.load("runs/vqa").answer(["a.jpg", "b.jpg"], ["what colour is it?", "is there a circle?"])
        >>> len(answers)
        2

        Raises ValueError where there are not as many images as questions.
        """
        self._need("answer", "answer", "vqa")
        if len(images) != len(questions):
            raise ValueError(f"answer: {len(images)} images and {len(questions)} questions; give pairs")
        scorer, given = self._scorer, list[str]()
        reading = (self.processor.tokenizer, scorer.normalise, scorer.device, json.loads(self.carried[ANSWERS]))
        answerer = Answerer(self.network, *reading, self.processor.text_max_tokens, self.config.evaluation.rerank_k)
        with torch.inference_mode():
            for start in range(0, len(images), scorer.batch_size):
                part = slice(start, start + scorer.batch_size)
                pixels = self.processor.images(images[part])
                given += answerer(pixels, torch.arange(len(pixels)), questions[part])
        return given

    def reason(self, images: Sequence[Sequence[ImageLike]], sentences: Sequence[str]) -> Tensor:
        """Probability that sentence n is true of the images n (NLVR2: a pair), float32 [N].

        >>> import mamo
        >>> true = mamo.load("runs/reasoning").reason([["a.jpg", "b.jpg"]], ["both images show a circle"])
        >>> bool(0 < true < 1)
        True

        Raises ValueError where lengths differ, or sentences have different numbers of images.
        """
        self._need("pair", "reason", "nlvr2")
        if len(images) != len(sentences) or len({len(several) for several in images}) != 1:
            raise ValueError("reason: give one list of images a sentence, all of the same length")
        backbone, scorer, found = self.network.backbone, self._scorer, list[Tensor]()
        with torch.inference_mode():
            for start in range(0, len(images), scorer.batch_size):
                part = slice(start, start + scorer.batch_size)
                pixels = torch.stack([self.processor.images(several) for several in images[part]])
                pixels = scorer.normalise(pixels.flatten(0, 1).to(scorer.device))
                slots = backbone.fusion.embed_image(backbone.image_encoder(pixels))
                ids, lengths = self.processor.texts([clean_caption(text) for text in sentences[part]])
                is_valid = torch.arange(ids.shape[1]) < lengths[:, None]
                sided = torch.tensor([is_ordered(text) for text in sentences[part]])
                texts = (value.to(scorer.device) for value in (ids, is_valid, sided))
                found.append(self.network.judge(slots.view(len(ids), -1, *slots.shape[1:]), *texts).sigmoid().cpu())
        return torch.cat(found)

    def _need(self, head: str, call: str, trained_by: str) -> None:
        if getattr(self.network, head) is None:
            is_loss = head in ("temperature", "itm", "mlm")
            raise MissingHeadError(
                f"{call}: this model was trained without {trained_by}; train it on with `python scripts/finetune.py "
                f"--config configs/finetune/{'retrieval' if is_loss else trained_by}_scenes.yaml checkpoint=FOLDER`"
                + (f", or pre-train with losses.weights.{trained_by} above 0" if is_loss else "")
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
        write_exported(save_directory, self.network, self.processor.tokenizer, self.config, self.card, self.carried)

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


def _model(
    trained: Trained, config: Config, card: str, carried: Mapping[str, str], precision: Literal["fp32", "bf16"]
) -> Model:
    if precision == "bf16":
        trained.network.bfloat16()
    processor = Processor(trained.tokenizer, config.data.image_size, config.data.text_max_tokens)
    return Model(trained, processor, config, card, carried)


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
