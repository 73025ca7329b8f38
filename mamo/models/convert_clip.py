"""Convert CLIP and SigLIP image towers from transformers' layout to timm's, and check them against their config.json.

Legend: D width, P patches.
"""

import re
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.activations import ACT2FN

_PREFIXES = ("vision_model.", "")
"""Prefixes of the tower's keys: in a whole model, and in a tower that transformers 5 saved by itself."""
_LAYER, _KIND = r"encoder\.layers\.(\d+)\.", r"\.(weight|bias)"
_NAMES = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (rf"embeddings\.patch_embedding{_KIND}", r"patch_embed.proj.\1"),
    (rf"pre_layrnorm{_KIND}", r"norm_pre.\1"),  # spelt so in transformers
    (rf"post_layernorm{_KIND}", r"norm.\1"),
    (rf"{_LAYER}layer_norm([12]){_KIND}", r"blocks.\1.norm\2.\3"),
    (rf"{_LAYER}mlp\.(fc[12]){_KIND}", r"blocks.\1.mlp.\2.\3"),
    (rf"{_LAYER}self_attn\.out_proj{_KIND}", r"blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}self_attn\.qkv{_KIND}", r"blocks.\1.attn.qkv.\2"),  # as `_joined` names it
    (r"head\.probe", "attn_pool.latent"),
    (rf"head\.attention\.(q|kv){_KIND}", r"attn_pool.\1.\2"),  # as `_joined` names them
    (rf"head\.attention\.out_proj{_KIND}", r"attn_pool.proj.\1"),
    (rf"head\.layernorm{_KIND}", r"attn_pool.norm.\1"),
    (rf"head\.mlp\.(fc[12]){_KIND}", r"attn_pool.mlp.\1.\2"),
)
_NON_TOWER_KEYS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_POSITION_IDS, _HEAD = "embeddings.position_ids", "head."
"""A buffer of old files; SigLIP's attention pooling."""
SAME_FUNCTION = 2e-3
"""Tolerance: GELU and its tanh approximation (SigLIP's) differ by 0.0005 at most, GELU and QuickGELU by 0.02."""


def from_transformers(
    state: dict[str, Tensor], *, has_pooling: bool = False
) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Return the tower's weights under timm's names, and the keys outside the tower; None for another layout.

    Positions are [1, num_prefix_tokens + P, D], as stored. A key without a counterpart in timm stays as it is, so that
    the caller refuses it. SigLIP's attention pooling is in the tower where ``has_pooling``, else outside.
    """
    prefix = next((start for start in _PREFIXES if f"{start}embeddings.patch_embedding.weight" in state), None)
    if prefix is None:
        return None
    unused = (_POSITION_IDS,) if has_pooling else (_POSITION_IDS, _HEAD)
    starts = (*_NON_TOWER_KEYS, *(prefix + name for name in unused))
    non_tower_keys = tuple(sorted(key for key in state if key.startswith(starts)))
    tower: dict[str, Tensor] = {}
    for key, value in _joined({key: value for key, value in state.items() if key not in non_tower_keys}).items():
        name = _timm_name(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        tower[name or key] = value
    return tower, non_tower_keys


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value of each layer, in this order, under `qkv`; leave incomplete ones as they are.

    The joined ones of the attention pooling are split into query, and key with value.
    """
    joined = dict(state)
    for key in state:
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in key and all(part in state for part in parts):
            joined[key.replace(".q_proj.", ".qkv.")] = torch.cat([joined.pop(part) for part in parts])
        elif key.endswith(("head.attention.in_proj_weight", "head.attention.in_proj_bias")):
            start, _, kind = key.rpartition("in_proj_")
            joined[f"{start}q.{kind}"], joined[f"{start}kv.{kind}"] = joined.pop(key).tensor_split(
                [len(state[key]) // 3]
            )
    return joined


def _timm_name(name: str) -> str | None:
    """Return timm's name of a key without prefix; None for one without a counterpart."""
    found = (match.expand(ours) for theirs, ours in _NAMES if (match := re.fullmatch(theirs, name)))
    return next(found, None)


def check_config(source: Path, vit: VisionTransformer | Eva) -> None:
    """Check, against a config.json in the weights' folder, the differences that weight shapes cannot show.

    Raises:
        ValueError: another number of attention heads, layer-norm epsilon or activation than the encoder's.
    """
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        return
    try:
        values, _ = CLIPVisionConfig.get_config_dict(file.parent)
        kind = SiglipVisionConfig if str(values.get("model_type")).startswith("siglip") else CLIPVisionConfig
        theirs = kind.from_dict(values.get("vision_config", values))
        act = ACT2FN[theirs.hidden_act]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no config of a CLIP or SigLIP: {error}; remove it to read the weights") from None
    block: Any = vit.blocks[0]
    if theirs.num_attention_heads != block.attn.num_heads:
        raise ValueError(
            f"{file} has {theirs.num_attention_heads} attention heads, the image encoder has {block.attn.num_heads}: "
            f"set model.image.heads={theirs.num_attention_heads}"
        )
    if theirs.layer_norm_eps != block.norm1.eps:
        raise ValueError(
            f"{file} has layer_norm_eps {theirs.layer_norm_eps}, the image encoder {block.norm1.eps}: name another, "
            "vit_*_clip_* for a CLIP, vit_*_siglip_* for a SigLIP"
        )
    x = torch.linspace(-8, 8, 1001)
    if float((act(x) - block.mlp.act(x)).abs().max()) > SAME_FUNCTION:
        raise ValueError(
            f"{file} has the activation {theirs.hidden_act!r}, the image encoder {block.mlp.act}: name another, for "
            "quick_gelu one of vit_*_clip_quickgelu_*"
        )
