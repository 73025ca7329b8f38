"""What a network says of images and texts: features, matching scores of pairs, masked words.

Each text is encoded once, and its tokens wait in main memory for the pairs that need them. Those of images wait too
(`EncodedImages`) or are made again when their pairs come (`ReencodedImages`), a few images at a time however large the
gallery. Pairs are taken image by image, so that what fusion makes of an image alone is made once for all its texts. The
caller chooses the precision through the weights; similarities and matching logits are fp32, since coarse scores would
tie.

Legend: I images, T texts, L text tokens, P patches in a grid [h, w], D width, N pairs, W masked tokens of a text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mamo.evaluation.predictor import Predictor
from mamo.explain import grad_cam, image_grad_cam, occlusion
from mamo.models.fusion import index_rows
from mamo.models.heads import ITMHead
from mamo.models.vlm import Backbone, Mamo


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Within the block the network is in eval mode and nothing asks for gradients; then each module's mode is back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class ImageTokens(Protocol):
    """Images as scoring pairs reads them: a group at a time, each image in one group."""

    @property
    def feature(self) -> Tensor:
        """For ITC: fp32 [I, D_itc] on the device."""
        ...

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Encoded tokens of images, rows int64 [M] -> float [M, num_prefix_tokens + P, D_image] in main memory."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """`tokens` float [I, num_prefix_tokens + P, D_image] in main memory, encoded; `feature` fp32 [I, D_itc] on the device."""

    tokens: Tensor
    feature: Tensor

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Those of images, rows int64 [M]."""
        return self.tokens[rows]


