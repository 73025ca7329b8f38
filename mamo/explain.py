"""Heat maps: which patches make a network say that a text matches an image.

With concatenated fusion it reads how text tokens attend to patches in the self-attention, with cross-attention fusion
(ALBEF's own way) the cross-attention.

Selvaraju et al. (2017), on attention weights instead of activations as in ALBEF (Li et al. 2021): a weight counts where
a rise of it would raise the matching score.

Legend: B batch, L text tokens, P patches in a grid [h, w], S all fused tokens, N image tokens, D width, A heads.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mamo.models.cross_fusion import CrossFusion, CrossLayer
from mamo.models.fusion import Fusion, FusionLayer
from mamo.models.heads import ITMHead
from mamo.models.vlm import Backbone


def default_layer(fusion: Fusion | CrossFusion) -> int:
    """The layer to read if none is named: of six the third, as ALBEF's protocol; the last one serves [CLS] alone."""
    return (len(fusion.layers) - 1) // 2


def grad_cam(
    fusion: Fusion | CrossFusion,
    itm: ITMHead,
    image: Tensor,
    text: Tensor,
    text_is_valid: Tensor,
    layer: int | None = None,
) -> Tensor:
    """Heat of each patch for the statement that text and image match.

    The weights with which text tokens attend to patches in one layer, each times its gradient of (match logit minus
    mismatch logit), cut at 0; the mean over heads and valid text tokens, [CLS] and [SEP] included.

    Args:
        fusion, itm: of one network, in eval mode; their parameters get no gradient.
        image: from the fusion's `embed_image`: float [B, num_prefix_tokens + P, D], or of cross-attention fusion the keys and
            values.
        text: float [B, L, D], from the fusion's `embed_text`.
        text_is_valid: bool [B, L], False for padding.
        layer: which fusion layer, from 0; None is `default_layer`.

    Returns:
        float32 [B, h, w], not negative.

    Raises:
        ValueError: there is no such layer.
    """
    layer = default_layer(fusion) if layer is None else layer
    if not 0 <= layer < len(fusion.layers):
        raise ValueError(f"grad_cam: layer {layer} is not one of the fusion's 0 to {len(fusion.layers) - 1}")
    with torch.inference_mode(False), torch.enable_grad():
        image, text, text_is_valid = (value.detach().clone() for value in (image, text, text_is_valid))
        if isinstance(fusion, CrossFusion):
            cls, weights, words_to_patches = cross_with_weights(fusion, image, text, text_is_valid, layer)
        else:
            cls, weights, words_to_patches = concat_with_weights(fusion, image, text, text_is_valid, layer)
        logits = itm(cls)  # [B, 2]
        (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), weights)
    heat = (weights * gradient).detach().float()[words_to_patches].clamp(min=0)  # [B, A, L, P]
    by_token = heat.mean(dim=1) * text_is_valid[:, :, None]  # [B, L, P]
    by_patch = by_token.sum(dim=1) / text_is_valid.sum(dim=1, keepdim=True)
    return by_patch.view(-1, *fusion.grid)


def image_grad_cam(backbone: Backbone, itm: ITMHead, pixels: Tensor, text: Tensor, text_is_valid: Tensor) -> Tensor:
    """Heat of each patch as `grad_cam`, read in the image encoder instead of the fusion.

    An image encoder mixes its patches: what fusion reads at a patch need not have stood there, and much of it is read
    from the class token, which stands nowhere. Here the weights with which the tokens of the image attend to a patch,
    each times its gradient of (match logit minus mismatch logit), cut at 0, are averaged over heads and summed over
    attending tokens and layers: from where the encoder fetched what made the match.

    Args:
        backbone, itm: of one network, in eval mode; their parameters get no gradient.
        pixels: float [B, 3, H, W], normalised.
        text: float [B, L, D], from the fusion's `embed_text`.
        text_is_valid: bool [B, L], False for padding.

    Returns:
        float32 [B, h, w], not negative.
    """
    encoder, fusion = backbone.image_encoder, backbone.fusion
    with torch.inference_mode(False), torch.enable_grad(), encoder.recording_attention() as weights:
        pixels, text, text_is_valid = (value.detach().clone() for value in (pixels, text, text_is_valid))
        embedded = encoder.embed(pixels).detach().requires_grad_()
        slots = fusion.embed_image(encoder.encode(embedded))
        cls = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=text.device))
        logits = itm(fusion.fuse(slots, text, text_is_valid, cls)[:, 0])
        gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), weights)
    layers = [
        (w * g).detach().float().clamp(min=0).mean(dim=1).sum(dim=1) for w, g in zip(weights, gradients)
    ]  # [B, S]
    return torch.stack(layers).sum(dim=0)[:, encoder.num_prefix_tokens :].view(-1, *fusion.grid)


