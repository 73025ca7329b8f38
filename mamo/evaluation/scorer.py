"""Score image-text pairs. Text tokens are cached on the CPU; image tokens are cached or recomputed.

`EncodedImages` caches image tokens; `ReencodedImages` recomputes them, a few images at a time, so that memory does not
grow with the gallery. Pairs are processed image by image: the image's part of the fusion is computed once for all its
texts, and the text's once a batch. The precision is that of the weights. Similarities and matching logits are fp32:
coarser scores would tie.

Legend: I images, T texts, L text tokens, P patches in a grid [h, w], D width, N pairs, W masked tokens of a text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mamo.evaluation.predictor import Predictor
from mamo.explain import ItmScore, grad_cam, image_grad_cam, occlusion, score_of
from mamo.models.fusion import index_rows
from mamo.models.vlm import Mamo

CACHED_VALUES = 2**22
"""Activations of an MLP at once on a CPU; larger tensors leave the caches and are new pages each time."""


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in eval mode without gradients within the block; restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class ImageTokens(Protocol):
    """Images of which `Scorer` reads the tokens one group at a time; each image is in one group."""

    @property
    def feature(self) -> Tensor:
        """Return the ITC features, fp32 [I, D_itc] on the device."""
        ...

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Return the encoded tokens of rows int64 [M]: float [M, num_prefix_tokens + P, D_image] on the CPU."""
        ...

    def visible_of(self, rows: Tensor) -> Tensor | None:
        """Return the patches that were encoded, int64 [M, P_visible]; None for all."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """Images with cached tokens.

    `tokens` is float [I, num_prefix_tokens + P, D_image] on the CPU, `feature` fp32 [I, D_itc] on the device. Where
    only some patches were encoded, `visible` int64 [I, P_visible] names them and `tokens` has theirs.
    """

    tokens: Tensor
    feature: Tensor
    visible: Tensor | None = None

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Return the tokens of rows int64 [M]."""
        return self.tokens[rows]

    def visible_of(self, rows: Tensor) -> Tensor | None:
        """Return the visible patches of rows int64 [M]; None where all are."""
        return None if self.visible is None else self.visible[rows]


@dataclass(frozen=True, slots=True)
class ReencodedImages:
    """Images of which only the features, fp32 [I, D_itc] on the device, are in memory; tokens are recomputed.

    Tokens take hundreds of times the memory of features: 1.8 MB against 1 KB an image for ViT-B/16 at 384 px.
    """

    feature: Tensor
    files: Sequence[Any]
    encode: Callable[[Sequence[Any]], EncodedImages]

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Encode the images of rows int64 [M] again -> float [M, num_prefix_tokens + P, D_image]."""
        return self.encode([self.files[row] for row in rows.tolist()]).tokens

    def visible_of(self, rows: Tensor) -> None:
        """Return None: all patches are encoded."""


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Encoded texts: the fusion's `embed_text` output and the ITC features.

    `tokens` is float [T, L, D] and `lengths` int64 [T], both on the CPU; `feature` is fp32 [T, D_itc] on the device.
    """

    tokens: Tensor
    lengths: Tensor
    feature: Tensor


