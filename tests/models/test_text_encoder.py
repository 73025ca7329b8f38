import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
)

from mamo.models.fusion import Fusion
from mamo.models.heads import MLMHead
from mamo.models.text_encoder import TextEncoder, bert_config_from, load_bert_weights

N_TEXT, N_FUSION = 2, 3


def bert_config(**changes: object) -> BertConfig:
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": N_TEXT + N_FUSION,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "initializer_range": 0.2,  # ten times BERT's: weights that matter at this small size
    }
    return BertConfig(**(values | changes))


def networks() -> tuple[TextEncoder, Fusion]:
    torch.manual_seed(1)
    fusion = Fusion(32, N_FUSION, 4, 48, image_width=16, grid=(2, 2), num_prefix_tokens=1, text_width=32)
    return TextEncoder(bert_config(), N_TEXT).eval(), fusion.eval()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    lengths = torch.tensor([9, 4, 1])
    return torch.randint(0, 50, (3, 9)), torch.arange(9) < lengths[:, None]


def source_hidden_states(model: BertModel) -> tuple[Tensor, ...]:
    input_ids, is_valid = batch()
    with torch.no_grad():
        return model.eval()(input_ids, is_valid.long(), output_hidden_states=True).hidden_states


def test_equals_the_lower_layers_of_bert_with_padding() -> None:
    """Bug: one layer too many, or the mask's polarity or shape lets valid tokens read padding."""
    torch.manual_seed(0)
    bert = BertModel(bert_config())
    encoder = TextEncoder(bert_config(), N_TEXT).eval()
    encoder.bert.load_state_dict(bert.state_dict(), strict=False)
    input_ids, is_valid = batch()
    tokens, expected = encoder(input_ids, is_valid), source_hidden_states(bert)[N_TEXT]
    torch.testing.assert_close(tokens[is_valid], expected[is_valid], atol=1e-5, rtol=0)
    other_padding = torch.where(is_valid, input_ids, 49 - input_ids)
    assert torch.equal(encoder(other_padding, is_valid)[is_valid], tokens[is_valid])


def test_config_is_not_changed_by_the_encoder() -> None:
    """Bug: cutting the layers edits the caller's config, so that the next encoder is cut too."""
    config = bert_config()
    TextEncoder(config, 1)
    assert config.num_hidden_layers == N_TEXT + N_FUSION


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_loaded_layers_continue_bert_from_text_encoder_through_fusion(kind: type, tmp_path: Path) -> None:
    """Bug: upper layers are shifted by one, query and key are swapped, or the ``bert.`` prefix loads nothing."""
    torch.manual_seed(0)
    source = kind(bert_config())
    source.save_pretrained(tmp_path)
    text_encoder, fusion = networks()
    report = load_bert_weights(text_encoder, fusion, str(tmp_path))
    hidden = source_hidden_states(getattr(source, "bert", source))
    input_ids, is_valid = batch()
    tokens = text_encoder(input_ids, is_valid)
    torch.testing.assert_close(tokens[is_valid], hidden[N_TEXT][is_valid], atol=1e-5, rtol=0)
    for index, layer in enumerate(fusion.layers):
        tokens = layer(tokens, is_valid)
        torch.testing.assert_close(tokens[is_valid], hidden[N_TEXT + 1 + index][is_valid], atol=1e-5, rtol=0)
    assert set(report.new) == {name for name, _ in fusion.named_parameters() if not name.startswith("layers.")}
    assert all(name.startswith(("cls.", "pooler.")) for name in report.unused)
    assert (kind is BertForMaskedLM) or any(name.startswith("pooler.") for name in report.unused)