def occlusion(
    backbone: Backbone, itm: ITMHead, pixels: Tensor, text: Tensor, text_is_valid: Tensor, radius: int = 1
) -> Tensor:
    """Heat of each patch: how much the match suffers where it and its neighbours are painted over (Zeiler and Fergus
    2014). No gradient, nothing of the network's inside: P forward passes, the truth that Grad-CAM approximates.

    Args:
        backbone, itm, pixels, text, text_is_valid: as `image_grad_cam`.
        radius: neighbours in each direction; 1 hides 3 x 3 patches, by the image's median colour.

    Returns:
        float32 [B, h, w], (match logit minus mismatch logit) lost, cut at 0.
    """
    encoder, fusion = backbone.image_encoder, backbone.fusion
    cls = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=text.device))

    def score(tokens: Tensor) -> Tensor:
        logits: Tensor = itm(fusion.fuse(fusion.embed_image(encoder.encode(tokens)), text, text_is_valid, cls)[:, 0])
        return logits[:, 1] - logits[:, 0]

    (h, w), num_prefix_tokens = fusion.grid, encoder.num_prefix_tokens
    painted = pixels.flatten(2).median(dim=2).values[:, :, None, None].expand_as(pixels)
    embedded, hidden = encoder.embed(pixels), encoder.embed(painted)
    whole, heat = score(embedded), torch.empty(len(text), h, w)
    for row in range(h):
        for column in range(w):
            is_hidden = torch.zeros(h, w, dtype=torch.bool, device=text.device)
            is_hidden[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = True
            at = functional.pad(is_hidden.flatten(), (num_prefix_tokens, 0))[None, :, None]
            heat[:, row, column] = (whole - score(torch.where(at, hidden, embedded))).float().cpu()
    return heat.clamp(min=0)


Slices = tuple[slice, slice, slice, slice]


def concat_with_weights(
    fusion: Fusion, image: Tensor, text: Tensor, text_is_valid: Tensor, layer: int
) -> tuple[Tensor, Tensor, Slices]:
    """Fused [CLS] [B, D], a layer's weights [B, A, S, S] that it depends on, where text looks at patches in them."""
    tokens, is_valid = fusion.join(image, text, text_is_valid)
    weights = torch.empty(0)
    for index, module in enumerate(fusion.layers):
        assert isinstance(module, FusionLayer)
        if index == layer:
            tokens, weights = with_weights(module, tokens, is_valid)
        else:
            tokens = module(tokens, is_valid)
    first, everything = fusion.num_image_positions, slice(None)
    return (
        tokens[:, first],
        weights,
        (everything, everything, slice(first, None), slice(fusion.num_prefix_tokens, first)),
    )


def cross_with_weights(
    fusion: CrossFusion, image: Tensor, text: Tensor, text_is_valid: Tensor, layer: int
) -> tuple[Tensor, Tensor, Slices]:
    """The same of a cross-attention: fused [CLS] [B, D], weights [B, A, L, N], where text looks at patches in them."""
    tokens, weights = text, torch.empty(0)
    for index, module in enumerate(fusion.layers):
        assert isinstance(module, CrossLayer)
        if index > 0:
            tokens = module.attend_text(tokens, text_is_valid)
        if index == layer:
            key, value = image[:, index].unbind(1)
            weights = explicit_weights(module.image_query(tokens), key)
            tokens = module.finish_image(tokens, weights @ value)
        else:
            tokens = module.attend_image(tokens, image[:, index])
    everything = slice(None)
    return tokens[:, 0], weights, (everything, everything, everything, slice(fusion.num_prefix_tokens, None))


def with_weights(layer: FusionLayer, tokens: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """`layer(tokens, is_valid)` and its attention weights [B, A, S, S], which the result depends on."""
    query, key, value = layer.project(tokens, tokens)
    weights = explicit_weights(query, key, is_valid[:, None, None, :])
    return layer.finish(tokens, weights @ value), weights


def explicit_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) of arguments as `mamo.models.attention.attention` takes them.

    The weights are a leaf's child even where nothing else asks for a gradient.
    """
    score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    weights: Tensor = score.softmax(dim=-1)
    if not weights.requires_grad:
        weights.requires_grad_()
    return weights
