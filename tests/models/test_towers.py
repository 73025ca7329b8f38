"""Pixel normalisation, and towers that are no ViT and no BERT."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig

from mamo.explain import grad_cam, image_grad_cam, occlusion
from mamo.models.fusion import Fusion
from mamo.models.heads import ITMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.towers import ImageTower, PixelNormalizer, TextTower
from mamo.models.vlm import Backbone
from mamo.tasks.mlim.network import PixelEmbedder
from mamo.teacher import Teacher

D = 16


def vit() -> ImageEncoder:
    return ImageEncoder("vit_tiny_patch16_224", (16, 24), patch_size_px=8, width=D, depth=1, heads=2)


class ConvTower(ImageTower):
    """A stack of convolutions with a stride; masked patches are painted with a learned colour."""

    def __init__(self) -> None:
        super().__init__(
            width=D, grid=(2, 3), patch_size_px=(8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )
        self.stages = nn.Sequential(nn.Conv2d(3, D, 4, stride=4), nn.GELU(), nn.Conv2d(D, D, 3, stride=2, padding=1))
        self.colour = nn.Parameter(torch.randn(3))

    @property
    def layers(self) -> list[nn.Module]:
        return []

    def embed(self, image: Tensor) -> Tensor:
        return self.normalize(image).to(self.colour.dtype)

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        if visible is not None:
            is_seen = torch.zeros(len(embedded), 6, dtype=torch.bool).scatter(1, visible, True).view(-1, 1, 2, 3)
            is_seen = functional.interpolate(is_seen.float(), scale_factor=8) > 0
            embedded = torch.where(is_seen, embedded, self.colour[:, None, None])
        tokens = self.stages(embedded).flatten(2).transpose(1, 2)
        return tokens if visible is None else tokens.gather(1, visible[..., None].expand(-1, -1, D))


class WordTower(TextTower):
    """One linear layer for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.width = D
        self.words = nn.Embedding(9, D)
        self.dense = nn.Linear(D, D)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.dense]

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.words

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids)

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        return self.dense(embedded)


def fusion(num_prefix_tokens: int = 0) -> Fusion:
    return Fusion(D, 2, 2, 24, image_width=D, grid=(2, 3), num_prefix_tokens=num_prefix_tokens, text_width=D)


@pytest.mark.parametrize("make", [vit, ConvTower, lambda: PixelEmbedder(3, (16, 24), D)])
def test_pixels_are_normalised_in_fp32(make: type[PixelNormalizer]) -> None:
    """Bug: other bits than before, uint8 read without normalisation, float images normalised twice."""
    tower = make()
    image = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    expected = (image.float() - mean) / std
    assert torch.equal(tower.normalize(image), expected)
    assert torch.equal(tower(image), tower(expected))
    assert not torch.equal(tower(image), tower(image.float()))


@pytest.mark.parametrize("make", [vit, ConvTower, lambda: PixelEmbedder(3, (16, 24), D)])
def test_pixel_statistics_follow_the_module_and_stay_exact(make: type[PixelNormalizer]) -> None:
    """Bug: statistics in the state dict of a checkpoint, rounded to bf16, lost in a copy, a teacher or on meta."""
    tower = make()
    image = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    expected = tower.normalize(image)
    assert not any("pixel" in name for name in tower.state_dict())
    teacher = Teacher(tower)
    teacher.update(tower, 0.5)
    with torch.device("meta"):
        empty = make()
    assert empty.pixel_mean.is_meta
    for other in (
        copy.deepcopy(tower),
        copy.deepcopy(tower).bfloat16(),
        copy.deepcopy(tower).bfloat16().float(),
        nn.Sequential(copy.deepcopy(tower)).double()[0],
        teacher.module,
        empty.to_empty(device="cpu"),
    ):
        assert torch.equal(other.normalize(image), expected)
        assert other.normalize(image).dtype == torch.float32
    assert tower.bfloat16()(image).dtype == torch.bfloat16


