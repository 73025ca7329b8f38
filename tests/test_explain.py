"""Grad-CAM: the explicit attention is the fused one, and a network that looks at one patch is caught looking there."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from mamo.explain import default_layer, grad_cam, image_grad_cam, occlusion
from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion
from mamo.models.heads import ITMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone

D, GRID, L = 16, (2, 3), 5


def make(layers: int = 2) -> tuple[Fusion, ITMHead]:
    torch.manual_seed(0)
    fusion = Fusion(D, layers, 4, 24, image_width=D, grid=GRID, num_prefix_tokens=1, text_width=D)
    itm = ITMHead(D)
    for parameter in [*fusion.parameters(), *itm.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    return fusion.eval(), itm.eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    is_valid = torch.arange(L) < torch.tensor([5, 3, 2])[:batch, None]
    return torch.randn(batch, 7, D), torch.randn(batch, L, D), is_valid


def test_explicit_attention_equals_the_fused() -> None:
    """Bug: Grad-CAM explains a slightly different network (another scale, another mask) from the one that scores."""
    fusion, _ = make()
    tokens, is_valid = fusion.join(*inputs())
    found, weights = fusion.layers[0].forward_with_weights(tokens, is_valid)
    torch.testing.assert_close(found, fusion.layers[0](tokens, is_valid), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4, 7 + L))


@pytest.mark.parametrize("layer", [0, 1])
def test_heat_equals_finite_differences(layer: int) -> None:
    """Bug: the gradient of the wrong class, of the sum over the batch mixed up, or of another layer's weights."""
    fusion, itm = (module.double() for module in make())
    image, text, is_valid = (value.double() if value.is_floating_point() else value for value in inputs())
    heat = grad_cam(fusion, itm, image, text, is_valid, layer)

    def score_with(change: Tensor) -> tuple[Tensor, Tensor]:
        tokens, valid = fusion.join(image, text, is_valid)
        original = torch.empty(0)
        for index, module in enumerate(fusion.layers):
            if index == layer:
                _, original = module.forward_with_weights(tokens, valid)
                value = module.project(tokens, tokens)[2]
                tokens = module.output_and_mlp(tokens, (original + change) @ value)
            else:
                tokens = module(tokens, valid)
        logits = itm(tokens[:, 7])
        return logits[:, 1] - logits[:, 0], original.detach()

    with torch.no_grad():
        expected = torch.zeros(3, 6)
        for head in range(4):
            for word in range(L):
                for patch in range(6):
                    change = torch.zeros(3, 4, 7 + L, 7 + L, dtype=torch.double)
                    change[:, head, 7 + word, 1 + patch] = 1e-5
                    slope = (score_with(change)[0] - score_with(-change)[0]) / 2e-5
                    weight = score_with(change)[1][:, head, 7 + word, 1 + patch]
                    expected[:, patch] += ((weight * slope).clamp(min=0) * is_valid[:, word] / 4).float()
        expected /= is_valid.sum(dim=1, keepdim=True)
    assert heat.abs().max() > 1e-4
    torch.testing.assert_close(heat.flatten(1), expected, atol=1e-6, rtol=1e-4)


def test_a_network_that_reads_one_patch() -> None:
    """Bug: rows for columns in the grid, the class token counted as a patch, text for image."""
    fusion, itm = make(layers=1)
    image, text, is_valid = inputs(2)
    with torch.no_grad():
        for parameter in fusion.layers[0].parameters():
            parameter.zero_()
        layer = fusion.layers[0]
        layer.norm1.weight.fill_(1)
        layer.norm2.weight.fill_(1)
        layer.qkv.weight[2 * D :] = torch.eye(D)  # every token sees the mean of all tokens
        layer.out.weight.copy_(torch.eye(D))
        itm.classifier.weight.zero_()
        itm.classifier.weight[1, 3] = 1  # a match is what carries dimension 3
        image[:, :, 3], text[:, :, 3] = 0, 0
        image[0, 1 + 4, 3], image[1, 1 + 2, 3] = 9, 9  # patches (1, 1) and (0, 2)
    heat = grad_cam(fusion, itm, image, text, is_valid)
    assert heat.shape == (2, *GRID)
    assert [divmod(int(one.argmax()), GRID[1]) for one in heat] == [(1, 1), (0, 2)]


