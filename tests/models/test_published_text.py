"""Text encoders of published kinds give the hidden states of transformers, and the fusion goes on where it can."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config

import mamo
from mamo.config.schema import RunConfig
from mamo.data.tokenizer import read_tokenizer
from mamo.models.fusion import Fusion
from mamo.models.heads import MLMHead
from mamo.models.published_text import (
    build_text_tower,
    fusion_sizes,
    load_text_weights,
    refused_sizes,
    text_config_from,
)
from mamo.models.text_encoder import load_bert_weights
from mamo.models.text_layouts import FUSION_EPS
from mamo.trainer import resume_run, train
from tests.published import KINDS, LAYERS, WIDTH, save_published
from tests.tiny import spread_weights

BERT_SHAPED = ["bert", "roberta", "xlm-roberta", "distilbert"]
TOKENS = 23


def parts(folder: Path, n_text: int, n_fusion: int = 1) -> tuple[Any, Fusion, MLMHead]:
    """Build text encoder, fusion and head of random weights, as a config of this folder would."""
    torch.manual_seed(1)
    config = text_config_from(str(folder))
    if isinstance(config, BertConfig):
        setattr(config, FUSION_EPS, config.layer_norm_eps)  # as where weights are loaded
    tower = build_text_tower(config, n_text).eval()
    places = {"image_width": 16, "grid": (2, 2), "num_prefix_tokens": 1, "text_width": WIDTH}
    fusion = Fusion(layers=n_fusion, **fusion_sizes(config), **places).eval()
    head = MLMHead(WIDTH, tower.word_embeddings, fusion.layer_norm_eps)
    spread_weights(fusion, head)
    return tower, fusion, head


def batch(model: Any) -> tuple[Tensor, Tensor]:
    """Draw ids of three texts, padded by the model's token of padding."""
    torch.manual_seed(2)
    is_valid = torch.arange(TOKENS) < torch.tensor([TOKENS, 11, 3])[:, None]
    ids = torch.randint(5, model.config.vocab_size - 2, is_valid.shape)
    return ids.masked_fill(~is_valid, model.config.pad_token_id), is_valid


