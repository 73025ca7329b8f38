"""The answer heads of VQA."""

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from mamo.models.fusion import Fusion
from mamo.models.text_encoder import TextEncoder
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, DecoderLayer, answer_likelihood

B, K, T, S, D, HEADS, MLP, V = 2, 3, 4, 7, 32, 4, 48, 50


def bert_config(**over: object) -> BertConfig:
    sizes = {"vocab_size": V, "hidden_size": D, "num_attention_heads": HEADS, "intermediate_size": MLP}
    return BertConfig(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes, **over)


def large(module: torch.nn.Module) -> None:
    """Weights that leave no difference unseen."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, K, T, D), torch.randn(B, S, D), torch.arange(S) < torch.tensor([[S], [4]])


def test_layer_equals_berts_decoder_layer() -> None:
    """Bug: cross-attention before self-attention, a mask that looks ahead, a key and value swapped, a norm left out."""
    torch.manual_seed(0)
    config = bert_config(is_decoder=True, add_cross_attention=True)
    config._attn_implementation = "eager"
    theirs = BertModel(config, add_pooling_layer=False).eval().encoder.layer[0]
    large(theirs)
    ours = DecoderLayer(D, HEADS, MLP, 0.0).eval()
    itself, cross = theirs.attention, theirs.crossattention
    with torch.no_grad():
        for mine, his in ((ours.qkv, itself.self), (ours.cross.qkv, cross.self)):
            mine.weight.copy_(torch.cat([his.query.weight, his.key.weight, his.value.weight]))
            mine.bias.copy_(torch.cat([his.query.bias, his.key.bias, his.value.bias]))
    pairs = [(ours.out, itself.output.dense), (ours.norm, itself.output.LayerNorm)]
    pairs += [(ours.cross.out, cross.output.dense), (ours.cross.norm1, cross.output.LayerNorm)]
    pairs += [(ours.cross.fc1, theirs.intermediate.dense), (ours.cross.fc2, theirs.output.dense)]
    for mine, his in [*pairs, (ours.cross.norm2, theirs.output.LayerNorm)]:
        mine.load_state_dict(his.state_dict())
    tokens, memory, is_valid = inputs()
    causal = torch.zeros(1, 1, T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1e30)
    padding = torch.zeros(B, 1, 1, S).masked_fill(~is_valid[:, None, None], -1e30)
    for k in range(K):  # answers to one question are separate rows to BERT
        expected = theirs(
            tokens[:, k],
            attention_mask=causal,
            encoder_hidden_states=memory,
            encoder_attention_mask=padding,
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(ours(tokens, memory, is_valid)[:, k], expected, atol=1e-5, rtol=0)


def decoder() -> tuple[AnswerDecoder, Fusion, TextEncoder]:
    torch.manual_seed(0)
    text_encoder = TextEncoder(bert_config(), 1)
    fusion = Fusion(D, 2, HEADS, MLP, image_width=D, grid=(2, 2), num_prefix_tokens=0, text_width=D)
    head = AnswerDecoder(fusion, text_encoder)
    for module in (fusion, head):
        large(module)
    return head.eval(), fusion, text_encoder.eval()


def test_answers_do_not_see_each_other_nor_what_follows() -> None:
    """Bug: a score that depends on which other answers are on the shortlist, or on the padding behind an answer."""
    head, _, _ = decoder()
    tokens, memory, is_valid = inputs()
    changed = tokens.clone()
    changed[:, 1] = 0.0
    changed[:, 0, 2:] = 0.0
    before, after = head(tokens, memory, is_valid), head(changed, memory, is_valid)
    torch.testing.assert_close(before[:, 2], after[:, 2])
    torch.testing.assert_close(before[:, 0, :2], after[:, 0, :2])
    assert (before[:, 0, 2:] - after[:, 0, 2:]).abs().min() > 0
    assert (before[0] - head(tokens, memory.flip(0), is_valid)[0]).abs().max() > 1e-3  # the memory is read


def test_a_new_decoder_begins_where_the_fusion_stands() -> None:
    """Bug: layers that stay random beside a pre-trained network, or share its memory and move it."""
    head, fusion, _ = decoder()
    head.init_from(fusion)
    for mine, theirs in zip(head.layers, fusion.layers):
        for name, value in theirs.state_dict().items():
            assert torch.equal(mine.cross.state_dict()[name], value)
            assert mine.cross.state_dict()[name].data_ptr() != value.data_ptr()
        assert torch.equal(mine.qkv.weight, theirs.qkv.weight)
        assert torch.equal(mine.norm.weight, theirs.norm1.weight)


def test_words_are_embedded_as_bert_does() -> None:
    """Bug: positions run on from one answer to the next."""
    _, _, text_encoder = decoder()
    ids = torch.randint(0, V, (B, K, T))
    expected = torch.stack([text_encoder.bert.embeddings(input_ids=row) for row in ids])
    torch.testing.assert_close(text_encoder.embed(ids), expected)


def test_likelihood_by_a_plain_loop() -> None:
    """Bug: the token itself is scored instead of the next one, padding counts, or [SEP] does not."""
    torch.manual_seed(0)
    logits, ids = torch.randn(B, K, T - 1, V), torch.randint(0, V, (B, K, T))
    length = torch.tensor([[4, 2, 3], [3, 4, 2]])
    found = answer_likelihood(logits, ids, torch.arange(T) < length[..., None])
    for b in range(B):
        for k in range(K):
            probability = logits[b, k].softmax(dim=-1)
            told = sum(float(probability[t - 1, ids[b, k, t]].log()) for t in range(1, int(length[b, k])))
            assert abs(float(found[b, k]) - told) < 1e-4


def test_the_classifier_gives_one_logit_an_answer() -> None:
    """Bug: samples that mix."""
    head = AnswerClassifier(D, 9)
    hidden = torch.randn(5, D)
    assert head(hidden).shape == (5, 9)
    torch.testing.assert_close(head(hidden)[2:3], head(hidden[2:3]))
