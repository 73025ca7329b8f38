"""Text encoders of published kinds, by their configuration: build one, and load its weights."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import BertConfig, CLIPTextConfig, ModernBertConfig, PretrainedConfig, SiglipTextConfig

from mamo.config.schema import RunConfig
from mamo.hub import hub_folder
from mamo.models.clip_start import clip_path, load_clip_text
from mamo.models.clip_text import ClipTextTower, SiglipTextTower
from mamo.models.convert_clip_text import (
    CLIP_KINDS,
    OPEN_CLIP_CONFIG,
    SIGLIP_KINDS,
    clip_text_config,
    clip_weights,
    open_clip_text_config,
)
from mamo.models.fusion import LAYER_NORM_EPS, FusionEncoder
from mamo.models.heads import MLMHead
from mamo.models.modernbert import ModernBertTower, load_modernbert
from mamo.models.text_encoder import (
    PublishedTextTower,
    TextEncoder,
    config_values,
    download_weights,
    load_bert_weights,
)
from mamo.models.text_layouts import BERT_SHAPED, FUSION_EPS, as_bert_config
from mamo.models.weights import WeightReport, read_weights

logger = logging.getLogger(__name__)


def text_config_from(source: str) -> PretrainedConfig:
    """Read the configuration of a text encoder of any supported kind; one with BERT's layers as a BERT's.

    Raises:
        ValueError: there is none at the folder or hub name `source`, or it is of another kind.
    """
    path = Path(source)
    if not path.exists():
        path = hub_folder(source, ("config.json", OPEN_CLIP_CONFIG))
    path = path if path.is_dir() else path.parent
    if (path / OPEN_CLIP_CONFIG).is_file() and not (path / "config.json").is_file():
        return open_clip_text_config(path / OPEN_CLIP_CONFIG)
    values = config_values(str(path))
    kind = values.get("model_type", "bert")
    with refused_sizes(source):
        if kind in BERT_SHAPED:
            return as_bert_config(values)
        if kind == "modernbert":
            return ModernBertConfig.from_dict(values)
        if kind in (*CLIP_KINDS, *SIGLIP_KINDS):
            return clip_text_config(values)
    known = (*BERT_SHAPED, "modernbert", *CLIP_KINDS[:1], *SIGLIP_KINDS[:2])
    raise ValueError(f"{source!r} describes a {kind!r} model; use one of {', '.join(known)}")


@contextlib.contextmanager
def refused_sizes(source: str | None) -> Iterator[None]:
    """Name the folder of a config whose values transformers cannot use; it raises errors of any kind for them.

    Raises:
        ValueError: in place of an error within the block, if there is a `source`.
    """
    try:
        yield
    except Exception as error:
        if source is None:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"{source}: a value of its config.json cannot be used: {reason or type(error).__name__}"
        ) from None


def text_config_of(config: RunConfig, vocabulary_size: int, pad_token_id: int) -> PretrainedConfig:
    """Return the configuration of a config's text encoder: the published one's, or a BERT of `model.text`'s sizes.

    The vocabularies of CLIP and SigLIP grow by the tokens that were added to their tokenizers, such as [MASK].

    Raises:
        ValueError: the named encoder has too few words or positions for the tokenizer or the text length.
    """
    text, source = config.model.text, config.model.text_source
    if source is None:
        found: Any = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=text.width,
            num_attention_heads=text.heads,
            intermediate_size=text.mlp_width,
            max_position_embeddings=max(512, config.data.text_max_tokens),
            pad_token_id=pad_token_id,
        )
    else:
        found = text_config_from(source)
        if isinstance(found, CLIPTextConfig | SiglipTextConfig):
            found.vocab_size = max(found.vocab_size, vocabulary_size)
            found.pad_token_id = pad_token_id
        if found.vocab_size < vocabulary_size:
            raise ValueError(
                f"model.text.bert: {source} has {found.vocab_size} words, the tokenizer of data.tokenizer "
                f"({config.data.tokenizer}) has {vocabulary_size}; use the tokenizer that belongs to it"
            )
        if isinstance(found, BertConfig) and text.weights == "bert":
            setattr(found, FUSION_EPS, found.layer_norm_eps)  # which its upper layers have
        if found.max_position_embeddings < config.data.text_max_tokens:
            raise ValueError(
                f"data.text_max_tokens: {config.data.text_max_tokens} is more than the "
                f"{found.max_position_embeddings} positions of {source} (model.text.bert)"
            )
    kinds = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "embedding_dropout")
    for key in (*kinds, "mlp_dropout"):
        if hasattr(found, key):
            setattr(found, key, config.model.dropout)
    sized: PretrainedConfig = found
    return sized


def fusion_sizes(config: Any) -> dict[str, Any]:
    """Return width, heads, MLP width and epsilon of a fusion whose layers could be the encoder's upper ones.

    Layers of another kind than BERT's cannot be: then the MLP is four times as wide as the tokens.
    """
    is_bert = isinstance(config, BertConfig)
    return {
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size if is_bert else 4 * config.hidden_size,
        "layer_norm_eps": getattr(config, FUSION_EPS, LAYER_NORM_EPS),
    }


def build_text_tower(config: PretrainedConfig, layers: int) -> PublishedTextTower:
    """Build a text encoder with random weights: the lower `layers` of a BERT, all layers of another kind."""
    if isinstance(config, ModernBertConfig):
        return ModernBertTower(config)
    if isinstance(config, SiglipTextConfig):
        return SiglipTextTower(config)
    if isinstance(config, CLIPTextConfig):
        return ClipTextTower(config)
    assert isinstance(config, BertConfig)
    return TextEncoder(config, layers)


def load_text_weights(
    tower: PublishedTextTower, fusion: FusionEncoder, source: str, mlm_head: MLMHead | None
) -> WeightReport:
    """Load the weights at a folder, file or hub name into a text encoder; into fusion and head as `load_bert_weights`.

    The fusion keeps its initial values where the encoder's layers are not BERT's, which is logged.
    """
    if isinstance(tower, TextEncoder):
        return load_bert_weights(tower, fusion, source, mlm_head)
    logger.info("fusion starts anew: layers of %s are not BERT's", source)
    if isinstance(tower, ClipTextTower):
        return load_clip_text(tower, clip_weights(read_weights(clip_path(source))), source)
    assert isinstance(tower, ModernBertTower)
    return load_modernbert(tower, Path(source) if Path(source).exists() else download_weights(source))
