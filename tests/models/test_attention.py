"""Attention written out equals PyTorch's fused kernel, and BERT with it equals BERT without it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel

from mamo.models.attention import attend, explicit_attention
from mamo.models.text_encoder import TextEncoder

MASKS = ["none", "padding", "full"]


def inputs(dtype: torch.dtype, kind: str) -> tuple[list[Tensor], Tensor | None]:
    """(query [2, 3, 4, 8], key, value [2, 3, 6, 8]) and a mask, True where a key may be attended to."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, n, 8).to(dtype) for n in (4, 6, 6)]
    if kind == "none":
        return tensors, None
    if kind == "padding":
        return tensors, (torch.arange(6) < torch.tensor([6, 2])[:, None])[:, None, None, :]
    mask = torch.rand(2, 3, 4, 6) < 0.5
    mask[..., 0] = True
    return tensors, mask


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_equals_pytorchs(kind: str, dtype: torch.dtype, tolerance: float, dropout_p: float) -> None:
    """Bug: a wrong scale, an inverted mask, a softmax over the queries, other weights dropped; value or gradient."""
    tensors, mask = inputs(dtype, kind)
    torch.manual_seed(1)
    weight = torch.randn(2, 3, 4, 8).to(dtype)
    results = []
    for function in (
        lambda q, k, v: attend(q, k, v, mask, dropout_p),
        lambda q, k, v: explicit_attention(q, k, v, mask, dropout_p),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(2)
        output = function(*leaves)
        (output * weight).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    *ours, pytorchs = results
    for result in ours:
        assert result[0].dtype == dtype
        for mine, theirs in zip(result, pytorchs):
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", MASKS)
def test_attention_equals_a_loop(kind: str) -> None:
    """Bug: an error that both ways of writing it share."""
    (query, key, value), mask = inputs(torch.float64, kind)
    for result in (attend(query, key, value, mask), explicit_attention(query, key, value, mask)):
        for b in range(2):
            for a in range(3):
                for r in range(4):
                    kept = [s for s in range(6) if mask is None or bool(mask.expand(2, 3, 4, 6)[b, a, r, s])]
                    weights = [float(torch.exp(query[b, a, r] @ key[b, a, s] / 8**0.5)) for s in kept]
                    expected = sum(w * value[b, a, s] for w, s in zip(weights, kept)) / sum(weights)
                    torch.testing.assert_close(result[b, a, r], expected)


def test_dropout_keeps_the_mean_and_drops_weights() -> None:
    """Bug: dropout forgotten in the written-out way, or not rescaled, so that training and evaluation differ."""
    (query, key, value), mask = inputs(torch.float64, "padding")
    query.requires_grad_()
    torch.manual_seed(2)
    drawn = torch.stack([attend(query, key, value, mask, 0.3).detach() for _ in range(3000)])
    assert drawn.std(dim=0).min() > 0.01
    error = (drawn.mean(dim=0) - attend(query, key, value, mask).detach()).abs()
    assert (error < 6 * drawn.std(dim=0) / 3000**0.5).all()


@pytest.mark.parametrize("is_training", [False, True])
def test_text_encoder_equals_bert_with_pytorchs_attention(is_training: bool) -> None:
    """Bug: our attention inside BERT ignores the padding, the scale or the head layout; in value or in gradient."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=4, intermediate_size=24, max_position_embeddings=12,
        num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ours = TextEncoder(config, 2).double().train(is_training)
    config._attn_implementation = "sdpa"
    theirs = BertModel(config, add_pooling_layer=False).double().train(is_training)
    theirs.load_state_dict(ours.bert.state_dict())
    input_ids = torch.randint(0, 30, (3, 7))
    is_valid = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    with torch.set_grad_enabled(is_training):
        outputs = [
            ours(input_ids, is_valid),
            theirs(input_ids=input_ids, attention_mask=is_valid.long()).last_hidden_state,
        ]
    torch.testing.assert_close(outputs[0][is_valid], outputs[1][is_valid], atol=1e-12, rtol=1e-10)
    if is_training:
        weight = torch.randn(3, 7, 16).double() * is_valid[..., None]
        for output in outputs:
            (output * weight).sum().backward()
        for (name, mine), parameter in zip(ours.bert.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(mine.grad, parameter.grad, atol=1e-11, rtol=1e-8, msg=name)
