"""The text encoder: the lower layers of a Hugging Face BERT, and its weights.

Legend: B batch, L text tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mamo.hub import hub_folder
from mamo.models.attention import BERT_ATTENTION
from mamo.models.fusion import FusionEncoder, PostNormLayer
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
            have exactly as many layers as text encoder and fusion together.
    """
    path = Path(source) if Path(source).exists() else _download(source)
    _check_heads(path, text_encoder, fusion)
    state = {_modern_name(key): value for key, value in read_weights(path).items()}
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


def _check_heads(path: Path, text_encoder: TextEncoder, fusion: FusionEncoder | None) -> None:
    """Compare the number of attention heads, which weight shapes do not show, with a config.json in the folder."""
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.is_file():
        return
    theirs = bert_config_from(str(config_file.parent)).num_attention_heads
    ours = {"text encoder": text_encoder.bert.config.num_attention_heads}
    if fusion is not None:
        ours["fusion"] = fusion.heads
    for part, heads in ours.items():
        if heads != theirs:
            raise ValueError(f"{config_file} has {theirs} attention heads, the {part} has {heads}: make them equal")


def _download(source: str) -> Path:
    """Download a hub repository's configuration and weights, .safetensors where it has them."""
    try:
        return hub_folder(source, ("*.safetensors",), ("config.json",))
    except ValueError:
        return hub_folder(source, ("pytorch_model*.bin",), ("config.json",))