@dataclass(frozen=True, slots=True)
class ReencodedImages:
    """Images of which the features alone, fp32 [I, D_itc] on the device, are in memory.

    Tokens take hundreds of times their place: ViT-B/16 at 384 px has 1.8 MB of them an image, against 1 KB.
    """

    feature: Tensor
    files: Sequence[Any]
    encode: Callable[[Sequence[Any]], EncodedImages]

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Encode images again, rows int64 [M] -> float [M, num_prefix_tokens + P, D_image]."""
        return self.encode([self.files[row] for row in rows.tolist()]).tokens


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """`tokens` float [T, L, D], `lengths` int64 [T] in main memory; `feature` fp32 [T, D_itc] on the device.

    The tokens are those of the fusion's `embed_text`.
    """

    tokens: Tensor
    lengths: Tensor
    feature: Tensor


class MaskedWordPredictor(Protocol):
    """What filling in masked words asks of a scorer; images and texts are as it encodes them."""

    tokenizer: Any
    text_max_tokens: int

    def encode_texts(self, input_ids: Tensor, lengths: Tensor) -> Any:
        """Encode token ids int64 [T, L], of which the first `lengths` int64 [T] are real."""
        ...

    def fill(self, images: Any, texts: Any, image_indices: Tensor, text_rows: Tensor, slots: Tensor) -> Tensor:
        """The likeliest token at text positions `slots` int64 [N, W] of pairs -> int64 [N, W] in main memory."""
        ...


class Scorer:
    """A network in evaluation, with what it needs to read pixels and words."""

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self.network: Mamo = predictor.network
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
        """Texts -> (input_ids int64 [T, L], lengths int64 [T]), cut to `text_max_tokens`."""
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.text_max_tokens)
        return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]).sum(dim=1)

    def encode_texts(self, input_ids: Tensor, lengths: Tensor) -> EncodedTexts:
        """Encode token ids int64 [T, L], of which the first `lengths` int64 [T] are real; similar lengths together."""
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

    def similarity(
        self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor
    ) -> Tensor:
        """ITC similarity of pairs, rows int64 [N] each -> float32 [N] in main memory."""
        image = images.feature[image_indices.to(self.device)]
        return (image * texts.feature[text_rows.to(self.device)]).sum(dim=1).cpu()

    def match(self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor) -> Tensor:
        """ITM score of pairs, rows int64 [N] each -> match logit minus mismatch logit, float32 [N] in main memory."""
        score = torch.empty(len(image_indices))
        cls = torch.zeros(len(image_indices), 1, dtype=torch.int64)
        for pairs, fused in self._fuse(images, texts, image_indices, text_rows, cls):
            logits = self.network.itm(fused[:, 0])  # [B, 2]
            score[pairs] = (logits[:, 1] - logits[:, 0]).cpu()
        return score

    def ground(self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor) -> Tensor:
        """Grad-CAM heat of pairs, rows int64 [N] each -> float32 [N, h, w] over the patches, in main memory."""
        fusion, itm = self.network.backbone.fusion, self.network.itm
        heat = torch.empty(len(image_indices), *fusion.grid)
        for pairs, image, place, text, is_valid in self._embedded(images, texts, image_indices, text_rows):
            heat[pairs] = grad_cam(fusion, itm, index_rows(image, place), text, is_valid).cpu()
        return heat

    def ground_pixels(
        self,
        how: Callable[[Backbone, ITMHead, Tensor, Tensor, Tensor], Tensor],
        image: Tensor,
        texts: EncodedTexts,
        image_indices: Tensor,
        text_rows: Tensor,
    ) -> Tensor:
        """Heat of pairs, images uint8 [I, 3, H, W] and texts, by `image_grad_cam` or `occlusion`, float32 [N, h, w]."""
        backbone, itm = self.network.backbone, self.network.itm
        heat = torch.empty(len(image_indices), *backbone.fusion.grid)
        for pairs, longest in self._by_length(texts.lengths[text_rows]):
            rows = text_rows[pairs]
            pixels = backbone.image_encoder.normalize(image[image_indices[pairs]].to(self.device))
            is_valid = _is_valid(texts.lengths[rows], longest).to(self.device)
            text = texts.tokens[rows, :longest].to(self.device)
            heat[pairs] = how(backbone, itm, pixels, text, is_valid).cpu()
        return heat

    def fill(
        self, images: EncodedImages, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Tensor:
        """The likeliest token at text positions `slots` int64 [N, W] of pairs -> int64 [N, W] in main memory."""
        tokens = torch.empty_like(slots)
        for pairs, fused in self._fuse(images, texts, image_indices, text_rows, slots):
            logits = self.network.mlm(fused.flatten(0, 1))  # [B * W, V]
            tokens[pairs] = logits.argmax(dim=-1).view(fused.shape[:2]).cpu()
        return tokens

    def _fuse(
        self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (pair numbers int64 [B], fused tokens at the text positions `slots` [B, W, D])."""
        fusion = self.network.backbone.fusion
        for pairs, image, place, text, is_valid in self._embedded(images, texts, image_indices, text_rows):
            output_positions = fusion.text_positions(slots[pairs].to(self.device))
            yield pairs, fusion.fuse(image, text, is_valid, output_positions, image_indices=place)

    def _embedded(
        self, images: ImageTokens, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Batches of (pair numbers int64 [B], embedded images of their group, and of these pairs: the place of the
        image in the group int64 [B], embedded texts, their validity).

        Within a group of images, pairs with texts of similar length come together.
        """
        fusion = self.network.backbone.fusion
        for group, used, place in self.by_image(image_indices, texts.lengths[text_rows]):
            embedded = fusion.embed_image(images.tokens_of(used).to(self.device))
            for part, longest in self._by_length(texts.lengths[text_rows[group]]):
                rows = text_rows[group[part]]
                text, is_valid = texts.tokens[rows, :longest], _is_valid(texts.lengths[rows], longest)
                where = place[part].to(self.device)
                yield group[part], embedded, where, text.to(self.device), is_valid.to(self.device)

    def by_image(self, image_indices: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Groups of pairs that hold all pairs of their images; images with texts of similar length come together.

        About eight batches a group, so that sorting by length within it pays, and no more images than a batch has
        pairs, so that the group's images fit where a batch of pairs does.

        Returns:
            For each group: pair numbers int64 [N], its images int64 [M], and the place of each pair's image among them.
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

    def _by_length(self, lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Batches of indices of similar length, and the longest of each."""
        for rows in torch.split(lengths.argsort(stable=True), self.batch_size):
            yield rows, int(lengths[rows[-1]])


def _is_valid(lengths: Tensor, longest: int) -> Tensor:
    return torch.arange(longest) < lengths[:, None]  # [B, longest]


HeatFrom = Literal["fusion", "image_encoder", "occlusion"]
"""Where heat is read: `grad_cam`, `image_grad_cam` or `occlusion` of `mamo.explain`."""


def heatmaps(
    scorer: Scorer, images: Tensor, texts: EncodedTexts, image_indices: Tensor, text_rows: Tensor, heat_from: HeatFrom
) -> Tensor:
    """Heat float32 [N, h, w] of pairs of rows int64 [N] of images uint8 [I, 3, H, W] and of texts."""
    if heat_from == "fusion":
        return scorer.ground(scorer.encode_images([images]), texts, image_indices, text_rows)
    how = image_grad_cam if heat_from == "image_encoder" else occlusion
    return scorer.ground_pixels(how, images, texts, image_indices, text_rows)
