"""A trained model as one object: features, matching, retrieval, grounding, masked words.

Images are paths, PIL images or uint8 tensors [3, H, W] of any size; texts are strings. Lists are worked on in batches.

Legend: I images, T texts, N pairs, D width of the shared space, K results.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mamo.config import load_config
from mamo.data.images import decode_image, to_rgb
from mamo.data.transforms import eval_transform
from mamo.evaluation.grounding import to_image_size
from mamo.evaluation.scoring import EncodedImages, EncodedTexts, Scorer
from mamo.tasks.parts import Trained
from mamo.tasks.trained import load_trained
from mamo.training import checkpoint
from mamo.training.precision import choose_device
from mamo.training.run_folder import CONFIG

logger = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | Tensor


class MissingHeadError(ValueError):
    """The model was trained without the head that a call needs."""


@dataclass(frozen=True, slots=True)
class Grounding:
    """`heat` float [H, W] of the image's own size, not negative; `point` (x, y) its hottest pixel."""

    heat: NDArray[np.float64]
    point: tuple[int, int]


def load(
    path: str | Path, device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["fp32", "bf16"] = "fp32"
) -> "Model":
    """Load a trained model from a run folder (its last checkpoint) or a step folder.

    Raises:
        ValueError: there is no such folder, its files are damaged or of another architecture (`CheckpointError`), or
            CUDA was asked for where there is none. Nothing is ever unpickled.
    """
    folder = checkpoint.resolve(Path(path))
    config = load_config(folder / CONFIG)
    trained = load_trained(folder, config, choose_device(device))
    if precision == "bf16":
        trained.network.bfloat16()
    return Model(trained, config.data.image_size, config.data.text_max_tokens, config.evaluation.batch_size)


class Model:
    """What `load` gives. `tokenizer` and `image_size_px` are what it reads with."""

    def __init__(
        self, trained: Trained, image_size_px: tuple[int, int], text_max_tokens: int, batch_size: int = 256
    ) -> None:
        self.network = trained.network
        self.tokenizer = trained.tokenizer
        self.image_size_px = image_size_px
        self.text_max_tokens = text_max_tokens
        self._batch_size = batch_size
        self._scorer = Scorer(
            trained.network, trained.tokenizer, trained.normalise, trained.device, text_max_tokens, batch_size
        )
        self._has_told_of_cut = False

    def encode_image(self, images: Sequence[ImageLike]) -> Tensor:
        """L2-normalised ITC features, float32 [I, D]. Raises BadSample (a ValueError) naming an unreadable image."""
        self._need("temperature", "encode_image", "itc")
        with torch.inference_mode():
            return self._images(images).feature

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised ITC features, float32 [T, D]."""
        self._need("temperature", "encode_text", "itc")
        with torch.inference_mode():
            return self._texts(texts).feature

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Cosine similarity of all images to all texts by ITC, float32 [I, T]."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Probability of ITM that image n shows what text n says, float32 [N].

        Raises ValueError where there are not as many images as texts.
        """
        self._need("itm", "match", "itm")
        if len(images) != len(texts):
            raise ValueError(f"match: {len(images)} images and {len(texts)} texts; give pairs")
        with torch.inference_mode():
            rows = torch.arange(len(images))
            return self._scorer.match(self._images(images), self._texts(texts), rows, rows).sigmoid()

    def index(self, images: Sequence[ImageLike]) -> "Gallery":
        """A gallery to retrieve from, each image encoded once. Raises ValueError for an empty one."""
        self._need("temperature", "index", "itc")
        if not images:
            raise ValueError("index: the gallery is empty")
        with torch.inference_mode():
            return Gallery(self, self._images(images))

    def ground(self, image: ImageLike, expression: str) -> Grounding:
        """Where in the image is what the expression says: Grad-CAM of the match (`mamo.explain.grad_cam`)."""
        self._need("itm", "ground", "itm")
        pixels = self._pixels(image)
        with torch.inference_mode():
            row = torch.zeros(1, dtype=torch.int64)
            heat = self._scorer.ground(self._images([pixels]), self._texts([expression]), row, row)[0]
        whole = to_image_size(heat, (pixels.shape[1], pixels.shape[2]))
        y, x = np.unravel_index(int(whole.argmax()), whole.shape)
        return Grounding(whole, (int(x), int(y)))

    def fill_mask(self, image: ImageLike, text: str) -> str:
        """`text` with each [MASK] replaced by the likeliest token, all at once.

        Raises ValueError where the text holds no [MASK] within the token limit.
        """
        self._need("mlm", "fill_mask", "mlm")
        mask = self.tokenizer.mask_token
        # the tokenizer reads "[MASK]" in a text as plain text, so that no caption can smuggle one in
        ids = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(mask)]
        joined = [self.tokenizer.cls_token_id, *ids[0]]
        for part in ids[1:]:
            joined += [self.tokenizer.mask_token_id, *part]
        joined = [*joined[: self.text_max_tokens - 1], self.tokenizer.sep_token_id]
        slots = [k for k, token in enumerate(joined) if token == self.tokenizer.mask_token_id]
        if not slots:
            raise ValueError(f"fill_mask: no {mask} among the first {self.text_max_tokens} tokens of {text!r}")
        with torch.inference_mode():
            texts = self._scorer.encode_texts(torch.tensor([joined]), torch.tensor([len(joined)]))
            row = torch.zeros(1, dtype=torch.int64)
            (words,) = self._scorer.fill(self._images([image]), texts, row, row, torch.tensor([slots])).tolist()
        for slot, token in zip(slots, words, strict=True):
            joined[slot] = token
        return str(self.tokenizer.decode(joined[1:-1]))

    def _need(self, head: str, call: str, loss: str) -> None:
        if getattr(self.network, head) is None:
            raise MissingHeadError(
                f"{call}: this model was trained without {loss}; train it on with "
                f"`python scripts/finetune.py --config configs/finetune/retrieval_scenes.yaml checkpoint=FOLDER`, or "
                f"pre-train with losses.weights.{loss} above 0"
            )

    def _pixels(self, image: ImageLike) -> Tensor:
        """uint8 [3, H, W] at the image's own size."""
        if isinstance(image, str | Path):
            return decode_image(Path(image))
        if isinstance(image, Image.Image):
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image tensor must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
        return image

    def _images(self, images: Sequence[ImageLike]) -> EncodedImages:
        def batches() -> Iterator[Tensor]:
            for start in range(0, len(images), self._batch_size):
                part = images[start : start + self._batch_size]
                yield torch.stack([eval_transform(self._pixels(image), self.image_size_px) for image in part])

        return self._scorer.encode_images(batches())

    def _texts(self, texts: Sequence[str]) -> EncodedTexts:
        if isinstance(texts, str):
            raise ValueError("give a list of texts, not one string")
        if not self._has_told_of_cut:
            lengths = [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
            if max(lengths, default=0) > self.text_max_tokens:
                self._has_told_of_cut = True
                logger.warning(
                    "texts are cut to %d tokens; the longest has %d (told once)", self.text_max_tokens, max(lengths)
                )
        return self._scorer.encode_texts(*self._scorer.tokenize(texts))


class Gallery:
    """Encoded images to retrieve from; see `Model.index`."""

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