def hidden_states(model: Any) -> tuple[Tensor, ...]:
    ids, is_valid = batch(model)
    with torch.no_grad():
        return model(ids, attention_mask=is_valid.long(), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", [*BERT_SHAPED, "modernbert"])
def test_a_whole_encoder_is_equal_to_transformers(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: positions of RoBERTa begin at 0, a window of ModernBERT is off by one, or a fusion that stays random is not
    called so."""
    model = save_published(kind, tmp_path)
    tower, fusion, head = parts(tmp_path, LAYERS)
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    with caplog.at_level(logging.INFO):
        report = load_text_weights(tower, fusion, str(tmp_path), head)
    ids, is_valid = batch(model)
    tokens = tower(ids, is_valid)
    torch.testing.assert_close(tokens[is_valid], hidden_states(model)[-1][is_valid], atol=1e-5, rtol=0)
    assert torch.isfinite(tokens).all()
    assert "fusion starts anew" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in fusion.state_dict().items())
    assert kind == "modernbert" or {name for name, _ in fusion.named_parameters()} <= {*report.new}


@pytest.mark.parametrize("kind", BERT_SHAPED)
def test_fusion_and_head_continue_the_encoder(kind: str, tmp_path: Path) -> None:
    """Bug: upper layers are shifted or permuted, their epsilon is another, or the masked-word head stays random."""
    model = save_published(kind, tmp_path)
    tower, fusion, head = parts(tmp_path, LAYERS - 1)
    load_text_weights(tower, fusion, str(tmp_path), head)
    ids, is_valid = batch(model)
    tokens, expected = fusion.layers[0](tower(ids, is_valid), is_valid), hidden_states(model)
    torch.testing.assert_close(tokens[is_valid], expected[-1][is_valid], atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=is_valid.long()).logits
    torch.testing.assert_close(head(tokens)[is_valid], logits[is_valid], atol=1e-4, rtol=0)


def test_a_number_of_layers_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Bug: a deeper BERT is refused by a list of unused names, which does not say what to set."""
    save_published("distilbert", tmp_path)
    tower, fusion, _ = parts(tmp_path, 1)
    wanted = r"layers 1 are 2: set model\.fusion_layers=2, or model\.text\.layers=3, with which the fusion starts anew"
    with pytest.raises(ValueError, match=rf"have 3 layers, model\.text\.layers 1 and model\.fusion_{wanted}"):
        load_text_weights(tower, fusion, str(tmp_path), None)
    with pytest.raises(ValueError, match=r"have 3 layers, the network 1: set model\.text\.layers=3"):
        load_bert_weights(tower, None, str(tmp_path))
    tower, fusion, _ = parts(tmp_path, 4)
    with pytest.raises(ValueError, match=r"are 5: set model\.text\.layers=3, with which"):
        load_text_weights(tower, fusion, str(tmp_path), None)


def test_a_file_without_a_masked_word_head_leaves_it_new(tmp_path: Path) -> None:
    """Bug: an encoder that was saved without its head cannot start a run with MLM."""
    model = save_published("roberta", tmp_path)
    model.roberta.save_pretrained(tmp_path)
    tower, fusion, head = parts(tmp_path, LAYERS)
    report = load_text_weights(tower, fusion, str(tmp_path), head)
    assert "mlm.dense.weight" in report.new


@pytest.mark.parametrize("kind", ["modernbert", "roberta"])
def test_missing_and_surplus_weights_are_named(kind: str, tmp_path: Path) -> None:
    """Bug: a tower is partly random, in silence."""
    from safetensors.torch import load_file, save_file

    save_published(kind, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "layer" in name and name.endswith(("Wo.weight", "query.weight")))
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    tower, fusion, _ = parts(tmp_path, LAYERS)
    with pytest.raises(ValueError, match="missing "):
        load_text_weights(tower, fusion, str(tmp_path), None)


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    """Bug: a GPT-2 is read as a BERT of default sizes."""
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"describes a 'gpt2' model; use one of bert, roberta, xlm-roberta, distilbert"
    ):
        text_config_from(str(tmp_path))
    assert {*KINDS} >= {"clip", "siglip"}


def changed(folder: Path, **values: object) -> str:
    """Change values of a folder's config.json; return the folder's name."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return str(folder)


def test_what_is_wrong_with_a_config_is_named(tmp_path: Path) -> None:
    """Bug: a traceback of transformers, a list of a hundred tensors, or the tokenizer is blamed for a broken config."""
    save_published("roberta", tmp_path)
    for values in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "nope"}):
        original = (tmp_path / "config.json").read_text()
        with pytest.raises(ValueError, match=rf"{tmp_path}: a value of its config\.json cannot be used: "):
            config_of(changed(tmp_path, **values))
        (tmp_path / "config.json").write_text(original)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: no JSON object"):
        text_config_from(str(tmp_path))
    (tmp_path / "config.json").write_text('{\n"a": ')
    for read in (text_config_from, read_tokenizer):
        with pytest.raises(ValueError, match=r"config\.json:\d: not valid JSON"):
            read(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"give a folder with config\.json"):
        text_config_from(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer folder; it has none of"):
        read_tokenizer(str(tmp_path / "empty"))


def config_of(source: str) -> None:
    """Read a configuration and build its encoder, as a run does."""
    published = text_config_from(source)
    with refused_sizes(source):
        build_text_tower(published, LAYERS)


@pytest.mark.parametrize(("kind", "other"), [("clip", "siglip"), ("siglip", "clip")])
def test_a_clip_is_not_read_as_a_siglip(kind: str, other: str, tmp_path: Path) -> None:
    """Bug: a wrong model_type swaps the causal mask and the pooled token in silence."""
    save_published(kind, tmp_path)
    tower = build_text_tower(text_config_from(changed(tmp_path, model_type=other)), LAYERS)
    fusion = Fusion(
        layers=1, **fusion_sizes(text_config_from(str(tmp_path))), image_width=16, grid=(2, 2), num_prefix_tokens=1,
        text_width=WIDTH,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"config.json says model_type {other}, the weights are those of a {kind}"):
        load_text_weights(tower, fusion, str(tmp_path), None)


@pytest.mark.usefixtures("no_curves")
def test_a_run_keeps_the_epsilon_that_it_began_with(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a resume, whose config names no published weights, gives the fusion BERT's epsilon in place of RoBERTa's."""
    save_published("roberta", tmp_path / "source")
    expected = json.loads((tmp_path / "source/config.json").read_text())["layer_norm_eps"]
    model = {"text": {"bert": str(tmp_path / "source"), "weights": "bert", "layers": LAYERS - 1}, "fusion_layers": 1}
    training = {"total_steps": 1, "warmup_steps": 0}
    config = tiny(model=model, data={"tokenizer": str(tmp_path / "source")}, training=training)
    train(config, is_resume=False)
    network = mamo.load(config.output_dir).network
    assert expected == 1e-5
    assert {module.eps for module in network.backbone.fusion.layers.modules() if hasattr(module, "eps")} == {expected}
    assert resume_run(config)[0].task.network.mlm.norm.eps == expected
