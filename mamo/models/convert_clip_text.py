"""Configurations and weights of CLIP's and SigLIP's text towers and projections, of transformers and of open_clip.

Legend: D width, E width of the shared space.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, SiglipTextConfig

CLIP_KINDS = ("clip", "clip_text_model")
SIGLIP_KINDS = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")
OPEN_CLIP_CONFIG = "open_clip_config.json"
_KIND = r"\.(weight|bias)"
_HF_LAYER, _OC_LAYER = r"encoder\.layers\.(\d+)", r"transformer\.resblocks\.(\d+)"
_NAMES = (
    (r"embeddings\.token_embedding\.weight", "words.weight"),
    (r"embeddings\.position_embedding\.weight", "positions"),
    (rf"{_HF_LAYER}\.layer_norm([12]){_KIND}", r"blocks.\1.norm\2.\3"),
    (rf"{_HF_LAYER}\.self_attn\.qkv{_KIND}", r"blocks.\1.qkv.\2"),
    (rf"{_HF_LAYER}\.self_attn\.out_proj{_KIND}", r"blocks.\1.out.\2"),
    (rf"{_HF_LAYER}\.mlp\.(fc[12]){_KIND}", r"blocks.\1.\2.\3"),
    (rf"final_layer_norm{_KIND}", r"norm.\1"),
    (r"token_embedding\.weight", "words.weight"),
    (r"positional_embedding", "positions"),
    (rf"{_OC_LAYER}\.ln_([12]){_KIND}", r"blocks.\1.norm\2.\3"),
    (rf"{_OC_LAYER}\.attn\.in_proj_(weight|bias)", r"blocks.\1.qkv.\2"),
    (rf"{_OC_LAYER}\.attn\.out_proj{_KIND}", r"blocks.\1.out.\2"),
    (rf"{_OC_LAYER}\.mlp\.c_fc{_KIND}", r"blocks.\1.fc1.\2"),
    (rf"{_OC_LAYER}\.mlp\.c_proj{_KIND}", r"blocks.\1.fc2.\2"),
    (rf"ln_final{_KIND}", r"norm.\1"),
)
_PROJECTIONS = {
    "text_projection.weight": "text", "text_model.head.weight": "text", "text.text_projection.weight": "text",
    "visual_projection.weight": "image",
}  # fmt: skip
_TRANSPOSED = {"text_projection": "text", "text.text_projection": "text", "visual.proj": "image"}
"""open_clip's projections, stored [D, E]."""
_OTHER_PARTS = ("visual.", "vision_model.", "logit_scale", "logit_bias")
_BUFFERS = ("position_ids", "attn_mask")


@dataclass(frozen=True)
class ClipWeights:
    """Parts of a CLIP or SigLIP outside the image tower."""

    tower: dict[str, Tensor]
    """Under the names of `ClipTextTower`."""
    projections: dict[str, tuple[Tensor, Tensor | None]]
    """`image` and `text`, as far as the model has them: weight [E, D], bias [E]."""
    temperature: float | None
    """1 / scale of the similarities."""
    bias: float | None
    """Of SigLIP's logits."""
    kind: str
    """`clip` or `siglip`, by parts that only one of them has; empty where the file has neither."""


def clip_text_config(values: Mapping[str, Any]) -> CLIPTextConfig | SiglipTextConfig:
    """Return the text tower's configuration of a config.json of transformers, of a whole model or of the tower."""
    inner = values.get("text_config", values)
    kind = SiglipTextConfig if values.get("model_type") in SIGLIP_KINDS else CLIPTextConfig
    unread = {"bos_token_id": None, "eos_token_id": None}  # of another vocabulary in some files
    return kind.from_dict({**(inner or {}), **unread, "model_type": kind.model_type})


def open_clip_text_config(file: Path) -> CLIPTextConfig | SiglipTextConfig:
    """Return the text tower's configuration of an ``open_clip_config.json``.

    Raises:
        ValueError: the file is no such config, or its text tower is not CLIP's or SigLIP's.
    """
    try:
        model = json.loads(file.read_text("utf-8"))["model_cfg"]
        text = model["text_cfg"]
        sizes = {
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text.get("context_length", 77),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: no config of an open_clip model with a text tower of its own") from None
    if text.get("hf_model_name"):
        raise ValueError(f"{file}: its text tower is {text['hf_model_name']}; name that in model.text.bert")
    if text.get("no_causal_mask"):
        eps = text.get("norm_kwargs", {}).get("eps", 1e-5)
        act = "gelu_pytorch_tanh" if text.get("act_kwargs", {}).get("approximate") == "tanh" else "gelu"
        return SiglipTextConfig(**sizes, bos_token_id=None, eos_token_id=None, layer_norm_eps=eps, hidden_act=act)
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return CLIPTextConfig(**sizes, bos_token_id=None, eos_token_id=None, hidden_act=act)


def clip_weights(state: dict[str, Tensor]) -> ClipWeights:
    """Sort the tensors of a whole CLIP or SigLIP, or of its text tower, without those of the image tower.

    A key of the text tower that is not known stays as it is, so that the caller refuses it.
    """
    tower: dict[str, Tensor] = {}
    projections: dict[str, tuple[Tensor, Tensor | None]] = {}
    biases = {f"{name.removesuffix('weight')}bias" for name in _PROJECTIONS}
    for key, value in _joined(state).items():
        if key in _PROJECTIONS:
            projections[_PROJECTIONS[key]] = value, state.get(f"{key.removesuffix('weight')}bias")
        elif key in _TRANSPOSED:
            projections[_TRANSPOSED[key]] = value.t(), None
        elif not key.startswith(_OTHER_PARTS) and not key.endswith(_BUFFERS) and key not in biases:
            plain = key.removeprefix("text_model.").removeprefix("text.")
            found = (match.expand(ours) for theirs, ours in _NAMES if (match := re.fullmatch(theirs, plain)))
            tower[next(found, key)] = value
    scale, bias = state.get("logit_scale"), state.get("logit_bias")
    is_siglip = bias is not None or bool({"text_model.head.weight", "head.weight"} & state.keys())
    is_clip = any(key.split(".")[-1] == "text_projection" or "text_projection.weight" in key for key in state)
    kind = "siglip" if is_siglip else "clip" if is_clip else ""
    return ClipWeights(
        tower,
        projections,
        None if scale is None else float(torch.exp(-scale.float())),
        None if bias is None else float(bias),
        kind,
    )


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value of each layer of the text tower, in this order, under `qkv`."""
    joined = dict(state)
    for key in state:
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in key and not key.startswith("vision_model.") and all(part in state for part in parts):
            joined[key.replace(".q_proj.", ".qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined
