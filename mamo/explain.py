"""Heat maps: the patches that make a network match a text with an image.

Grad-CAM (Selvaraju et al. 2017) on attention weights instead of activations, as in ALBEF (Li et al. 2021): a weight
counts where raising it raises the matching score. The fusion's weights are those of its self-attention, or of its
cross-attention (ALBEF's way) where it has one.

Legend: B batch, L text tokens, P patches in a grid [h, w], S image tokens, D width, A heads.
"""

import copy
from typing import Literal

import torch
from torch import Tensor

from mamo.models.fusion import FusionEncoder
from mamo.models.heads import ITMHead
from mamo.models.towers import ImageTower
from mamo.models.vlm import Backbone

ItmScore = Literal["difference", "match"]
"""`difference`: match minus mismatch logit, the logit of the match's probability; `match`: ALBEF's, the match logit."""


def score_of(logits: Tensor, rule: ItmScore) -> Tensor:
    """Return the ITM score [B] of logits [B, 2] of (mismatch, match)."""
    return logits[:, 1] if rule == "match" else logits[:, 1] - logits[:, 0]


def default_layer(fusion: FusionEncoder) -> int:
    """Return the layer that `grad_cam` reads by default: the third of six, as in ALBEF's protocol.

    The last layer serves only [CLS].
    """
    return (len(fusion.layers) - 1) // 2


def grad_cam(
    fusion: FusionEncoder,
    itm: ITMHead,
    image: Tensor,
    text: Tensor,
    text_is_valid: Tensor,
    layer: int | None = None,
    rule: ItmScore = "difference",
) -> Tensor:
    """Compute the heat of each patch for the statement that text and image match.

    The weights with which text tokens attend to patches in one layer are multiplied by the gradient of the ITM score,
    cut at 0, and averaged over heads and valid text tokens, [CLS] and [SEP] included.

    Args:
        fusion, itm: of one network, in eval mode; their parameters get no gradient.
        image: from the fusion's `embed_image`, [B, ...].
        text: float [B, L, D], from the fusion's `embed_text`.
        text_is_valid: bool [B, L], False for padding.
        layer: index of a fusion layer, from 0; None is `default_layer`.
        rule: the ITM score that is explained.

    Returns:
        float32 [B, h, w], not negative.

    Raises:
        ValueError: there is no such layer, or the fusion records no attention.
    """
    layer = default_layer(fusion) if layer is None else layer
    if not 0 <= layer < len(fusion.layers):
        raise ValueError(f"grad_cam: layer {layer} is not one of the fusion's 0 to {len(fusion.layers) - 1}")
    with torch.inference_mode(False), torch.enable_grad():
        image, text, text_is_valid = (value.detach().clone() for value in (image, text, text_is_valid))
        cls, weights, words_to_patches = fusion.fuse_with_weights(image, text, text_is_valid, layer)
        logits = itm(cls)  # [B, 2]
        (gradient,) = torch.autograd.grad(score_of(logits, rule).sum(), weights)
    heat = (weights * gradient).detach().float()[words_to_patches].clamp(min=0)  # [B, A, L, P]
    by_token = heat.mean(dim=1) * text_is_valid[:, :, None]  # [B, L, P]
    by_patch = by_token.sum(dim=1) / text_is_valid.sum(dim=1, keepdim=True)
    return by_patch.view(-1, *fusion.grid)


def image_grad_cam(
    backbone: Backbone,
    itm: ITMHead,
    pixels: Tensor,
    text: Tensor,
    text_is_valid: Tensor,
    rule: ItmScore = "difference",
) -> Tensor:
    """Compute the heat of each patch as `grad_cam`, from the attention of the image encoder instead of the fusion.

    An image encoder mixes its patches: the fusion's input at a patch may come from other places, and much of it comes
    from the class token, which has no place. Here the weights with which image tokens attend to a patch are multiplied
    by the gradient of the ITM score, cut at 0, averaged over heads, and summed over attending tokens and layers. They
    show the places that the encoder took the evidence of the match from.

    Args:
        backbone, itm: of one network, in eval mode; their parameters get no gradient.
        pixels: uint8 or normalised float [B, 3, H, W].
        text: float [B, L, D], from the fusion's `embed_text`.
        text_is_valid: bool [B, L], False for padding.
        rule: the ITM score that is explained.

    Returns:
        float32 [B, h, w], not negative.

    Raises:
        ValueError: the image encoder records no attention.
    """
    encoder = backbone.image_encoder
    tensors = (*encoder.parameters(), *encoder.buffers())
    encoder = copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})  # other threads encode meanwhile
    with torch.inference_mode(False), torch.enable_grad(), encoder.recording_attention() as weights:
        pixels, text, text_is_valid = (value.detach().clone() for value in (pixels, text, text_is_valid))
        pixels = encoder.normalize(pixels).requires_grad_()  # so that the weights depend on a leaf
        logits = _match_logits(encoder, backbone.fusion, itm, pixels, text, text_is_valid)
        gradients = torch.autograd.grad(score_of(logits, rule).sum(), weights)
    layers = [
        (w * g).detach().float().clamp(min=0).mean(dim=1).sum(dim=1) for w, g in zip(weights, gradients)
    ]  # [B, S]
    first = encoder.num_prefix_tokens + encoder.num_registers
    return torch.stack(layers).sum(dim=0)[:, first:].view(-1, *encoder.grid)


def occlusion(
    backbone: Backbone,
    itm: ITMHead,
    pixels: Tensor,
    text: Tensor,
    text_is_valid: Tensor,
    radius: int = 1,
    rule: ItmScore = "difference",
) -> Tensor:
    """Compute the heat of each patch as the score lost when it and its neighbours are painted over.

    Occlusion (Zeiler and Fergus 2014) needs no gradient and no access to the layers. Its P forward passes measure the
    effect that Grad-CAM approximates.

    Args:
        backbone, itm, text, text_is_valid, rule: as `image_grad_cam`.
        pixels: uint8 or normalised float [B, 3, H, W].
        radius: neighbours in each direction; 1 hides 3 x 3 patches behind the image's median colour.

    Returns:
        float32 [B, h, w], the loss of the ITM score, cut at 0.
    """
    encoder = backbone.image_encoder
    (h, w), (patch_h, patch_w) = encoder.grid, encoder.patch_size_px
    colour = pixels.flatten(2).median(dim=2).values[:, :, None, None]  # [B, 3, 1, 1]

    def score(image: Tensor) -> Tensor:
        return score_of(_match_logits(encoder, backbone.fusion, itm, image, text, text_is_valid), rule)

    whole, heat = score(pixels), torch.empty(len(text), h, w)
    for row in range(h):
        for column in range(w):
            painted = pixels.clone()
            rows = slice(max(0, row - radius) * patch_h, (row + radius + 1) * patch_h)
            columns = slice(max(0, column - radius) * patch_w, (column + radius + 1) * patch_w)
            painted[:, :, rows, columns] = colour
            heat[:, row, column] = (whole - score(painted)).float().cpu()
    return heat.clamp(min=0)


def _match_logits(
    encoder: ImageTower, fusion: FusionEncoder, itm: ITMHead, pixels: Tensor, text: Tensor, text_is_valid: Tensor
) -> Tensor:
    """Compute the logits [B, 2] of (mismatch, match), with ``text`` from the fusion's `embed_text`."""
    image = fusion.embed_image(encoder(pixels))
    cls = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=text.device))
    logits: Tensor = itm(fusion.fuse(image, text, text_is_valid, cls)[:, 0])
    return logits