@pytest.mark.parametrize("layer", [0, 1])
def test_heat_of_cross_attention_equals_finite_differences(layer: int) -> None:
    """Bug: self-attention is read for cross-attention, the class token for a patch, another layer's gradient."""
    torch.manual_seed(0)
    fusion, itm = CrossFusion(D, 2, 4, 24, image_width=D, grid=GRID, num_prefix_tokens=1), ITMHead(D)
    for parameter in [*fusion.parameters(), *itm.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    fusion, itm = fusion.double().eval(), itm.double()
    raw, text, is_valid = inputs()
    image, text = fusion.embed_image(raw.double()), fusion.embed_text(text.double(), is_valid)
    heat = grad_cam(fusion, itm, image, text, is_valid, layer)

    def score_with(change: Tensor) -> tuple[Tensor, Tensor]:
        tokens, original = text, torch.empty(0)
        for index, module in enumerate(fusion.layers):
            tokens = module.attend_text(tokens, is_valid) if index else tokens
            key, value = image[:, 2 * index], image[:, 2 * index + 1]
            weights = (module.image_query(tokens) @ key.transpose(-1, -2) / (D // 4) ** 0.5).softmax(dim=-1)
            if index == layer:
                original, weights = weights, weights + change
            tokens = module.cross_output_and_mlp(tokens, weights @ value)
        logits = itm(tokens[:, 0])
        return logits[:, 1] - logits[:, 0], original

    with torch.no_grad():
        assert torch.allclose(score_with(torch.zeros(1))[0], score_of(fusion, itm, image, text, is_valid))
        expected = torch.zeros(3, 6)
        for head in range(4):
            for word in range(L):
                for patch in range(6):
                    change = torch.zeros(3, 4, L, 7, dtype=torch.double)
                    change[:, head, word, 1 + patch] = 1e-5
                    slope = (score_with(change)[0] - score_with(-change)[0]) / 2e-5
                    weight = score_with(change)[1][:, head, word, 1 + patch]
                    expected[:, patch] += ((weight * slope).clamp(min=0) * is_valid[:, word] / 4).float()
        expected /= is_valid.sum(dim=1, keepdim=True)
    assert heat.abs().max() > 1e-4
    torch.testing.assert_close(heat.flatten(1), expected, atol=1e-6, rtol=1e-4)


def score_of(fusion: CrossFusion, itm: ITMHead, image: Tensor, text: Tensor, is_valid: Tensor) -> Tensor:
    logits = itm(fusion.fuse(image, text, is_valid)[:, 0])
    return logits[:, 1] - logits[:, 0]


def test_padding_and_frozen_networks() -> None:
    """Bug: a text's heat depends on how far it was padded, or a frozen network in inference mode has none."""
    fusion, itm = make()
    image, text, is_valid = inputs()
    heat = grad_cam(fusion, itm, image, text, is_valid)
    torch.testing.assert_close(grad_cam(fusion, itm, image[2:], text[2:, :2], is_valid[2:, :2]), heat[2:])
    fusion.requires_grad_(False)
    itm.requires_grad_(False)
    with torch.inference_mode():
        torch.testing.assert_close(grad_cam(fusion, itm, *inputs()), heat)


def test_layers() -> None:
    """Bug: the default reads the last layer, of which ITM uses [CLS] alone."""
    assert [default_layer(make(layers)[0]) for layers in (1, 2, 3, 6)] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="layer 2 is not one of the fusion's 0 to 1"):
        grad_cam(*make(), *inputs(), layer=2)


def whole() -> tuple[Backbone, ITMHead]:
    """A backbone of two image layers, with weights large enough to be seen."""
    fusion, itm = make(1)
    image = ImageEncoder("vit_tiny_patch16_224", (16, 24), patch_size_px=8, width=D, depth=2, heads=2)
    config = BertConfig(vocab_size=9, hidden_size=D, num_attention_heads=2, intermediate_size=16)
    backbone = Backbone(image, TextEncoder(config, 1), fusion, 4)
    for parameter in image.vit.blocks.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone.double().eval(), itm.double()


def test_recorded_attention_equals_the_fused() -> None:
    """Bug: the encoder that is explained is not the one that scores; hooks or slow attention are left behind."""
    backbone, _ = whole()
    encoder, pixels = backbone.image_encoder, torch.randn(3, 3, 16, 24, dtype=torch.float64)
    encoder.use_fused_attention(True)
    expected = encoder(pixels)
    with encoder.recording_attention() as weights:
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)
    assert [tuple(w.shape) for w in weights] == [(3, 2, 7, 7)] * 2
    torch.testing.assert_close(weights[1].sum(dim=-1), torch.ones(3, 2, 7, dtype=torch.float64))
    encoder(pixels)
    assert len(weights) == 2
    assert all(block.attn.fused_attn for block in encoder.vit.blocks)


def test_image_heat_equals_finite_differences() -> None:
    """Bug: the gradient of other weights, a layer left out, the class token among the patches, negative parts kept."""
    backbone, itm = whole()
    encoder, fusion = backbone.image_encoder, backbone.fusion
    pixels, (_, text, is_valid) = torch.randn(3, 3, 16, 24, dtype=torch.float64), inputs()
    text = text.double()
    with torch.inference_mode():  # as an evaluation calls it
        heat = image_grad_cam(backbone, itm, pixels, fusion.embed_text(text, is_valid), is_valid)

    def score() -> Tensor:
        logits = itm(fusion(fusion.embed_image(encoder(pixels)), text, is_valid)[:, fusion.num_image_positions])
        return logits[:, 1] - logits[:, 0]

    expected = torch.zeros(3, 6, dtype=torch.float64)
    with torch.no_grad(), encoder.recording_attention() as weights:
        before = score()
        for layer in range(2):
            for head in range(2):
                for query in range(7):
                    for patch in range(6):
                        change = torch.zeros(7, 7, dtype=torch.float64)
                        change[query, 1 + patch] = 1e-6
                        added = torch.zeros(2, 7, 7, dtype=torch.float64)
                        added[head] = change
                        drop = encoder.vit.blocks[layer].attn.attn_drop
                        hook = drop.register_forward_hook(lambda _, __, output, added=added: output + added)
                        slope = (score() - before) / 1e-6
                        hook.remove()
                        expected[:, patch] += (weights[layer][:, head, query, 1 + patch] * slope).clamp(min=0) / 2
    torch.testing.assert_close(heat, expected.view(3, *GRID).float(), atol=1e-4, rtol=1e-3)
    assert heat.min() >= 0
    assert heat.max() > 1e-3


def test_occlusion_by_painting_pixels() -> None:
    """Bug: neighbours on the other side of the grid are hidden, the class token too, or gains count as losses."""
    backbone, itm = whole()
    encoder, fusion = backbone.image_encoder, backbone.fusion
    pixels, (_, text, is_valid) = torch.randn(3, 3, 16, 24, dtype=torch.float64), inputs()
    text = text.double()

    def score(image: Tensor) -> Tensor:
        logits = itm(fusion.fuse(fusion.embed_image(encoder(image)), text, is_valid)[:, fusion.num_image_positions])
        return logits[:, 1] - logits[:, 0]

    with torch.no_grad():
        for radius in (0, 1):
            heat = occlusion(backbone, itm, pixels, text, is_valid, radius)
            for row in range(2):
                for column in range(3):
                    image = pixels.clone()
                    area = image[:, :, 8 * max(0, row - radius) : 8 * (row + radius + 1),
                                 8 * max(0, column - radius) : 8 * (column + radius + 1)]  # fmt: skip
                    area[:] = pixels.flatten(2).median(dim=2).values[:, :, None, None]
                    lost = (score(pixels) - score(image)).clamp(min=0).float()
                    torch.testing.assert_close(heat[:, row, column], lost, atol=1e-5, rtol=1e-4)
            assert heat.max() > 1e-3
