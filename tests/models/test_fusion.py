import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from mamo.models.fusion import Fusion, FusionLayer, index_rows

B, S, D, HEADS, MLP = 3, 11, 32, 4, 48


def layer(dropout: float = 0.0) -> FusionLayer:
    torch.manual_seed(0)
    made = FusionLayer(D, HEADS, MLP, dropout)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def fusion(num_prefix_tokens: int = 1, text_width: int = D, layers: int = 2) -> Fusion:
    torch.manual_seed(0)
    made = Fusion(
        D, layers, HEADS, MLP, image_width=16, grid=(2, 3), num_prefix_tokens=num_prefix_tokens, text_width=text_width
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens_and_validity() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, S, D), torch.arange(S) < torch.tensor([11, 6, 1])[:, None]


def load_bert_layer(ours: FusionLayer, theirs: BertLayer) -> None:
    state = theirs.state_dict()
    for name, view in ours.bert_named_tensors().items():
        view.copy_(state[name])


def test_layer_equals_bert_layer() -> None:
    """Bug: pre-norm for post-norm, tanh for exact GELU, eps 1e-5, a swapped projection, or an ignored mask."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10, hidden_size=D, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=MLP
    )
    config.initializer_range = 0.3
    bert = BertModel(config, add_pooling_layer=False).eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = layer().eval()
    load_bert_layer(ours, bert.encoder.layer[0])
    assert {module.eps for module in (ours.norm1, ours.norm2)} == {config.layer_norm_eps}
    tokens, is_valid = tokens_and_validity()
    for mask in (is_valid, None):
        additive = None if mask is None else torch.zeros(B, 1, 1, S).masked_fill(~mask[:, None, None], -1e30)
        theirs = bert.encoder.layer[0](tokens, additive)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(ours(tokens, mask), theirs, atol=1e-5, rtol=0)


def test_output_positions_equal_the_full_layer_gathered_in_value_and_gradient() -> None:
    """Bug: keys and values come only from the output positions, or a gradient path is lost."""
    tokens, is_valid = tokens_and_validity()
    read = torch.tensor([[3, 0, 0, 10], [5, 1, 2, 4], [0, 1, 2, 3]])  # in any order, repeats allowed
    weights, results = torch.randn(B, 4, D), []
    for reads in (True, False):
        ours, inputs = layer(), tokens.clone().requires_grad_()
        if reads:
            output = ours(inputs, is_valid, read)
        else:
            full = ours(inputs, is_valid)
            output = torch.stack([full[b, read[b]] for b in range(B)])
        (output * weights).sum().backward()
        results.append([output, inputs.grad, *(parameter.grad for parameter in ours.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_padding_does_not_influence_valid_outputs() -> None:
    """Bug: the mask is shifted against the concatenated sequence, so that a word is hidden and padding is read."""
    network = fusion().eval()
    image, text = torch.randn(B, 7, D), torch.randn(B, 5, D)
    is_valid = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    output = network(image, text, is_valid)
    other = network(image, torch.where(is_valid[..., None], text, 100.0), is_valid)
    assert torch.equal(output[:, :7], other[:, :7])
    assert torch.equal(output[:, 7:][is_valid], other[:, 7:][is_valid])
    shortened = network(image[1:2], text[1:2, :3], is_valid[1:2, :3])
    torch.testing.assert_close(output[1:2, :10], shortened, atol=1e-5, rtol=0)


def test_fusion_is_its_layers_over_image_then_text() -> None:
    """Bug: the modality embedding is forgotten, the order is swapped, or the last layer ignores the positions."""
    network = fusion(text_width=24).eval()
    image, text, is_valid = torch.randn(B, 7, D), torch.randn(B, 5, 24), torch.ones(B, 5, dtype=torch.bool)
    sequence = torch.stack(
        [torch.cat([i, network.text_projection(t) + network.text_modality]) for i, t in zip(image, text)]
    )
    for single in network.layers:
        sequence = single(sequence, None)
    torch.testing.assert_close(network(image, text, is_valid), sequence, atol=1e-5, rtol=0)
    words, patches = network.text_positions(torch.tensor([0, 4])), network.patch_positions(torch.tensor([0, 5]))
    assert words.tolist() == [7, 11]
    assert patches.tolist() == [1, 6]
    read = torch.cat([words, patches]).expand(B, -1)
    torch.testing.assert_close(network(image, text, is_valid, read), sequence[:, [7, 11, 1, 6]], atol=1e-5, rtol=0)


def test_text_reaches_the_layers_untouched_at_the_start() -> None:
    """Bug: a random modality embedding disturbs what BERT's upper layers expect."""
    network = Fusion(D, 1, HEADS, MLP, image_width=16, grid=(1, 1), num_prefix_tokens=0, text_width=D)
    text = torch.randn(B, 5, D)
    assert torch.equal(network.text_projection(text) + network.text_modality, text)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_embed_image_scatters_as_a_naive_loop(num_prefix_tokens: int) -> None:
    """Bug: patches land one slot off (the class token), in sorted order, or without their own position."""
    network = fusion(num_prefix_tokens).eval()
    visible = torch.tensor([[4, 1], [0, 5], [2, 3]])
    encoded = torch.randn(B, num_prefix_tokens + 2, 16)
    expected = torch.empty(B, num_prefix_tokens + 6, D)
    for b in range(B):
        slots = [network.mask_token] * (num_prefix_tokens + 6)
        for i in range(num_prefix_tokens):
            slots[i] = network.image_projection(encoded[b, i])
        for i, patch in enumerate(visible[b].tolist()):
            slots[num_prefix_tokens + patch] = network.image_projection(encoded[b, num_prefix_tokens + i])
        for s, content in enumerate(slots):
            expected[b, s] = network.image_norm(content + network.image_position[0, s] + network.image_modality)
    embedded = network.embed_image(encoded, visible)
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        network.image_position.zero_()  # masked slots differ by their position alone
    masked = network.embed_image(encoded, visible)[0, num_prefix_tokens:][[0, 2, 3, 5]]
    assert torch.equal(masked, masked[:1].expand_as(masked))