def test_a_tower_that_is_no_vit() -> None:
    """Bug: something relies on the shape of an embedding, on a class token, or on attention in an image encoder."""
    torch.manual_seed(0)
    body = Backbone(ConvTower(), WordTower(), fusion(), itc_width=8)
    image = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    visible, ids = torch.tensor([[0, 4], [5, 1]]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    is_valid = torch.ones_like(ids, dtype=torch.bool)
    text, encoded = body.text_encoder(ids, is_valid), body.image_encoder(image, visible)
    assert encoded.shape == (2, 2, D)
    altered = image.clone()
    altered[0, :, :8, 8:16] = 255  # patch 1, which is masked
    assert torch.equal(body.image_encoder(altered, visible)[0], encoded[0])
    tokens = body.image_encoder(image)
    torch.testing.assert_close(
        body.image_feature(tokens), functional.normalize(body.image_projection(tokens.mean(dim=1)), dim=-1)
    )
    fused = body.fusion(body.fusion.embed_image(encoded, visible), text, is_valid)
    fused.sum().backward()
    itm, words = ITMHead(D), body.fusion.embed_text(text, is_valid)
    assert occlusion(body, itm, image, words, is_valid).shape == (2, 2, 3)
    assert grad_cam(body.fusion, itm, body.fusion.embed_image(tokens), words, is_valid).max() > 0
    with pytest.raises(ValueError, match="ConvTower records no attention, which Grad-CAM in the image encoder needs"):
        image_grad_cam(body, itm, image, words, is_valid)


def test_heat_reads_uint8_as_normalised_images() -> None:
    """Bug: an explanation of an image that was normalised twice, or not at all."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=D, num_attention_heads=2, intermediate_size=24)
    body, itm = Backbone(vit(), TextEncoder(config, 1), fusion(1), itc_width=8).eval(), ITMHead(D)
    for parameter in (*body.image_encoder.layers[0].parameters(), *body.fusion.parameters(), *itm.parameters()):
        nn.init.normal_(parameter, std=0.3)
    image = torch.randint(0, 256, (8, 3, 16, 24), dtype=torch.uint8)
    ids, is_valid = torch.randint(0, 9, (8, 3)), torch.ones(8, 3, dtype=torch.bool)
    text = body.fusion.embed_text(body.text_encoder(ids, is_valid), is_valid)
    for heat in (image_grad_cam, occlusion):
        expected = heat(body, itm, body.image_encoder.normalize(image), text, is_valid)
        torch.testing.assert_close(heat(body, itm, image, text, is_valid), expected, atol=1e-5, rtol=1e-4)
        assert expected.max() > 0


def test_heat_of_an_encoder_with_registers_is_at_its_patches() -> None:
    """Bug: the heat of four registers is drawn on the first patches, and the last ones are cut off."""
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_small_patch16_dinov3", (16, 24), patch_size_px=8, width=D, depth=2, heads=2)
    config = BertConfig(vocab_size=9, hidden_size=D, num_attention_heads=2, intermediate_size=24)
    body, itm = Backbone(encoder, TextEncoder(config, 1), fusion(1), itc_width=8).eval(), ITMHead(D)
    for parameter in (*encoder.parameters(), *body.fusion.parameters(), *itm.parameters()):
        nn.init.normal_(parameter, std=0.3)
    image, ids = torch.randn(4, 3, 16, 24), torch.randint(0, 9, (4, 3))
    is_valid = torch.ones(4, 3, dtype=torch.bool)
    text = body.fusion.embed_text(body.text_encoder(ids, is_valid), is_valid).detach()
    with encoder.recording_attention() as weights:
        slots = body.fusion.embed_image(encoder(image))
        logits = itm(
            body.fusion.fuse(slots, text, is_valid, body.fusion.text_positions(torch.zeros(4, 1).long()))[:, 0]
        )
        gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), weights)
    each = [(w * g).clamp(min=0).mean(dim=1).sum(dim=1) for w, g in zip(weights, gradients)]  # [B, 1 + 4 + 6]
    expected = torch.stack(each).sum(dim=0)[:, 5:].view(4, 2, 3)
    torch.testing.assert_close(image_grad_cam(body, itm, image, text, is_valid), expected.detach())
    assert expected.max() > 0


@pytest.mark.parametrize("missing", ["embed", "encode", "layers"])
def test_a_tower_that_lacks_a_method_is_refused(missing: str) -> None:
    """Bug: a missing method is found out in the middle of the first step."""
    parts = {name: value for name, value in vars(ConvTower).items() if name != missing and not name.startswith("__")}
    lacking = type("Lacking", (ImageTower,), parts)
    with pytest.raises(TypeError, match=missing):
        lacking()
