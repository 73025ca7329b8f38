"""The text encoder: the lower layers of a Hugging Face BERT, RoBERTa or DistilBERT, and its weights.

Legend: B batch, L text tokens, D width, V vocabulary.
"""

import copy
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PretrainedConfig
from transformers.activations import ACT2FN

from mamo.hub import hub_folder
from mamo.models.attention import BERT_ATTENTION
from mamo.models.convert_clip import SAME_FUNCTION
from mamo.models.fusion import FusionEncoder, PostNormLayer
from mamo.models.heads import MLMHead
from mamo.models.init import init_by_fan_in
from mamo.models.text_layouts import as_bert_config, with_bert_names
from mamo.models.towers import TextTower
from mamo.models.weights import WeightReport, check_keys, read_weights

logger = logging.getLogger(__name__)

# Parts of a BERT outside the encoder: the heads of its tasks, the pooler, and a buffer of old files.
_HEAD_PREFIXES = (
    "cls.", "pooler.", "embeddings.position_ids", "classifier.", "pre_classifier.", "qa_outputs."
)  # fmt: skip


class PublishedTextTower(TextTower):
    """A text encoder of a published kind. ``config`` is its configuration, which a run keeps with its weights."""

    config: PretrainedConfig


class TextEncoder(PublishedTextTower):
    """The lower ``layers`` layers of ``transformers.BertModel``, without its pooler.

    Dropout is that of ``bert_config``; its ``num_hidden_layers`` is replaced by ``layers``.
    """

    def __init__(self, bert_config: BertConfig, layers: int) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"the text encoder needs at least one layer, not {layers}")
        config = copy.deepcopy(bert_config)
        config.num_hidden_layers = layers
        config._attn_implementation = BERT_ATTENTION
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.apply(init_by_fan_in)
        self.config: BertConfig = self.bert.config
        self.width: int = config.hidden_size

    @property
    def layers(self) -> Sequence[nn.Module]:
        """BERT's layers."""
        return list(self.bert.encoder.layer)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """See `TextTower.word_embeddings`."""
        embeddings: nn.Embedding = self.bert.embeddings.word_embeddings
        return embeddings

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed words and positions as BERT does: token ids int64 [..., L] -> float [..., L, D]."""
        embedded: Tensor = self.bert.embeddings(input_ids=input_ids.flatten(0, -2))
        return embedded.view(*input_ids.shape, -1)

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Run BERT's layers on embedded tokens float [B, L, D], with ``is_valid`` bool [B, L] -> float [B, L, D]."""
        mask = is_valid[:, None, None, :]  # [B, 1, 1, L]
        encoded: Tensor = self.bert.encoder(embedded, attention_mask=mask).last_hidden_state
        return encoded


def config_values(source: str) -> dict[str, Any]:
    """Read the configuration of a text encoder from a folder with ``config.json``, or by hub name (needs network).

    Raises:
        ValueError: there is none.
    """
    try:
        path = Path(source) if Path(source).exists() else hub_folder(source, ("config.json",))
        file = (path if path.is_dir() else path.parent) / "config.json"
        values = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); fetch it again") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no config of a text encoder at {source!r}: give a folder with config.json or a hub name ({error})"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: no JSON object; fetch it again")
    return values


def bert_config_from(source: str) -> BertConfig:
    """Read the configuration of a BERT, or of an encoder whose layers are BERT's, as a BERT's; see `config_values`.

    Raises:
        ValueError: there is none, or it describes another family of models.
    """
    values = config_values(source)
    try:
        return as_bert_config(values)
    except ValueError as error:
        raise ValueError(f"{source!r} describes {error}") from None


def load_bert_weights(
    text_encoder: TextEncoder, fusion: FusionEncoder | None, source: str, mlm_head: MLMHead | None = None
) -> WeightReport:
    """Load BERT's embeddings and lower layers into the text encoder, its upper layers into the fusion layers.

    Where the text encoder has all layers, the fusion keeps its initial values.

    Args:
        text_encoder: filled in place.
        fusion: its layers are filled in place. Parameters that BERT lacks, such as cross-attention, keep their values
            and are reported as new. None of a network without.
        source: a folder or file of weights (.safetensors preferred; .bin and .pt are read with ``weights_only``), or
            a hub name (needs network), of a BERT, RoBERTa, XLM-R or DistilBERT. Keys may carry the prefix of the family
            (``bert.``) and the old ``LayerNorm.gamma/beta``.
        mlm_head: filled from the masked-word head of the file, if that has one; None loads no head.

    Raises:
        ValueError: naming the keys that are missing, unused (other than those of heads) or of another shape, or the
            number of layers that fits. Or a config.json next to the weights says what their shapes do not show: other
            heads, another activation, epsilon or kind of positions; or the masked-word head has a decoder of its own.
    """
    path = Path(source) if Path(source).exists() else download_weights(source)
    kind = _check_config(path, text_encoder, fusion, mlm_head)
    state = with_bert_names(read_weights(path), kind, text_encoder.config.pad_token_id or 0)
    if mlm_head is not None:
        _check_tie(state, source)
    wanted = dict(text_encoder.bert.state_dict())
    new = [] if fusion is None else [name for name, _ in fusion.named_parameters() if not name.startswith("layers.")]
    n_text = len(text_encoder.layers)
    if _has_upper_layers(state, n_text, fusion, source):
        for index, layer in enumerate(fusion.layers if fusion is not None else ()):
            if not isinstance(layer, PostNormLayer):
                raise ValueError(
                    f"a fusion layer of {type(layer).__name__} does not have the parameters of a BERT layer"
                )
            for name, view in layer.bert_named_tensors().items():
                key = f"encoder.layer.{n_text + index}.{name}"
                if name.startswith("crossattention.") and key not in state:  # a plain BERT
                    new.append(f"layers.{index}.{name}")
                else:
                    wanted[key] = view
    elif fusion is not None:
        logger.info("fusion starts anew: the text encoder has all %d layers of %s", n_text, source)
        new = [name for name, _ in fusion.named_parameters()]
    if mlm_head is not None:
        head = {f"cls.predictions.{name}": view for name, view in mlm_head.bert_named_tensors().items()}
        has_head = any(key in state for key in head)
        wanted |= head if has_head else {}
        new += [] if has_head else [f"mlm.{name}" for name, _ in mlm_head.named_parameters()]
    unused = tuple(key for key in state if key.startswith(_HEAD_PREFIXES) and key not in wanted)
    state = {key: value for key, value in state.items() if key not in unused}
    check_keys(state, wanted, source)
    for name, view in wanted.items():
        view.copy_(state[name])
    return WeightReport(loaded=tuple(wanted), new=tuple(new), unused=unused)


