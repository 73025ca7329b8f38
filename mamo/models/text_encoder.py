"""The text encoder: the lower layers of a Hugging Face BERT, and its weights.

Legend: B batch, L text tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.activations import ACT2FN

from mamo.hub import hub_folder
from mamo.models.attention import BERT_ATTENTION
from mamo.models.convert_clip import SAME_FUNCTION
from mamo.models.fusion import LAYER_NORM_EPS, FusionEncoder, PostNormLayer
from mamo.models.heads import MLMHead
from mamo.models.init import init_by_fan_in
from mamo.models.towers import TextTower
from mamo.models.weights import WeightReport, check_keys, read_weights

# Parts of a BERT outside the encoder: the pre-training heads, the pooler, and a buffer of old files.
_HEAD_PREFIXES = ("cls.", "pooler.", "embeddings.position_ids")


class TextEncoder(TextTower):
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


def bert_config_from(source: str) -> BertConfig:
    """Read a BERT configuration from a folder with ``config.json``, or by hub name (needs network).

    Raises:
        ValueError: there is none, or it describes another family of models.
    """
    try:
        folder = Path(source) if Path(source).exists() else hub_folder(source, ("config.json",))
        values, _ = BertConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no BERT config at {source!r}: give a folder with config.json or a hub name ({error})"
        ) from None
    if values.get("model_type", "bert") != "bert":
        raise ValueError(f"{source!r} describes a {values['model_type']!r} model, not a BERT")
    config: BertConfig = BertConfig.from_dict(values)
    return config


def load_bert_weights(
    text_encoder: TextEncoder, fusion: FusionEncoder | None, source: str, mlm_head: MLMHead | None = None
) -> WeightReport:
    """Load BERT's embeddings and lower layers into the text encoder, its upper layers into the fusion layers.

    Args:
        text_encoder: filled in place.
        fusion: its layers are filled in place. Parameters that BERT lacks, such as cross-attention, keep their values
            and are reported as new. None where the text encoder has all layers.
        source: a folder or file of weights (.safetensors preferred; .bin and .pt are read with ``weights_only``), or
            a hub name (needs network). Keys may carry the prefix ``bert.`` and the old ``LayerNorm.gamma/beta``.
        mlm_head: filled from ``cls.predictions``; None loads no head.

    Raises:
        ValueError: naming the keys that are missing, unused (other than those of heads) or of another shape. BERT must
            have exactly as many layers as text encoder and fusion together. Or a config.json next to the weights says
            what their shapes do not show: other heads, another activation, epsilon or kind of positions; or the
            masked-word head has a decoder of its own.
    """
    path = Path(source) if Path(source).exists() else _download(source)
    _check_config(path, text_encoder, fusion, mlm_head)
    state = {_modern_name(key): value for key, value in read_weights(path).items()}
    if mlm_head is not None:
        _check_tie(state, source)
    wanted = dict(text_encoder.bert.state_dict())
    n_text = len(text_encoder.bert.encoder.layer)
    parameters = fusion.named_parameters() if fusion is not None else ()
    new = [name for name, _ in parameters if not name.startswith("layers.")]
    for index, layer in enumerate(fusion.layers if fusion is not None else ()):
        if not isinstance(layer, PostNormLayer):
            raise ValueError(f"a fusion layer of {type(layer).__name__} does not have the parameters of a BERT layer")
        for name, view in layer.bert_named_tensors().items():
            key = f"encoder.layer.{n_text + index}.{name}"
            if name.startswith("crossattention.") and key not in state:  # a plain BERT
                new.append(f"layers.{index}.{name}")
            else:
                wanted[key] = view
    if mlm_head is not None:
        wanted |= {f"cls.predictions.{name}": view for name, view in mlm_head.bert_named_tensors().items()}
    unused = tuple(key for key in state if key.startswith(_HEAD_PREFIXES) and key not in wanted)
    state = {key: value for key, value in state.items() if key not in unused}
    check_keys(state, wanted, source)
    for name, view in wanted.items():
        view.copy_(state[name])
    return WeightReport(loaded=tuple(wanted), new=tuple(new), unused=unused)


def _modern_name(key: str) -> str:
    """Rename a key of an old BERT file to its current form."""
    key = key.removeprefix("bert.")
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_config(
    path: Path, text_encoder: TextEncoder, fusion: FusionEncoder | None, mlm_head: MLMHead | None
) -> None:
    """Compare, with a config.json in the weights' folder, the differences that weight shapes do not show.

    Raises:
        ValueError: other attention heads; in the fusion or the masked-word head, which have BERT's own, another
            activation or layer-norm epsilon; positions that are not absolute, or a decoder.
    """
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.is_file():
        return
    theirs, ours = bert_config_from(str(config_file.parent)), text_encoder.bert.config
    heads = {"text encoder": ours.num_attention_heads} | ({} if fusion is None else {"fusion": fusion.heads})
    for part, n_heads in heads.items():
        if n_heads != theirs.num_attention_heads:
            raise ValueError(
                f"{config_file} has {theirs.num_attention_heads} attention heads, the {part} has {n_heads}: "
                "make them equal"
            )
    wanted: dict[str, object] = {"hidden_act": ours.hidden_act, "layer_norm_eps": ours.layer_norm_eps}
    if fusion is not None or mlm_head is not None:
        wanted = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
    wanted |= {"position_embedding_type": "absolute", "is_decoder": False}
    for key, value in wanted.items():
        found = getattr(theirs, key, value)
        if found != value and not (key == "hidden_act" and _is_same_function(str(found), str(value))):
            raise ValueError(f"{config_file} has {key}: {found}, the network {value}; choose a BERT with {value}")


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


def _download(source: str) -> Path:
    """Download a hub repository's configuration and weights, .safetensors where it has them."""
    try:
        return hub_folder(source, ("*.safetensors",), ("config.json",))
    except ValueError:
        return hub_folder(source, ("pytorch_model*.bin",), ("config.json",))