class MaskedWordPredictor(Protocol):
    """Interface of a scorer that predicts masked words; `images` and `texts` are in the scorer's own encoding."""

    tokenizer: PreTrainedTokenizerFast
    text_max_tokens: int

    def encode_texts(self, input_ids: Tensor, lengths: Tensor) -> Any:
        """Encode token ids int64 [T, L], of which the first `lengths` int64 [T] are valid."""
        ...

    def predict_masked(
        self, images: Any, texts: Any, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Tensor:
        """Predict the likeliest token at text positions `slots` int64 [N, W] of pairs -> int64 [N, W] on the CPU."""
        ...


class Scorer:
    """A network in eval mode with its tokenizer, batch size, and the ITM score by which it ranks and explains."""

    def __init__(self, predictor: Predictor, batch_size: int, itm_score: ItmScore = "difference") -> None:
        self.network: Mamo = predictor.network
        self.processor, self.itm_score = predictor.processor, itm_score
        self.tokenizer = predictor.processor.tokenizer
        self.text_max_tokens = predictor.processor.text_max_tokens
        self.device = predictor.device
        self.batch_size = batch_size

    def encode_images(self, batches: Iterable[Tensor]) -> EncodedImages:
        """Encode batches of images uint8 [B, 3, H, W], one or more."""
        backbone = self.network.backbone
        tokens, features = [], []
        for batch in batches:
            encoded = backbone.image_encoder(batch.to(self.device))
            features.append(backbone.image_feature(encoded))
            tokens.append(encoded.cpu())
        return EncodedImages(torch.cat(tokens), torch.cat(features))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize texts -> (input_ids int64 [T, L], lengths int64 [T]), truncated to `text_max_tokens`.

        Texts of files come cleaned; those of the embedded world need no cleaning but ALBEF's.
        """
        cleaned = list(texts) if self.processor.cleaning == "plain" else [self.processor.clean(text) for text in texts]
        encoded = self.tokenizer(cleaned, padding=True, truncation=True, max_length=self.text_max_tokens)
        lengths = torch.tensor(encoded["attention_mask"]).sum(dim=1)
        self.processor.warn_of_cuts(cleaned, lengths)
        return torch.tensor(encoded["input_ids"]), lengths

    def encode_texts(self, input_ids: Tensor, lengths: Tensor) -> EncodedTexts:
        """Encode token ids int64 [T, L], the first `lengths` int64 [T] of them valid; batches hold similar lengths."""
        backbone = self.network.backbone
        tokens = torch.empty(0)
        features: list[Tensor] = []
        order: list[Tensor] = []
        for rows, longest in self._by_length(lengths):
            is_valid = _is_valid(lengths[rows], longest).to(self.device)
            encoded = backbone.text_encoder(input_ids[rows, :longest].to(self.device), is_valid)
            features.append(backbone.text_feature(encoded))
            embedded = backbone.fusion.embed_text(encoded, is_valid)
            if not order:
                tokens = torch.zeros(*input_ids.shape, embedded.shape[2], dtype=embedded.dtype)
            tokens[rows, :longest] = embedded.cpu()
            order.append(rows)
        back = torch.cat(order).argsort().to(self.device)
        return EncodedTexts(tokens, lengths, torch.cat(features)[back])

    def similarity(self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor) -> Tensor:
        """Compute the ITC similarity of pairs, rows int64 [N] each -> float32 [N] on the CPU."""
        image = images.feature[image_indices.to(self.device)]
        return (image * texts.feature[text_rows.to(self.device)]).sum(dim=1).cpu()

    def itm_scores(
        self,
        images: ImageTokens,
        texts: EncodedTexts,
        image_indices: Tensor,
        text_rows: Tensor,
        rule: ItmScore = "difference",
    ) -> Tensor:
        """Compute ITM scores of pairs, rows int64 [N] each -> float32 [N] on the CPU.

        By `rule` the score is match minus mismatch logit, of which the probability is the sigmoid, or the match logit.
        """
        return score_of(self.itm_logits(images, texts, image_indices, text_rows), rule)

    def itm_logits(self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor) -> Tensor:
        """Compute the logits (mismatch, match) of pairs, rows int64 [N] each -> float32 [N, 2] on the CPU."""
        logits = torch.empty(len(image_indices), 2)
        cls = torch.zeros(len(image_indices), 1, dtype=torch.int64)
        for pairs, fused in self._fuse(images, texts, image_indices, text_rows, cls):
            logits[pairs] = self.network.itm(fused[:, 0]).cpu()
        return logits

    def gradcam(self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor) -> Tensor:
        """Compute Grad-CAM heat maps of pairs, rows int64 [N] each: float32 [N, h, w] over the patches, on the CPU."""
        fusion, itm = self.network.backbone.fusion, self.network.itm
        heat = torch.empty(len(image_indices), *fusion.grid)
        for pairs, image, place, text, is_valid, row in self._embedded(images, texts, image_indices, text_rows):
            pair = index_rows(image, place), index_rows(text, row), index_rows(is_valid, row)
            heat[pairs] = grad_cam(fusion, itm, *pair, rule=self.itm_score).cpu()
        return heat

    def pixel_heatmaps(
        self,
        how: Callable[..., Tensor],
        image: Tensor,
        texts: EncodedTexts,
        image_indices: Tensor,
        text_rows: Tensor,
    ) -> Tensor:
        """Compute heat maps from pixels, by `image_grad_cam` or `occlusion`.

        Args:
            how: one of the two functions.
            image: uint8 [I, 3, H, W].
            texts: encoded texts.
            image_indices, text_rows: the pairs, int64 [N] each.

        Returns:
            float32 [N, h, w] over the patches, on the CPU.
        """
        backbone, itm = self.network.backbone, self.network.itm
        heat = torch.empty(len(image_indices), *backbone.fusion.grid)
        for pairs, longest in self._by_length(texts.lengths[text_rows]):
            rows = text_rows[pairs]
            pixels = backbone.image_encoder.normalize(image[image_indices[pairs]].to(self.device))
            is_valid = _is_valid(texts.lengths[rows], longest).to(self.device)
            text = texts.tokens[rows, :longest].to(self.device)
            heat[pairs] = how(backbone, itm, pixels, text, is_valid, rule=self.itm_score).cpu()
        return heat

    def predict_masked(
        self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Tensor:
        """Predict the likeliest token at text positions `slots` int64 [N, W] of pairs -> int64 [N, W] on the CPU."""
        tokens = torch.empty_like(slots)
        for pairs, fused in self._fuse(images, texts, image_indices, text_rows, slots):
            logits = self.network.mlm(fused.flatten(0, 1))  # [B * W, V]
            tokens[pairs] = logits.argmax(dim=-1).view(fused.shape[:2]).cpu()
        return tokens

    def masked_probabilities(
        self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Tensor:
        """Compute the probability of each token of the vocabulary at text positions -> float32 [N, W, V] on the CPU."""
        vocabulary = self.network.backbone.text_encoder.word_embeddings.num_embeddings
        found = torch.empty(*slots.shape, vocabulary)
        for pairs, fused in self._fuse(images, texts, image_indices, text_rows, slots):
            logits = self.network.mlm(fused.flatten(0, 1)).float()
            found[pairs] = logits.softmax(dim=-1).view(*fused.shape[:2], -1).cpu()
        return found

    def _fuse(
        self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of (pair indices int64 [B], fused tokens at the text positions `slots` [B, W, D])."""
        fusion = self.network.backbone.fusion
        whole = self._embedded(images, texts, image_indices, text_rows, fusion.share_image)
        for pairs, image, place, text, is_valid, row in whole:
            output_positions = fusion.text_positions(slots[pairs].to(self.device))
            yield pairs, fusion.fuse_pairs(image, text, is_valid, output_positions, place, row)

    def _embedded(
        self,
        images: ImageTokens,
        texts: EncodedTexts,
        image_indices: Tensor,
        text_rows: Tensor,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Yield batches of pairs: within a group of images, pairs with texts of similar length come together.

        Yields:
            Pair indices int64 [B], embedded images of the group after `share`, index of each pair's image in the group
            int64 [B], the embedded texts of the batch, their validity mask, and the index of each pair's text among
            them int64 [B].
        """
        fusion = self.network.backbone.fusion
        for group, used, place in self.by_image(image_indices, texts.lengths[text_rows]):
            tokens, visible = images.tokens_of(used).to(self.device), images.visible_of(used)
            embedded = fusion.embed_image(tokens, *(() if visible is None else (visible.to(self.device),)))
            embedded = embedded if share is None else share(embedded)
            lengths = texts.lengths[text_rows[group]]
            for part, longest in self._by_length(lengths, self._pairs_at_once(int(lengths.max()))):
                rows, row = torch.unique(text_rows[group[part]], return_inverse=True)
                text, is_valid = texts.tokens[rows, :longest], _is_valid(texts.lengths[rows], longest)
                on_device = (tensor.to(self.device) for tensor in (place[part], text, is_valid, row))
                yield group[part], embedded, *on_device  # type: ignore[misc]

    def _pairs_at_once(self, longest: int) -> int:
        """Return the pairs of a batch: on a CPU so few that what a layer makes of them stays in its caches."""
        if self.device.type != "cpu":
            return self.batch_size
        fusion = self.network.backbone.fusion
        return max(
            1, min(self.batch_size, CACHED_VALUES // ((fusion.num_image_positions + longest) * fusion.mlp_width))
        )

    def by_image(self, image_indices: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield groups of pairs that hold all pairs of their images; images with texts of similar length come together.

        A group has about eight batches, so that sorting by length within it pays. It has at most as many images as a
        batch has pairs, so that the images of a group fit in memory where a batch of pairs does.

        Yields:
            Pair indices int64 [N], the group's images int64 [M], and the index of each pair's image among them int64
            [N].
        """
        count = torch.bincount(image_indices)
        total_length = torch.zeros(len(count)).index_add(0, image_indices, lengths.float())
        n_used = int((count > 0).sum())
        turn = (total_length / count).nan_to_num(torch.inf).argsort(stable=True)  # images without a pair come last
        rank = turn.argsort()[image_indices]  # [N]
        images_at_once = min(self.batch_size, max(1, 8 * self.batch_size * n_used // max(1, len(image_indices))))
        sizes = torch.bincount(rank // images_at_once).tolist()
        for number, pairs in enumerate(torch.split(rank.argsort(stable=True), sizes) if sizes else ()):
            first = number * images_at_once
            yield pairs, turn[first : min(first + images_at_once, n_used)], rank[pairs] - first

    def _by_length(self, lengths: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, int]]:
        """Yield batches of at most `size` indices of similar length, with the longest length of each batch."""
        for rows in torch.split(lengths.argsort(stable=True), size or self.batch_size):
            yield rows, int(lengths[rows[-1]])


def _is_valid(lengths: Tensor, longest: int) -> Tensor:
    return torch.arange(longest) < lengths[:, None]  # [B, longest]


HeatFrom = Literal["fusion", "image_encoder", "occlusion"]
"""Source of a heat map: `grad_cam`, `image_grad_cam` or `occlusion` of `mamo.explain`."""


def heatmaps(
    scorer: Scorer, images: Tensor, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, heat_from: HeatFrom
) -> Tensor:
    """Compute heat maps float32 [N, h, w] of pairs: rows int64 [N] of images uint8 [I, 3, H, W] and of texts."""
    if heat_from == "fusion":
        return scorer.gradcam(scorer.encode_images([images]), texts, image_indices, text_rows)
    how = image_grad_cam if heat_from == "image_encoder" else occlusion
    return scorer.pixel_heatmaps(how, images, texts, image_indices, text_rows)