def _has_upper_layers(state: dict[str, Tensor], n_text: int, fusion: FusionEncoder | None, source: str) -> bool:
    """Return whether a BERT has layers above the lower `n_text`, for the fusion.

    Raises:
        ValueError: it has another number than text encoder and fusion together; names the keys and numbers that fit.
    """
    found = (re.match(r"encoder\.layer\.(\d+)\.", key) for key in state)
    depth = max((int(match[1]) + 1 for match in found if match), default=n_text)
    if depth == n_text:
        return False
    if fusion is None:
        raise ValueError(
            f"weights of {source} have {depth} layers, the network {n_text}: set model.text.layers={depth}"
        )
    n_fusion = len([*fusion.layers])
    if depth != n_text + n_fusion:
        upper = f"model.fusion_layers={depth - n_text}, or " if depth > n_text else ""
        raise ValueError(
            f"weights of {source} have {depth} layers, model.text.layers {n_text} and model.fusion_layers {n_fusion} "
            f"are {n_text + n_fusion}: set {upper}model.text.layers={depth}, with which the fusion starts anew"
        )
    return True


def _check_config(path: Path, text_encoder: TextEncoder, fusion: FusionEncoder | None, mlm_head: MLMHead | None) -> str:
    """Compare, with a config.json in the weights' folder, the differences that weight shapes do not show.

    Returns:
        The `model_type` of the file; `bert` where it has none.

    Raises:
        ValueError: other attention heads; in the fusion or the masked-word head, which have BERT's own, another
            activation or layer-norm epsilon; positions that are not absolute, or a decoder.
    """
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.is_file():
        return "bert"
    theirs, ours = bert_config_from(str(config_file.parent)), text_encoder.config
    heads = {"text encoder": ours.num_attention_heads} | ({} if fusion is None else {"fusion": fusion.heads})
    for part, n_heads in heads.items():
        if n_heads != theirs.num_attention_heads:
            raise ValueError(
                f"{config_file} has {theirs.num_attention_heads} attention heads, the {part} has {n_heads}: "
                "make them equal"
            )
    wanted: dict[str, object] = {"hidden_act": ours.hidden_act, "layer_norm_eps": ours.layer_norm_eps}
    eps = mlm_head.norm.eps if mlm_head is not None else fusion.layer_norm_eps if fusion is not None else None
    if eps is not None:
        wanted = {"hidden_act": "gelu", "layer_norm_eps": eps}
    wanted |= {"position_embedding_type": "absolute", "is_decoder": False}
    for key, value in wanted.items():
        found = getattr(theirs, key, value)
        if found != value and not (key == "hidden_act" and _is_same_function(str(found), str(value))):
            raise ValueError(f"{config_file} has {key}: {found}, the network {value}; choose a BERT with {value}")
    return str(config_values(str(config_file.parent)).get("model_type", "bert"))


def _is_same_function(one: str, other: str) -> bool:
    """Return whether two activations agree up to `SAME_FUNCTION`; False for an unknown name."""
    if one not in ACT2FN or other not in ACT2FN:
        return False
    x = torch.linspace(-8, 8, 1001)
    return float((ACT2FN[one](x) - ACT2FN[other](x)).abs().max()) <= SAME_FUNCTION


def _check_tie(state: dict[str, Tensor], source: str) -> None:
    """Raise ValueError where the masked-word head's decoder repeats neither the word embeddings nor the head's bias."""
    for copy_key, key in (
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        repeated, origin = state.get(copy_key), state.get(key)
        if repeated is not None and origin is not None and not torch.equal(repeated, origin):
            raise ValueError(
                f"weights of {source}: {copy_key} differs from {key}, and this network's masked-word head shares the "
                "two; choose a BERT with tie_word_embeddings, or set losses.weights.mlm=0"
            )


def download_weights(source: str) -> Path:
    """Download a hub repository's configuration and weights, .safetensors where it has them."""
    try:
        return hub_folder(source, ("*.safetensors",), ("config.json",))
    except ValueError:
        return hub_folder(source, ("pytorch_model*.bin",), ("config.json",))
