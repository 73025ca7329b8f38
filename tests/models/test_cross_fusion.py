"""Cross-attention fusion against Hugging Face's BERT layers, and its two sides embedded apart."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion, FusionLayer, gather_tokens
from mamo.models.text_encoder import TextEncoder, load_bert_weights
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.registry import build_config
from tests.tiny import spread_weights

B, N, L, D, HEADS, MLP = 3, 7, 5, 32, 4, 48


def fusion(layers: int = 2, image_width: int = 24) -> CrossFusion:
    torch.manual_seed(0)
    made = CrossFusion(D, layers, HEADS, MLP, image_width=image_width, grid=(2, 3), num_prefix_tokens=1)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def inputs(image_width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    is_valid = torch.arange(L) < torch.tensor([5, 3, 1])[:, None]
    return torch.randn(B, N, image_width), torch.randn(B, L, D), is_valid


def bert(layers: int = 2, **changes: object) -> BertModel:
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=10,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        **changes,
    )
    config._attn_implementation = "eager"  # the mask that it is given is then the whole mask: not causal
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_equals_bert_layers_with_cross_attention() -> None:
    """Bug: cross- before self-attention, a norm left out, key for value, a causal mask, padding attended to."""
    theirs = bert(is_decoder=True, add_cross_attention=True)
    ours = fusion(image_width=D)
    image, text, is_valid = inputs(image_width=D)
    additive = torch.zeros(B, 1, 1, L).masked_fill(~is_valid[:, None, None], -1e30).expand(-1, -1, L, -1)
    expected = text
    for mine, layer in zip(ours.layers, theirs.encoder.layer):
        state = layer.state_dict()
        views = mine.bert_named_tensors()
        assert views.keys() == state.keys()
        for name, view in views.items():
            view.copy_(state[name])
        expected = layer(expected, additive, encoder_hidden_states=image)
        expected = expected[0] if isinstance(expected, tuple) else expected
    found = ours(ours.embed_image(image), text, is_valid)
    torch.testing.assert_close(found[is_valid], expected[is_valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [1, 2])
def test_read_equals_the_whole_gathered_in_value_and_gradient(layers: int) -> None:
    """Bug: keys come from the read tokens alone, or with one layer nothing is left out."""
    network, (image, text, is_valid) = fusion(layers), inputs()
    read, weights, results = torch.tensor([[4, 0], [1, 1], [0, 0]]), torch.randn(B, 2, D), []
    for reads in (True, False):
        leaf = text.clone().requires_grad_()
        embedded = network.embed_image(image)
        output = (
            network(embedded, leaf, is_valid, read) if reads else gather_tokens(network(embedded, leaf, is_valid), read)
        )
        network.zero_grad()
        (output * weights).sum().backward()
        results.append([output, leaf.grad, *(parameter.grad.clone() for parameter in network.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_embedded_sides_meet_in_any_pairing() -> None:
    """Bug: what is made of a text or an image alone depends on the pair that it was made in."""
    network, (image, text, is_valid) = fusion(), inputs()
    images, texts = network.embed_image(image), network.embed_text(text, is_valid)
    for i in range(B):
        for j in range(B):
            alone = network(network.embed_image(image[i : i + 1]), text[j : j + 1], is_valid[j : j + 1])
            paired = network.fuse(images[i : i + 1], texts[j : j + 1], is_valid[j : j + 1])
            torch.testing.assert_close(paired, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["cross", "concat"])
@pytest.mark.parametrize(
    ("chosen", "rows"),
    [([2, 0, 2], [2, 0, 2]), ([1, 1, 0], [0, 1, 2, 0, 1, 2, 1, 1, 0]), (None, [0, 1, 2, 0, 1, 2]), (None, [0, 1, 2])],
)
def test_an_image_of_several_texts_equals_its_copies(kind: str, chosen: list[int] | None, rows: list[int]) -> None:
    """Bug: an image's texts swapped, the images in turn instead of the chosen ones, or one text alone trains it."""
    image, text, is_valid = inputs()
    text = torch.randn(len(rows), L, D)
    is_valid = is_valid.repeat(3, 1)[: len(rows)]
    if kind == "cross":
        network: CrossFusion | Fusion = fusion()
    else:
        network = Fusion(D, 2, HEADS, MLP, image_width=24, grid=(2, 3), num_prefix_tokens=1, text_width=D).eval()
    indices = None if chosen is None else torch.tensor(chosen)
    weight, results = torch.randn(len(rows), 1, D), []
    read = network.text_positions(torch.zeros(len(rows), 1, dtype=torch.int64))
    for is_copied in (True, False):
        leaf = image.clone().requires_grad_()
        embedded, words = network.embed_image(leaf), network.embed_text(text, is_valid)
        if is_copied:
            output = network.fuse(torch.stack([embedded[row] for row in rows]), words, is_valid, read)
        else:
            output = network.fuse(embedded, words, is_valid, read, indices)
        (output * weight).sum().backward()
        results.append((output, leaf.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cross", "concat", "concat of one layer", "concat with a layer of its own"])
def test_pairs_equal_each_pair_fused_by_itself(kind: str) -> None:
    """Bug: the first layer's projections of another image or text, a lost value bias, padding that is attended to."""
    torch.manual_seed(2)
    layers = 1 if kind == "concat of one layer" else 3
    network = Fusion(D, layers, HEADS, MLP, 24, (2, 3), 1, text_width=D) if kind != "cross" else fusion()
    if kind == "concat with a layer of its own":
        network.layers[1] = DoublingLayer(D, HEADS, MLP)
    spread_weights(network)
    network.eval()
    images, texts, lengths = torch.randn(2, 7, 24), torch.randn(4, 6, D), torch.tensor([6, 2, 1, 4])
    is_valid = torch.arange(6) < lengths[:, None]
    image_indices, text_indices = torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([2, 2, 0, 3, 1, 2])
    read = network.text_positions(torch.tensor([[0, 0], [0, 0], [5, 1], [3, 0], [1, 0], [0, 0]]))
    with torch.inference_mode():
        shared = network.share_image(network.embed_image(images))
        words = network.embed_text(texts, is_valid)
        found = network.fuse_pairs(shared, words, is_valid, read, image_indices, text_indices)
        for k, (i, t) in enumerate(zip(image_indices.tolist(), text_indices.tolist())):
            text, valid = texts[t : t + 1, : lengths[t]], is_valid[t : t + 1, : lengths[t]]
            alone = network(network.embed_image(images[i : i + 1]), text, valid)
            torch.testing.assert_close(found[k], alone[0, read[k]], atol=1e-5, rtol=1e-5)


class DoublingLayer(FusionLayer):
    def forward(self, tokens: Tensor, is_valid: Tensor | None, output_positions: Tensor | None = None) -> Tensor:
        return 2 * super().forward(tokens, is_valid, output_positions)


def test_a_plain_bert_fills_all_but_the_cross_attention(tmp_path: object) -> None:
    """Bug: a BERT is refused for lacking cross-attention, or what stays random is not reported."""
    source = bert(layers=3)
    source.save_pretrained(tmp_path)
    network, encoder = fusion(), TextEncoder(source.config, 1)
    before = {name: view.clone() for name, view in network.layers[1].bert_named_tensors().items()}
    report = load_bert_weights(encoder, network, str(tmp_path))
    state = source.encoder.layer[2].state_dict()
    for name, view in network.layers[1].bert_named_tensors().items():
        assert torch.equal(view, before[name] if name.startswith("crossattention.") else state[name]), name
    assert len(report.new) == 2 * 10
    assert all(".crossattention." in name for name in report.new)
    assert not any("crossattention" in name for name in report.loaded)


def test_losses_on_fused_image_tokens_are_refused() -> None:
    """Bug: a head for tokens that do not exist, found out in the middle of the first step."""
    with pytest.raises(ValueError, match="CrossFusion gives no fused image tokens"):
        fusion().patch_positions(torch.tensor([0]))
    with pytest.raises(ValueError, match="reasoning reads fused image tokens, and CrossFusion gives none"):
        ReasoningHead(fusion(), 1)
    others = {"mlm": 0, "mrm_text": 0}
    for used in ("mim", "mrm_image"):
        weights = {"mim": 0, "mrm_image": 0, **others, used: 1}
        with pytest.raises(ValueError, match=f"cross gives no fused image tokens, from which {used} would learn"):
            build_config({"output_dir": "x", "model": {"fusion_type": "cross"}, "losses": {"weights": weights}})


def test_no_layers_are_refused() -> None:
    """Bug: a fusion that fuses nothing."""
    with pytest.raises(ValueError, match="at least one layer"):
        fusion(layers=0)