def test_embed_image_of_all_patches_equals_visible_in_order() -> None:
    """Bug: the clean path and the masked path embed the same token differently."""
    network, encoded = fusion().eval(), torch.randn(B, 7, 16)
    everything = torch.arange(6).expand(B, -1)
    torch.testing.assert_close(
        network.embed_image(encoded), network.embed_image(encoded, everything), atol=1e-5, rtol=0
    )


def test_a_row_taken_twice_gets_both_gradients() -> None:
    """Bug: of the pairs that one image or caption takes part in, the last alone trains it."""
    rows, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(6, 3, 5)
    chosen = torch.tensor([2, 0, 2, 3, 2, 0])
    taken = index_rows(rows, chosen)
    assert torch.equal(taken, torch.stack([rows[i] for i in chosen.tolist()]))
    (taken * weight).sum().backward()
    by_hand = torch.zeros_like(rows)
    for place, row in enumerate(chosen.tolist()):
        by_hand[row] += weight[place]
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, by_hand)


def test_dropout_acts_in_training_alone() -> None:
    """Bug: attention dropout stays on in the teacher and in evaluation."""
    tokens, is_valid = tokens_and_validity()
    dropping, still = layer(dropout=0.5), layer()
    assert not torch.equal(dropping(tokens, is_valid), still(tokens, is_valid))
    assert torch.equal(dropping.eval()(tokens, is_valid), still(tokens, is_valid))
    assert torch.equal(still.train()(tokens, is_valid), still.eval()(tokens, is_valid))


def test_wrong_sizes_are_refused() -> None:
    """Bug: a width that the heads do not divide, or no layer at all, ends in a reshape error."""
    with pytest.raises(ValueError, match="width 30 is not a multiple of its 4 heads"):
        FusionLayer(30, 4, 48)
    with pytest.raises(ValueError, match="at least one layer"):
        fusion(layers=0)
