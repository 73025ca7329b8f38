"""The MLIM network (Arici et al. 2021): pixels and words in one BERT, and the heads on its tokens.

Legend: B batch, H and W height and width in pixels, P patches in a grid [h, w], L text tokens, D width.
"""

import itertools
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.models.fusion import LAYER_NORM_EPS
from mamo.models.heads import ITMHead, MLMHead
from mamo.models.init import init_like_bert, init_position
from mamo.models.published_text import build_text_tower, refused_sizes, text_config_of
from mamo.models.text_encoder import TextEncoder, load_bert_weights
from mamo.models.text_layouts import BERT_SHAPED
from mamo.models.towers import PixelNormalizer
from mamo.models.vlm import Network
from mamo.tasks.mlim.config import MatchingConfig, MlimConfig

logger = logging.getLogger(__name__)

CHANNELS = 128
"""Of the layers next to the transformer; they halve towards the pixels."""
CHANNELS_MIN = 16
GRID_LAYERS = 3
"""Deconvolutions of the decoder that keep the size, before those that double it."""


class PixelEmbedder(PixelNormalizer):
    """Convolutions whose kernel is their stride, 2: a pixel feeds exactly one embedding, so masking leaks nothing.

    Each of ``layers`` halves the sides, so a patch has ``2**layers`` pixels a side; then a linear layer to the width.
    The paper states 7 layers of about 200 K parameters but not their channels, nor the activation: we let the channels
    double from 16 to 128 and use GELU, 176 K parameters at a width of 1024.

    ``width``, ``grid`` and ``patch_size_px`` are named as those of `ImageTower`; there is no class token.
    """

    num_prefix_tokens = 0

    def __init__(self, layers: int, image_size_px: tuple[int, int], width: int) -> None:
        """Build the network with random weights.

        Raises:
            ValueError: ``2**layers`` does not divide a side of the image.
        """
        super().__init__(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        side = 2**layers
        if any(pixels % side for pixels in image_size_px):
            raise ValueError(
                f"data.image_size_px: {image_size_px[0]}x{image_size_px[1]} px cannot be halved "
                f"model.embedder_layers = {layers} times; choose multiples of {side}"
            )
        self.width = width
        self.patch_size_px = (side, side)
        self.grid = (image_size_px[0] // side, image_size_px[1] // side)
        channels = [3, *(max(CHANNELS >> k, CHANNELS_MIN) for k in reversed(range(layers)))]
        pairs = itertools.pairwise(channels)
        convolutions = [nn.Conv2d(before, after, kernel_size=2, stride=2) for before, after in pairs]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        self.convolutions = nn.ModuleList(convolutions)
        self.project = nn.Linear(channels[-1], width)

    def forward(self, image: Tensor) -> Tensor:
        """Embed each patch of images uint8 or normalised float [B, 3, H, W], row-major -> float [B, P, D]."""
        hidden = self.normalize(image).to(self.project.weight.dtype)
        for convolution in self.convolutions:
            hidden = functional.gelu(convolution(hidden))
        embedded: Tensor = self.project(hidden.flatten(2).transpose(1, 2))
        return embedded


class SingleStream(nn.Module):
    """One BERT over patches, then words. Words enter as in BERT; patches get a position of their own and a norm.

    In either modality a masked element is replaced by the word embedding of [MASK], before its position is added.
    """

    def __init__(self, embedder: PixelEmbedder, text_encoder: TextEncoder, mask_token_id: int) -> None:
        super().__init__()
        assert embedder.width == text_encoder.width
        self.embedder = embedder
        self.text_encoder = text_encoder
        self.mask_token_id = mask_token_id
        self.num_prefix_tokens = embedder.num_prefix_tokens
        self.n_patches = embedder.grid[0] * embedder.grid[1]
        self.image_position = nn.Parameter(torch.empty(1, self.n_patches, embedder.width))
        init_position(self.image_position, embedder.grid, num_prefix_tokens=0)
        self.image_norm = nn.LayerNorm(embedder.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(text_encoder.bert.config.hidden_dropout_prob)

    def position_parameters(self) -> dict[str, int]:
        """See `ImageTower.position_parameters`."""
        return {"image_position": 0}

    def embed_image(self, image: Tensor, is_masked: Tensor | None = None) -> Tensor:
        """Embed images for the image positions of the stream.

        Args:
            image: uint8 or normalised float [B, 3, H, W].
            is_masked: bool [B, P]; None masks nothing.

        Returns:
            float [B, P, D].
        """
        patches = self.embedder(image)
        if is_masked is not None:
            mask = self.text_encoder.word_embeddings.weight[self.mask_token_id]
            patches = torch.where(is_masked.unsqueeze(-1), mask, patches)
        embedded: Tensor = self.dropout(self.image_norm(patches + self.image_position))
        return embedded

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        is_valid: Tensor,
        *,
        is_masked_patch: Tensor | None = None,
        has_image: Tensor | None = None,
        has_text: Tensor | None = None,
    ) -> Tensor:
        """Transform patches and words together.

        Args:
            image: uint8 or normalised float [B, 3, H, W].
            input_ids: int64 [B, L], [CLS] first, masked words replaced already.
            is_valid: bool [B, L], False for padding.
            is_masked_patch: bool [B, P], patches replaced by [MASK].
            has_image, has_text: bool [B], False where a modality is missing: no token attends to it. [CLS], which every
                pair has, stays valid. None for everywhere.

        Returns:
            float [B, P + L, D], patches first. The outputs at missing or padded positions mean nothing.
        """
        tokens = torch.cat([self.embed_image(image, is_masked_patch), self.text_encoder.embed(input_ids)], dim=1)
        return self.text_encoder.transform(tokens, self.is_given(is_valid, has_image, has_text))

    def is_given(self, is_valid: Tensor, has_image: Tensor | None, has_text: Tensor | None) -> Tensor:
        """Return which positions of the stream are present, bool [B, P + L]; arguments as those of `forward`."""
        sees_image = is_valid.new_ones(len(is_valid), self.n_patches)
        if has_image is not None:
            sees_image = sees_image & has_image[:, None]
        if has_text is not None:
            is_cls = torch.arange(is_valid.shape[1], device=is_valid.device) == 0
            is_valid = is_valid & (has_text[:, None] | is_cls)
        return torch.cat([sees_image, is_valid], dim=1)

    def cls(self, tokens: Tensor) -> Tensor:
        """Return the output of [CLS], float [B, D], of the stream's tokens [B, P + L, D]."""
        return tokens[:, self.n_patches]

    def mean(self, tokens: Tensor, is_given: Tensor) -> Tensor:
        """Average the tokens [B, P + L, D] at the positions in bool [B, P + L] -> float [B, D]."""
        weight = is_given.to(tokens.dtype)
        return torch.einsum("bn,bnd->bd", weight / weight.sum(dim=1, keepdim=True), tokens)


class ImageDecoder(nn.Module):
    """Deconvolutions from the patches' outputs on their grid back to pixels, and a sigmoid.

    Three keep the size of the grid, then one for each layer of the embedder doubles it; the last outputs the colours.
    The paper states 10 of them and about 2.8 M parameters, not their sizes: kernels of 3, and of 4 where they double,
    with 128 channels that halve over the last layers make 2.69 M at a width of 1024.
    """

    def __init__(self, width: int, grid: tuple[int, int], doublings: int) -> None:
        super().__init__()
        self.grid = grid
        inputs = [width, *[CHANNELS] * (GRID_LAYERS - 1)]
        keeping = [nn.ConvTranspose2d(before, CHANNELS, 3, padding=1) for before in inputs]
        channels = [CHANNELS, *(min(CHANNELS, CHANNELS_MIN << k) for k in reversed(range(1, doublings))), 3]
        doubling = [
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in itertools.pairwise(channels)
        ]
        self.layers = nn.ModuleList([*keeping, *doubling])
        for layer in (*keeping, *doubling):
            taps = (layer.kernel_size[0] // layer.stride[0]) ** 2  # inputs of one channel that reach an output
            nn.init.normal_(layer.weight, std=(2 / (layer.in_channels * taps)) ** 0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode patch outputs float [B, P, D] to pixels float32 [B, 3, H, W] between 0 and 1."""
        hidden = tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid)  # [B, D, h, w]
        *inner, last = self.layers
        for layer in inner:
            hidden = functional.gelu(layer(hidden))
        pixels: Tensor = last(hidden).float().sigmoid()
        return pixels


class ItemPairHead(nn.Module):
    """Classifies whether two listings show the same item: an MLP on a + b, |a - b| and a * b.

    a and b are the mean outputs of the two listings. The paper does not state how it combines two items. Exchanging
    them changes nothing here. No loss of MLIM's pre-training but the optional ITM reads [CLS], so the means start from
    better features: PR AUC of 72.2 in 400 steps of fine-tuning, against 60.7 with [CLS] (one seed).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(width, 1)
        self.apply(init_like_bert)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute logits float32 [B] of two means, float [B, D] each."""
        joined = torch.cat([a + b, (a - b).abs(), a * b], dim=-1)
        logit: Tensor = self.classifier(functional.gelu(self.norm(self.dense(joined))))
        return logit[:, 0].float()


class Mlim(Network):
    """MLIM's network: the single stream (`backbone`) and heads."""

    backbone: SingleStream
    mlm: MLMHead
    recon: ImageDecoder
    itm: ITMHead
    match: ItemPairHead

    def match_items(
        self, image: Tensor, input_ids: Tensor, is_valid: Tensor, has_image: Tensor, has_text: Tensor
    ) -> Tensor:
        """Compute logits float32 [B] that two listings are of the same item.

        Args:
            image: uint8 or normalised float [B, 2, 3, H, W].
            input_ids, is_valid: int64 and bool [B, 2, L].
            has_image, has_text: bool [B, 2], see `SingleStream.forward`.
        """
        is_valid, has_image, has_text = is_valid.flatten(0, 1), has_image.flatten(), has_text.flatten()
        tokens = self.backbone(
            image.flatten(0, 1), input_ids.flatten(0, 1), is_valid, has_image=has_image, has_text=has_text
        )
        listing = self.backbone.mean(tokens, self.backbone.is_given(is_valid, has_image, has_text))
        a, b = listing.view(len(image), 2, -1).unbind(dim=1)
        logits: Tensor = self.match(a, b)
        return logits


def build_single_stream(config: MlimConfig | MatchingConfig, tokenizer: PreTrainedTokenizerFast) -> SingleStream:
    """Build MLIM's network without heads, initialised from `seed`."""
    torch.manual_seed(config.seed)
    published = text_config_of(config, len(tokenizer), tokenizer.pad_token_id)
    with refused_sizes(config.model.text_source):
        text_encoder = build_text_tower(published, config.model.text.layers)
    if not isinstance(text_encoder, TextEncoder):
        raise ValueError(
            f"model.text.bert: {config.model.text.bert} has other layers than a BERT, which MLIM's stream is; name a "
            f"{', '.join(BERT_SHAPED)}"
        )
    embedder = PixelEmbedder(config.model.embedder_layers, config.data.image_size, text_encoder.width)
    return SingleStream(embedder, text_encoder, tokenizer.mask_token_id)


def load_published_single_stream(config: MlimConfig | MatchingConfig, network: Mlim) -> None:
    """Load the weights of the BERT that `model.text` names, if any, into an MLIM."""
    text = config.model.text
    if text.weights == "bert" and text.bert is not None:
        report = load_bert_weights(network.backbone.text_encoder, None, text.bert, network.get_head("mlm"))
        logger.info("single stream from %s: %s", text.bert, report)
