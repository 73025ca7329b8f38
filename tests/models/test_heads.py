import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead


def test_mlm_head_equals_bert_and_shares_its_embeddings() -> None:
    """Bug: the transform lacks its LayerNorm, GELU is approximated, or the decoder is a copy that drifts away."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    bert = BertForMaskedLM(config).eval()
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs, embeddings = bert.cls.predictions, bert.get_input_embeddings()
    head = MLMHead(32, embeddings)
    head.dense.load_state_dict(theirs.transform.dense.state_dict())
    head.norm.load_state_dict(theirs.transform.LayerNorm.state_dict())
    head.decoder.bias.data.copy_(theirs.decoder.bias.data)
    hidden = torch.randn(6, 32)
    torch.testing.assert_close(head(hidden), bert.cls(hidden), atol=1e-5, rtol=0)
    assert head.decoder.weight is embeddings.weight


def test_mlm_head_maps_another_fusion_width_to_the_embeddings() -> None:
    """Bug: the transform keeps the fusion width, so that the tied decoder cannot be applied."""
    embeddings = nn.Embedding(50, 24)
    before = embeddings.weight.clone()
    assert MLMHead(32, embeddings)(torch.randn(6, 32)).shape == (6, 50)
    assert torch.equal(embeddings.weight, before)  # tying does not start the embeddings anew


@pytest.mark.parametrize("blocks", [0, 1, 6])
def test_mim_head_mixes_slots_only_with_blocks(blocks: int) -> None:
    """Bug: ``blocks`` is ignored, or the MLP head looks at other slots or at other samples."""
    torch.manual_seed(0)
    head = MIMHead(32, 12, blocks, heads=4)
    tokens = torch.randn(3, 5, 32)
    output = head(tokens)
    assert output.shape == (3, 5, 12)
    altered = tokens.clone()
    altered[0, 4] += 1.0
    changed = (head(altered) - output).abs().amax(dim=-1) > 1e-7
    assert changed[0, 4]
    assert changed[0, :4].tolist() == [blocks > 0] * 4
    assert not changed[1:].any()


def test_itm_and_predictor_are_what_they_say() -> None:
    """Bug: a missing nonlinearity or a wrong width."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 32)
    itm, predictor = ITMHead(32), MRMHead(32, 20)
    torch.testing.assert_close(itm(hidden), hidden @ itm.classifier.weight.T, atol=1e-5, rtol=0)  # bias starts at zero
    first, second = predictor.layers[0], predictor.layers[2]
    assert first.weight.shape == (20, 32)
    inner = hidden @ first.weight.T
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(predictor(hidden), inner @ second.weight.T, atol=1e-5, rtol=0)


def test_linears_start_like_bert() -> None:
    """Bug: PyTorch's default start, whose scale depends on the width."""
    torch.manual_seed(0)
    for linear in [module for module in MRMHead(256, 512).modules() if isinstance(module, nn.Linear)]:
        assert 0.016 < linear.weight.std() < 0.02  # normal(0, 0.02) cut at two sigmas: 0.88 * 0.02
        assert linear.weight.abs().max() <= 0.04
        assert not linear.bias.any()
