"""Configurations and weights of the text encoders that compute what BERT does, under BERT's names.

RoBERTa and XLM-R are BERTs whose positions begin after the id of padding, DistilBERT is one without token types.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, DistilBertConfig, RobertaConfig

BERT_SHAPED = ("bert", "roberta", "xlm-roberta", "distilbert")
"""`model_type` of the encoders whose layers are BERT's."""
FUSION_EPS = "fusion_layer_norm_eps"
"""Key of a run's BERT config: the epsilon of a fusion and a masked-word head that began as its upper layers. Without it
theirs is that of BERT, as in runs before version 0.3."""
_ROBERTA = ("roberta", "xlm-roberta")
_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id", "initializer_range"
)  # fmt: skip
_READ_BY_NAME = ("position_embedding_type", "is_decoder")
_POSITIONS = "embeddings.position_embeddings.weight"
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
_KIND = r"\.(weight|bias)"
_LAYER = r"transformer\.layer\.(\d+)"
_DISTILBERT_NAMES = (
    (rf"{_LAYER}\.attention\.q_lin{_KIND}", r"encoder.layer.\1.attention.self.query.\2"),
    (rf"{_LAYER}\.attention\.k_lin{_KIND}", r"encoder.layer.\1.attention.self.key.\2"),
    (rf"{_LAYER}\.attention\.v_lin{_KIND}", r"encoder.layer.\1.attention.self.value.\2"),
    (rf"{_LAYER}\.attention\.out_lin{_KIND}", r"encoder.layer.\1.attention.output.dense.\2"),
    (rf"{_LAYER}\.sa_layer_norm{_KIND}", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
    (rf"{_LAYER}\.ffn\.lin1{_KIND}", r"encoder.layer.\1.intermediate.dense.\2"),
    (rf"{_LAYER}\.ffn\.lin2{_KIND}", r"encoder.layer.\1.output.dense.\2"),
    (rf"{_LAYER}\.output_layer_norm{_KIND}", r"encoder.layer.\1.output.LayerNorm.\2"),
    (rf"vocab_transform{_KIND}", r"cls.predictions.transform.dense.\1"),
    (rf"vocab_layer_norm{_KIND}", r"cls.predictions.transform.LayerNorm.\1"),
    (r"vocab_projector\.weight", "cls.predictions.decoder.weight"),
    (r"vocab_projector\.bias", "cls.predictions.bias"),
)
_ROBERTA_NAMES = (
    (rf"lm_head\.dense{_KIND}", r"cls.predictions.transform.dense.\1"),
    (rf"lm_head\.layer_norm{_KIND}", r"cls.predictions.transform.LayerNorm.\1"),
    (rf"lm_head\.(decoder{_KIND}|bias)", r"cls.predictions.\1"),
)


def as_bert_config(values: Mapping[str, Any]) -> BertConfig:
    """Return the BERT that computes what the encoder of a config.json does.

    Raises:
        ValueError: its layers are not BERT's, or it has none.
    """
    kind = values.get("model_type", "bert")
    layers = values.get("n_layers" if kind == "distilbert" else "num_hidden_layers", 1)
    if kind in BERT_SHAPED and (not isinstance(layers, int) or layers < 1):
        raise ValueError(f"a {kind!r} model with {layers!r} layers; choose one with at least one")
    if kind == "bert":
        return BertConfig.from_dict(dict(values))
    if kind in _ROBERTA:
        roberta: Any = RobertaConfig.from_dict({**values, "model_type": "roberta"})
        further: dict[str, Any] = {key: values[key] for key in _READ_BY_NAME if key in values}
        return BertConfig(
            **{name: getattr(roberta, name) for name in (*_SAME, "intermediate_size", "hidden_act", "layer_norm_eps")},
            max_position_embeddings=roberta.max_position_embeddings - roberta.pad_token_id - 1,
            type_vocab_size=roberta.type_vocab_size,
            **further,
        )
    if kind == "distilbert":
        distilled: Any = DistilBertConfig.from_dict(dict(values))
        return BertConfig(
            **{name: getattr(distilled, name) for name in (*_SAME, "max_position_embeddings")},
            intermediate_size=distilled.hidden_dim,
            hidden_act=distilled.activation,
            type_vocab_size=1,
        )
    raise ValueError(f"a {kind!r} model, whose layers are not those of a BERT ({', '.join(BERT_SHAPED)})")


def with_bert_names(state: dict[str, Tensor], model_type: str, pad_token_id: int) -> dict[str, Tensor]:
    """Return weights under BERT's names, without the positions that RoBERTa does not use.

    Args:
        state: weights under the names of `model_type`.
        model_type: one of `BERT_SHAPED`.
        pad_token_id: of RoBERTa, whose positions begin after it.
    """
    if model_type in _ROBERTA:
        renamed = _renamed(state, "roberta.", _ROBERTA_NAMES)
        if _POSITIONS in renamed:
            renamed[_POSITIONS] = renamed[_POSITIONS][pad_token_id + 1 :]
        return renamed
    if model_type == "distilbert":
        renamed = _renamed(state, "distilbert.", _DISTILBERT_NAMES)
        if _POSITIONS in renamed:
            renamed[_TOKEN_TYPES] = torch.zeros(1, renamed[_POSITIONS].shape[1])
        return renamed
    names = {key: key.removeprefix("bert.") for key in state}
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        names = {key: name.replace(old, new) for key, name in names.items()}  # the first BERT release
    return {names[key]: value for key, value in state.items()}


def _renamed(state: dict[str, Tensor], prefix: str, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Rename keys by patterns for the whole key, the prefix removed; others keep their names."""
    renamed = {}
    for key, value in state.items():
        plain = key.removeprefix(prefix)
        found = (match.expand(ours) for theirs, ours in names if (match := re.fullmatch(theirs, plain)))
        renamed[next(found, plain)] = value
    return renamed
