import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from mamo.models.fusion import Fusion
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone, Mamo
from mamo.training.freezing import freeze_unused_parameters
from tests.tiny import make_network

ALL = ("itc", "itm", "mlm", "mim", "mrm_image", "mrm_text")


def backbone(image_name: str = "vit_tiny_patch16_224") -> Backbone:
    torch.manual_seed(0)
    image_encoder = ImageEncoder(image_name, (16, 24), patch_size_px=8, width=16, depth=2, heads=2)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_attention_heads=4, intermediate_size=48, max_position_embeddings=20
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    text_encoder = TextEncoder(config, 2)
    fusion = Fusion(32, 2, 4, 48, 16, image_encoder.grid, image_encoder.num_prefix_tokens, 24)
    return Backbone(image_encoder, text_encoder, fusion, itc_width=12)


class SumTask:
    """A task with the one loss `sum`, which `losses` computes."""

    def __init__(self, network: Mamo) -> None:
        self.network, self.weights = network, {"sum": 1.0}

    def compute_targets(self, *_: Any) -> tuple[None, dict[str, Tensor]]:
        return None, {}

    def losses(self, *_: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"sum": losses(self.network)}, {}


class Pictures(list[Any]):
    """A batch of which nothing is read."""

    image = torch.zeros(1)


def freeze(network: Mamo) -> Mamo:
    task: Any = SumTask(network)
    freeze_unused_parameters(task, Pictures())
    return network


def losses(network: Mamo) -> Tensor:
    """A sum that reaches every head the network has, through a masked image and a clean one."""
    torch.manual_seed(1)
    body = network.backbone
    image, input_ids = torch.randn(3, 3, 16, 24), torch.randint(0, 50, (3, 5))
    is_valid = torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    visible, masked = torch.tensor([[0, 4], [5, 1], [2, 3]]), torch.tensor([[1, 2], [0, 2], [0, 1]])
    text = body.text_encoder(input_ids, is_valid)
    clean, seen = body.image_encoder(image), body.image_encoder(image, visible)
    cls = body.fusion.text_positions(torch.zeros(3, 1, dtype=torch.int64))
    fused_clean = body.fusion(body.fusion.embed_image(clean), text, is_valid, cls)[:, 0]
    fused_masked = body.fusion(
        body.fusion.embed_image(seen, visible), text, is_valid, body.fusion.patch_positions(masked)
    )
    terms: list[Tensor] = []
    if network.get_head("temperature") is not None:
        similarity = body.image_feature(clean) @ body.text_feature(text).T / network.temperature
        terms.append(similarity.log_softmax(dim=1).diagonal().sum())
    for name, tokens in (
        ("itm", fused_clean),
        ("mlm", fused_clean),
        ("mrm_text", fused_clean),
        ("mim", fused_masked),
        ("mrm_image", fused_masked),
    ):
        head = network.get_head(name)
        if head is not None:
            output = head(tokens)
            terms.append((output * torch.randn(output.shape)).sum())
    return torch.stack(terms).sum()


@pytest.mark.parametrize(
    "image_name", ["vit_tiny_patch16_224", "vit_medium_patch16_gap_240", "vit_base_patch16_siglip_224"]
)
def test_every_parameter_gets_a_gradient(image_name: str) -> None:
    """Bug: a pooler, a pooling head or an embedding is carried along that nothing trains."""
    network = make_network(backbone(image_name), *ALL, mim_head_blocks=1)
    losses(network).backward()
    idle = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    "used",
    [
        ("itc", "itm"),
        ("itc", "itm", "mlm"),
        ("itc", "itm", "mrm_image", "mrm_text"),
        ("itc",),
        ("mlm", "mim"),
    ],
)
def test_what_the_losses_in_use_do_not_reach_is_not_trainable(used: tuple[str, ...]) -> None:
    """Bug: without some loss, a parameter stays trainable, decays towards zero and stalls distributed training."""
    network = freeze(make_network(backbone(), *used))
    assert all(value.grad is None for value in network.parameters())
    losses(network).backward()
    idle = [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]
    assert idle == []
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    assert ("backbone.fusion.mask_token" in frozen) == ("mim" not in used and "mrm_image" not in used)
    assert ("backbone.image_projection.weight" in frozen) == ("itc" not in used)
    assert network.backbone.image_encoder.vit.pos_embed.requires_grad


def test_only_the_heads_asked_for_exist() -> None:
    """Bug: a head that no loss reads is stored in every checkpoint."""
    network = make_network(backbone(), "itc", "itm")
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"backbone", "itm", "temperature"}
    assert network.get_head("mlm") is None
    assert network.temperature.item() == pytest.approx(0.07)


def test_features_read_class_token_or_mean_patch() -> None:
    """Bug: an encoder without a class token is read at its first patch, or features are not unit vectors in fp32."""
    tokens, text = torch.randn(3, 7, 16), torch.randn(3, 5, 24)
    with_class, without = backbone(), backbone("vit_medium_patch16_gap_240")
    for body, pooled in ((with_class, tokens[:, 0]), (without, tokens.mean(dim=1))):
        projected = pooled @ body.image_projection.weight.T + body.image_projection.bias
        expected = projected / projected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(body.image_feature(tokens), expected, atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            feature = body.text_feature(text)
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(3))
    altered = text.clone()
    altered[:, 1:] = 0.0
    assert torch.equal(with_class.text_feature(altered), with_class.text_feature(text))


def test_copies_keep_the_tied_embedding_tied() -> None:
    """Bug: after a deep copy or a reload, the MLM head decodes with embeddings of its own."""
    network = make_network(backbone(), *ALL)
    copied = copy.deepcopy(network)
    copied.load_state_dict(network.state_dict())
    for each in (network, copied):
        assert each.mlm.decoder.weight is each.backbone.text_encoder.word_embeddings.weight


def test_bf16_forward_stays_close_to_fp32() -> None:
    """Bug: a scatter or a concatenation of mixed precisions fails or truncates under autocast."""
    network = make_network(backbone(), *ALL).eval()
    exact = losses(network)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(network)
    assert abs(rounded.item() - exact.item()) < 0.05 * abs(exact.item()) + 0.05


def test_forward_is_one_graph() -> None:
    """Bug: a branch on data or a mask utility breaks the graph that torch.compile captures."""
    body = backbone().eval()

    def forward(image: Tensor, visible: Tensor, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        tokens = body.fusion.embed_image(body.image_encoder(image, visible), visible)
        return body.fusion(tokens, body.text_encoder(input_ids, is_valid), is_valid, visible)

    inputs = (
        torch.randn(2, 3, 16, 24),
        torch.tensor([[0, 4], [5, 1]]),
        torch.randint(0, 50, (2, 5)),
        torch.ones(2, 5, dtype=torch.bool),
    )
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), forward(*inputs), atol=1e-5, rtol=0)
