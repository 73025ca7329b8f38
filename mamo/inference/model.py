"""A trained model as one object: features, matching, retrieval, grounding, masked words, answers, statements.

Images are paths, PIL images, tensors [3, H, W] or arrays [H, W, 3] of any size, uint8 or float from 0 to 1. One image
is a list of one where a list is expected. Texts are strings. Lists are processed in batches of
`evaluation.batch_size`. Features and similarities stay on the model's device, probabilities are on the CPU.
Invalid arguments raise a ValueError or one of its subclasses; see `mamo.load`.

Legend: I images, T texts, N pairs, D width of the shared space, K results.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from mamo.config.schema import GroundingHeat, RunConfig
from mamo.data.collate import TOKENIZER_LOCK
from mamo.data.images import BadSampleError
from mamo.data.processor import ImageLike, Images, Processor, check_list, image_list
from mamo.data.records import ENTAILMENT_LABELS, Box
from mamo.data.tokenizer import ends_with_sep
from mamo.evaluation.metrics.grounding import best_proposal
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.scorer import EncodedImages, EncodedTexts, Scorer, heatmaps
from mamo.inference.gallery import EmptyGalleryError, Gallery, Hit, gallery_of_images, gallery_of_texts
from mamo.inference.hf_export import FILES, TokenizerMismatchError, check_target, read_exported, write_exported
from mamo.tasks.base import Task
from mamo.tasks.grounding.evaluate import resize_of
from mamo.tasks.reasoning.batch import is_ordered
from mamo.tasks.vqa.batch import ANSWERS
from mamo.tasks.vqa.evaluate import Answerer
from mamo.training.checkpoint import CheckpointError
from mamo.training.precision import DTYPES, DeviceError, Precision, choose_device

__all__ = [
    "BadSampleError", "Candidate", "CheckpointError", "DeviceError", "EmptyGalleryError", "Gallery", "Grounding", "Hit",
    "MissingHeadError", "Model", "Processor", "TokenizerMismatchError",
]  # fmt: skip

HEAT_THRESHOLD = 0.5
"""Patches with at least this share of the largest heat belong to the box of `Model.ground`."""


class MissingHeadError(ValueError):
    """The model lacks the head that a method needs; the message has the command that trains it.

    >>> import mamo
    >>> model = mamo.load("runs/scenes")
    >>> model.network.itm = None  # as if trained without matching
    >>> model.match(["a.jpg"], ["a red circle"])
    Traceback (most recent call last):
    mamo.inference.model.MissingHeadError: match: this model was trained without itm; fine-tune it ...
    """


@dataclass(frozen=True, slots=True)
class Grounding:
    """Location of an expression in an image, in pixels of the image's own size.

    >>> import mamo
    >>> found = mamo.load("runs/scenes").ground("a.jpg", "a red circle")
    >>> found.heat.shape  # a.jpg is 60 pixels wide and 40 high
    (40, 60)
    >>> bool(found.heat[found.point[1], found.point[0]] == found.heat.max())
    True
    """

    heat: NDArray[np.float64]
    """Heat map [H, W], interpolated as in the evaluation; not negative, except with `evaluation.heat_resize: uncut`."""
    point: tuple[int, int]
    """(x, y) of the hottest pixel."""
    box: Box
    """(x, y, width, height): the best proposal; without proposals, whole patches around the hottest one."""


class Candidate(NamedTuple):
    """A token for a [MASK]: `token` as the tokenizer writes it (`##` continues a word), and its `probability`.

    >>> import mamo
    >>> ((best, *others),) = mamo.load("runs/scenes").mask_candidates("a.jpg", "a small [MASK] circle")
    >>> isinstance(best.token, str), 0 < best.probability <= 1
    (True, True)
    """

    token: str
    probability: float


class Model(ModelHubMixin):
    """A trained model, from `mamo.load`.

    `network` is the torch module, `processor` prepares images and texts, `config` is the configuration of its run,
    `card` is its card in Markdown. `save_pretrained`, `from_pretrained` and `push_to_hub` are the methods of the hub:

    >>> import mamo
    >>> model = mamo.load("runs/scenes")
    >>> model.save_pretrained("exported")  # config.json, model.safetensors, tokenizer, README.md
    >>> again = mamo.Model.from_pretrained("exported")
    >>> bool((again.encode_text(["a red circle"]) == model.encode_text(["a red circle"])).all())
    True
    """

    def __init__(self, predictor: Predictor, config: RunConfig, card: str, assets: Mapping[str, str]) -> None:
        """Create a model; `assets` are texts by file name that belong to the weights, such as VQA's answer list."""
        self.network = predictor.network
        self.processor = predictor.processor
        self.config = config
        self.card = card
        self.assets = assets
        self._predictor = predictor
        self._scorer = Scorer(predictor, config.evaluation.batch_size, config.evaluation.itm_score)

    def __repr__(self) -> str:
        weight = next(self.network.parameters())
        millions = sum(p.numel() for p in self.network.parameters()) / 1e6
        return f"mamo.Model({self.config.task}, {millions:.1f} M parameters, {weight.dtype}, {weight.device})"

    def encode_image(self, images: Images) -> Tensor:
        """Compute L2-normalised ITC features, float32 [I, D].

        >>> import mamo
        >>> mamo.load("runs/scenes").encode_image(["a.jpg", "b.jpg"]).norm(dim=1).round(decimals=3)
        tensor([1., 1.])

        Raises BadSampleError naming an unreadable image, ValueError for an empty list.
        """
        self._need("temperature", "encode_image", "itc")
        with torch.inference_mode():  # only the features of each batch are kept
            return torch.cat([self._scorer.encode_images([batch]).feature for batch in self._batches(images)])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Compute L2-normalised ITC features, float32 [T, D].

        >>> import mamo
        >>> mamo.load("runs/scenes").encode_text(["a red circle"]).shape[0]
        1

        A text longer than the limit is truncated, which is logged once. Raises ValueError for an empty list.
        """
        self._need("temperature", "encode_text", "itc")
        with torch.inference_mode():
            return self._texts(texts).feature

    def similarity(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Compute the cosine similarity of all images and texts by ITC, float32 [I, T].

        >>> import mamo
        >>> mamo.load("runs/scenes").similarity(["a.jpg", "b.jpg"], ["red", "blue", "a circle"]).shape
        torch.Size([2, 3])
        """
        return self.encode_image(images) @ self.encode_text(texts).T

    def match(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Compute the ITM probability that image n matches text n, float32 [N].

        >>> import mamo
        >>> probability = mamo.load("runs/scenes").match(["a.jpg", "b.jpg"], ["a red circle", "a red circle"])
        >>> bool((0 < probability).all() and (probability < 1).all())
        True

        Raises ValueError for different numbers of images and texts.
        """
        self._need("itm", "match", "itm")
        images = image_list(images)
        check_list("texts", texts)
        if len(images) != len(texts):
            raise ValueError(f"match: {len(images)} images and {len(texts)} texts; give pairs")
        with torch.inference_mode():
            rows = torch.arange(len(images))
            return self._scorer.itm_scores(self._images(images), self._texts(texts), rows, rows).sigmoid()

    def index(self, images: Images, cache: str | Path | None = None) -> Gallery[str]:
        """Encode images once into a gallery for retrieval by text; see `Gallery`. Raises EmptyGalleryError.

        With a folder `cache`, only ITC features are kept, in a file there; shortlisted image files are encoded again.
        """
        self._need("temperature", "index", "itc")
        images = image_list(images, least=0)
        with torch.inference_mode():
            return gallery_of_images(self._scorer, self._texts, self._images, images, self.config, cache)

    def index_texts(self, texts: Sequence[str]) -> Gallery[ImageLike]:
        """Encode texts once into a gallery for retrieval by image; see `Gallery`. Raises EmptyGalleryError."""
        self._need("temperature", "index_texts", "itc")
        check_list("texts", texts, least=0)
        with torch.inference_mode():
            return gallery_of_texts(self._scorer, self._texts, self._images, texts)

    def ground(
        self,
        image: ImageLike,
        expression: str,
        proposals: Sequence[Box] = (),
        heat_from: GroundingHeat | None = None,
    ) -> Grounding:
        """Locate an expression in an image: explain the ITM score by a method of `mamo.explain`.

        >>> import mamo
        >>> found = mamo.load("runs/scenes").ground("a.jpg", "a circle", proposals=[(0, 0, 30, 40), (30, 0, 30, 40)])
        >>> found.box in [(0, 0, 30, 40), (30, 0, 30, 40)]
        True

        Args:
            image: one image.
            expression: the text to locate.
            proposals: boxes (x, y, width, height) to choose from, as in the evaluation. Without any, the box covers
                the patches connected to the hottest one that have at least half of its heat.
            heat_from: Grad-CAM in the fusion or in the image encoder, or occlusion of patches; None for the
                `evaluation.grounding_heat` of the model's run. `scenes-easy-grounding` fixes `image_encoder`.
        """
        self._need("itm", "ground", "itm")
        how = heat_from or self.config.evaluation.grounding_heat
        if how not in get_args(GroundingHeat):
            raise ValueError(f"ground: heat_from {how!r:.80} is not valid; use {', '.join(get_args(GroundingHeat))}")
        boxes = _boxes(proposals)
        pixels = self.processor.pixels(image)
        size = (pixels.shape[1], pixels.shape[2])
        resized = self.processor.resize(pixels)[None]
        with torch.inference_mode():
            row = torch.zeros(1, dtype=torch.int64)
            heat = heatmaps(self._scorer, resized, self._texts([expression]), row, row, how)[0]
        whole = resize_of(self.config)(heat, size)
        y, x = np.unravel_index(int(whole.argmax()), whole.shape)
        box = boxes[best_proposal(whole, boxes)] if boxes else _hot_box(heat, size)
        return Grounding(whole, (int(x), int(y)), box)

    def fill_mask(self, image: ImageLike, text: str) -> str:
        """Replace each [MASK] in `text` by the likeliest token, all at once.

        >>> import mamo
        >>> filled = mamo.load("runs/scenes").fill_mask("a.jpg", "a small [MASK] circle")
        >>> filled.startswith("a small"), "[MASK]" in filled
        (True, False)

        Raises ValueError for a text without [MASK] within the token limit.
        """
        ids, slots, probability = self._mask_probabilities(image, text, "fill_mask")
        for slot, token in zip(slots, probability.argmax(dim=1).tolist(), strict=True):
            ids[slot] = token
        tokenizer = self.processor.tokenizer
        return str(tokenizer.decode(ids[1 : len(ids) - ends_with_sep(tokenizer)]))

    def mask_candidates(self, image: ImageLike, text: str, k: int = 5) -> list[list[Candidate]]:
        """Return the `k` likeliest tokens at each [MASK] of `text`, all masked at once, the likeliest first.

        >>> import mamo
        >>> (found,) = mamo.load("runs/scenes").mask_candidates("a.jpg", "a small [MASK] circle", k=3)
        >>> len(found), found[0].probability >= found[1].probability
        (3, True)

        Raises ValueError as `fill_mask`, and for a `k` below 1.
        """
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise ValueError(f"mask_candidates: k must be a whole number of at least 1, not {k!r:.80}")
        _, _, probability = self._mask_probabilities(image, text, "mask_candidates")
        best = probability.topk(min(int(k), probability.shape[1]), dim=1)
        words = self.processor.tokenizer.convert_ids_to_tokens
        return [
            [Candidate(token, share) for token, share in zip(words(tokens), shares, strict=True)]
            for tokens, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _mask_probabilities(self, image: ImageLike, text: str, call: str) -> tuple[list[int], list[int], Tensor]:
        """Return the token ids of `text`, the positions of [MASK], and the probabilities float32 [W, V] at these."""
        self._need("mlm", call, "mlm")
        if not isinstance(text, str):
            raise ValueError(f"{call}: give one text, not {text!r:.200}")
        tokenizer, limit = self.processor.tokenizer, self.processor.text_max_tokens
        mask = str(tokenizer.mask_token)
        # the tokenizer treats "[MASK]" in a text as plain text, so that captions cannot contain mask tokens
        parts = [self.processor.clean(part) for part in text.split(mask)]
        parts = [parts[0], *(f" {part}" if part else part for part in parts[1:])]  # a space is a part of some tokens
        with TOKENIZER_LOCK:
            ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        joined = [tokenizer.cls_token_id, *ids[0]]
        for part in ids[1:]:
            joined += [tokenizer.mask_token_id, *part]
        end = [tokenizer.sep_token_id] if ends_with_sep(tokenizer) else []
        self.processor.warn_if_truncated(len(joined) + len(end))
        joined = [*joined[: limit - len(end)], *end]
        slots = [k for k, token in enumerate(joined) if token == tokenizer.mask_token_id]
        if not slots:
            raise ValueError(f"{call}: no {mask} among the first {limit} tokens of {text!r}")
        with torch.inference_mode():
            texts = self._scorer.encode_texts(torch.tensor([joined]), torch.tensor([len(joined)]))
            row = torch.zeros(1, dtype=torch.int64)
            images = self._images([image])
            probability = self._scorer.masked_probabilities(images, texts, row, row, torch.tensor([slots]))[0]
        return joined, slots, probability

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Answer question n about image n, from the answer list of fine-tuning (VQA).

        >>> import mamo
        >>> answers = mamo.load("runs/vqa").answer(["a.jpg", "b.jpg"], ["what colour is it?", "is there a circle?"])
        >>> len(answers)
        2

        Raises ValueError for different numbers of images and questions.
        """
        self._need("answer", "answer", "vqa")
        images = image_list(images)
        check_list("texts", questions)
        if len(images) != len(questions):
            raise ValueError(f"answer: {len(images)} images and {len(questions)} questions; give pairs")
        self.processor.texts(questions)  # logs a truncated one
        scorer, found = self._scorer, list[str]()
        answers = json.loads(self.assets[ANSWERS])
        answerer = Answerer(self._predictor, answers, self.config.evaluation.rerank_k)
        with torch.inference_mode():
            for start in range(0, len(images), scorer.batch_size):
                part = slice(start, start + scorer.batch_size)
                pixels = self.processor.images(images[part])
                found += answerer(pixels, torch.arange(len(pixels)), questions[part])
        return found

    def reason(self, images: Sequence[Sequence[ImageLike]], sentences: Sequence[str]) -> Tensor:
        """Compute the probability that sentence n is true of images n (NLVR2: a pair), float32 [N].

        >>> import mamo
        >>> true = mamo.load("runs/reasoning").reason([["a.jpg", "b.jpg"]], ["both images show a circle"])
        >>> bool(0 < true < 1)
        True

        Raises ValueError for lists of different lengths, or different numbers of images per sentence.
        """
        self._need("pair", "reason", "reasoning")
        check_list("lists of images", images)
        check_list("texts", sentences)
        for several in images:
            check_list("images for each sentence", several)
        if len(images) != len(sentences) or len({len(several) for several in images}) != 1:
            raise ValueError("reason: give one list of images per sentence, all of the same length")
        trained_on = (2,) if self.config.data.source == "scenes" else (1, 2)
        if len(images[0]) not in trained_on:
            raise ValueError(
                f"reason: {len(images[0])} images per sentence; this model reads {' or '.join(map(str, trained_on))}"
            )
        backbone, scorer, found = self.network.backbone, self._scorer, list[Tensor]()
        with torch.inference_mode():
            for start in range(0, len(images), scorer.batch_size):
                part = slice(start, start + scorer.batch_size)
                pixels = torch.stack([self.processor.images(several) for several in images[part]])
                pixels = pixels.flatten(0, 1).to(scorer.device)
                slots = backbone.fusion.embed_image(backbone.image_encoder(pixels))
                ids, lengths = self.processor.texts(sentences[part])
                is_valid = torch.arange(ids.shape[1]) < lengths[:, None]
                sided = torch.tensor([is_ordered(text) for text in sentences[part]])
                texts = (value.to(scorer.device) for value in (ids, is_valid, sided))
                found.append(self.network.reason(slots.view(len(ids), -1, *slots.shape[1:]), *texts).sigmoid().cpu())
        return torch.cat(found)

    def entails(self, image: ImageLike, text: str) -> dict[str, float]:
        """Compute the probability that an image entails a text, contradicts it, or neither (SNLI-VE), by label.

        >>> import mamo
        >>> found = mamo.load("runs/entailment").entails("a.jpg", "there is a red circle in the north")
        >>> list(found)
        ['contradiction', 'neutral', 'entailment']

        Raises BadSampleError for an unreadable image, ValueError for several texts.
        """
        self._need("entailment", "entails", "entailment")
        if not isinstance(text, str):
            raise ValueError(f"entails: give one text, not {text!r:.200}")
        ids, lengths = self.processor.texts([text])
        is_valid = torch.arange(ids.shape[1]) < lengths[:, None]
        device, pixels = self._scorer.device, self.processor.images([image])
        with torch.inference_mode():
            embedded = self.network.embed(pixels.to(device))
            logits = self.network.classify(embedded, ids.to(device), is_valid.to(device))
        return dict(zip(ENTAILMENT_LABELS, logits[0].softmax(dim=0).tolist(), strict=True))

    def _need(self, head: str, call: str, trained_by: str) -> None:
        if self.network.get_head(head) is None:
            is_loss = head in ("temperature", "itm", "mlm")
            is_world = self.config.data.source == "scenes"
            retrieval = "retrieval_scenes" if is_world else "retrieval_coco"
            config = {"vqa": "questions", "reasoning": "sentences", "entailment": "entailment_scenes"}.get(
                trained_by, retrieval
            )
            weight = f" losses.weights.{trained_by}=1" if is_loss else ""
            weight += "" if is_world or not is_loss else " data.train_file=PAIRS data.eval_file=HELD_OUT"
            raise MissingHeadError(
                f"{call}: this model was trained without {trained_by}; fine-tune it with `mamo finetune "
                f"--config {config} checkpoint=FOLDER{weight}`"
                + (f", or pre-train with losses.weights.{trained_by} above 0" if is_loss else "")
            )

    def _batches(self, images: Images) -> Iterator[Tensor]:
        """Yield uint8 [B, 3, h, w] for each `evaluation.batch_size` images."""
        images = image_list(images)
        step = self._scorer.batch_size
        for start in range(0, len(images), step):
            yield self.processor.images(images[start : start + step])

    def _images(self, images: Images) -> EncodedImages:
        return self._scorer.encode_images(self._batches(images))

    def _texts(self, texts: Sequence[str]) -> EncodedTexts:
        return self._scorer.encode_texts(*self.processor.texts(texts))

    def save_pretrained(self, save_directory: str | Path, **hub: Any) -> str | None:
        """Write the model into a folder; see `ModelHubMixin.save_pretrained` for the other arguments.

        Raises ValueError for a folder of a run, a file, a folder that cannot be written, or one with files that are
        not of an earlier export and would be overwritten.
        """
        folder = Path(save_directory)
        check_target(folder, self.assets)
        try:
            url: str | None = super().save_pretrained(save_directory, **hub)
        except (OSError, SafetensorError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "the disk may be full"
            raise ValueError(f"save_pretrained: {folder} cannot be written: {reason}") from None
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the model; called by `save_pretrained`."""
        write_exported(save_directory, self.network, self.processor.tokenizer, self.config, self.card, self.assets)

    @classmethod
    def from_task(cls, task: Task) -> "Model":
        """Wrap the network of a task from `mamo.build`, without a copy; puts it into eval mode.

        >>> import mamo
        >>> mamo.Model.from_task(mamo.build("scenes")).similarity(["a.jpg"], ["a red circle"]).shape
        torch.Size([1, 1])
        """
        config, device = task.config, next(task.network.parameters()).device
        processor = Processor.of(task.tokenizer, config)
        return cls(Predictor(task.network.eval(), processor, device), config, "", task.assets)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        device: str | torch.device = "auto",
        precision: Precision = "fp32",
        **hub: Any,
    ) -> "Model":
        """Load a folder written by `save_pretrained`, or a hub name with options of `snapshot_download`.

        Raises as `mamo.load`. Replaces the mixin's own method, which reads config.json before any check.
        """
        where, folder = choose_device(device), Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(folder), allow_patterns=list(FILES), **hub))
            except (OSError, ValueError) as error:  # the hub's errors derive from these
                raise CheckpointError(f"{folder}: no such folder, and not a hub name that can be fetched") from error
        return model_of(*read_exported(folder, where), precision)


def model_of(
    predictor: Predictor, config: RunConfig, card: str, assets: Mapping[str, str], precision: Precision
) -> Model:
    """Create a model from a loaded network; raises ValueError for an unknown precision."""
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is not valid; use {', '.join(DTYPES)}")
    if precision != "fp32":
        for parameter in predictor.network.parameters():
            parameter.data = parameter.data.to(DTYPES[precision])
    return Model(predictor, config, card, assets)


def _boxes(proposals: Sequence[Box]) -> list[Box]:
    """Return the proposals, also of an array or tensor [K, 4], as tuples of numbers. Raises ValueError naming one."""
    if isinstance(proposals, str | bytes | Mapping) or not hasattr(proposals, "__len__"):
        raise ValueError(f"ground: proposals must be a list of boxes (x, y, width, height), not {proposals!r:.80}")
    values = proposals.tolist() if isinstance(proposals, np.ndarray | Tensor) else list(proposals)
    found: list[Box] = []
    for index, box in enumerate(values):
        numbers = box.tolist() if isinstance(box, np.ndarray | Tensor) else box
        is_box = isinstance(numbers, Sequence) and len(numbers) == 4 and all(isinstance(n, Real) for n in numbers)
        if not is_box or not all(math.isfinite(n) for n in numbers):
            raise ValueError(f"ground: proposal {index} must be a box (x, y, width, height), not {box!r:.80}")
        found.append((numbers[0], numbers[1], numbers[2], numbers[3]))
    return found


def _hot_box(heat: Tensor, image_size_px: tuple[int, int]) -> Box:
    """Return the box (x, y, width, height) around the patches of heat [h, w] that are connected to the hottest one."""
    is_hot = (heat >= HEAT_THRESHOLD * heat.max())[None].float()
    found, grown = torch.zeros_like(is_hot), (heat == heat.max())[None].float()
    while not torch.equal(found, grown):
        found, grown = grown, functional.max_pool2d(grown, 3, stride=1, padding=1) * is_hot
    rows, columns = found[0].nonzero().unbind(dim=1)
    scale_y, scale_x = (side / patches for side, patches in zip(image_size_px, heat.shape))
    left, top = int(columns.min()) * scale_x, int(rows.min()) * scale_y
    return left, top, (int(columns.max()) + 1) * scale_x - left, (int(rows.max()) + 1) * scale_y - top