def test_old_key_names_and_pickle_files_load_alike(tmp_path: Path) -> None:
    """Bug: files of the first BERT release (``LayerNorm.gamma``, ``.bin``) are refused or half loaded."""
    torch.manual_seed(0)
    BertForPreTraining(bert_config()).save_pretrained(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(20)[None]
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    results = []
    for folder in ("new", "old"):
        text_encoder, fusion = networks()
        mlm_head = MLMHead(32, text_encoder.word_embeddings)
        load_bert_weights(text_encoder, fusion, str(tmp_path / folder), mlm_head)
        results.append({**text_encoder.state_dict(), **fusion.state_dict(), **mlm_head.state_dict()})
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert torch.equal(results[0]["dense.weight"], state["cls.predictions.transform.dense.weight"])


def test_mlm_head_from_file_gives_the_source_logits(tmp_path: Path) -> None:
    """Bug: the head's transform or bias stays random when it was asked for."""
    torch.manual_seed(0)
    source = BertForMaskedLM(bert_config()).eval()
    torch.nn.init.normal_(source.cls.predictions.decoder.bias)
    source.cls.predictions.bias.data.copy_(source.cls.predictions.decoder.bias.data)
    source.save_pretrained(tmp_path)
    text_encoder, fusion = networks()
    mlm_head = MLMHead(32, text_encoder.word_embeddings)
    load_bert_weights(text_encoder, fusion, str(tmp_path), mlm_head)
    hidden = torch.randn(6, 32)
    torch.testing.assert_close(mlm_head(hidden), source.cls(hidden), atol=1e-5, rtol=0)


def test_loading_is_strict_and_names_the_keys(tmp_path: Path) -> None:
    """Bug: a missing tensor or surplus layers are passed over in silence, or the networks change before the error."""
    torch.manual_seed(0)
    BertModel(bert_config(num_hidden_layers=6)).save_pretrained(tmp_path)
    text_encoder, fusion = networks()
    before = {key: value.clone() for key, value in text_encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"have 6 layers, model\.text\.layers 2 and model\.fusion_layers 3 are 5"):
        load_bert_weights(text_encoder, fusion, str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    state = {key: value for key, value in state.items() if ".5." not in key and "4.output.dense.bias" not in key}
    state["embeddings.word_embeddings.weight"] = torch.zeros(40, 32)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing encoder\.layer\.4\.output\.dense\.bias; .*word.* is \[40, 32\]"):
        load_bert_weights(text_encoder, fusion, str(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in text_encoder.state_dict().items())


def test_other_numbers_of_heads_are_refused(tmp_path: Path) -> None:
    """Bug: weights of a BERT with other heads fit by shape and compute something else."""
    BertModel(bert_config(num_attention_heads=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8 attention heads, the text encoder has 4"):
        load_bert_weights(*networks(), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: relu, the network gelu"),
        ({"hidden_act": "silu"}, "hidden_act: silu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: 1e-05"),
        ({"is_decoder": True}, "is_decoder: True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: relative_key"),
        ({"hidden_act": "gelu_new"}, None),  # the same up to 0.0005
    ],
)
def test_functions_that_weights_do_not_show_are_compared(
    change: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    """Bug: the fusion computes another function than the BERT whose weights it holds."""
    BertModel(bert_config(**{key: value for key, value in change.items() if key != "is_decoder"})).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    if message is None:
        load_bert_weights(*networks(), str(tmp_path))
        return
    with pytest.raises(ValueError, match=message):
        load_bert_weights(*networks(), str(tmp_path))


def test_a_decoder_of_its_own_is_refused(tmp_path: Path) -> None:
    """Bug: the output weights of an untied masked-word head are left behind, and its input embeddings decode."""
    source = BertForMaskedLM(bert_config(tie_word_embeddings=False))
    torch.nn.init.normal_(source.cls.predictions.decoder.weight)
    source.save_pretrained(tmp_path)
    text_encoder, fusion = networks()
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight differs from embeddings\.word_embeddings"):
        load_bert_weights(text_encoder, fusion, str(tmp_path), MLMHead(32, text_encoder.word_embeddings))
    load_bert_weights(text_encoder, fusion, str(tmp_path))  # without the head it is not read


def test_config_is_read_from_a_folder(tmp_path: Path) -> None:
    """Bug: defaults stand in for a file that is absent, or RoBERTa's positions are taken for BERT's."""
    bert_config(vocab_size=77).save_pretrained(tmp_path / "bert")
    assert bert_config_from(str(tmp_path / "bert")).vocab_size == 77
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    assert bert_config_from(str(tmp_path / "roberta")).max_position_embeddings == 510
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="describes a 'gpt2' model, whose layers are not those of a BERT"):
        bert_config_from(str(tmp_path / "gpt2"))
    DistilBertConfig(n_layers=0).save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="describes a 'distilbert' model with 0 layers; choose one with at least one"):
        bert_config_from(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="absent"):
        bert_config_from(str(tmp_path / "absent"))
