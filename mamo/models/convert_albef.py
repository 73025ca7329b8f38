"""Load checkpoints of the public ALBEF implementation (Li et al. 2021).

Its file holds the network, a momentum copy of it (names with `_m`), and queues. Supported is the layout of pre-training
and of the fine-tuned retrieval models. The models of other tasks have further parts and are refused.
"""

import math
import re
from pathlib import Path

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from mamo.models.cross_fusion import CrossFusion, CrossLayer
from mamo.models.heads import MLMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone, Mamo
from mamo.models.weights import WeightReport, check_keys, read_weights

_POSITIONS = "visual_encoder.pos_embed"
_NEVER_READ = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "text_encoder.embeddings.position_ids")
_HEADS = ("itm_head.", "text_encoder.cls.", "vision_proj.", "text_proj.", "temp")
"""Keys of heads, which file and network need not both have: their losses may be off."""


def load_albef(path: Path, network: Mamo, teacher: Backbone, teacher_mlm: MLMHead | None = None) -> WeightReport:
    """Load an ALBEF checkpoint into a network with cross-attention fusion, and into its teacher.

    Positions of patches are resampled (bicubic) where the image size differs. The queues are not loaded: they hold
    features of other data, and refill. Without a momentum copy in the file the teacher starts as a copy of the student.

    Args:
        path: `.pth` as published (only tensors are read, no code is run) or `.safetensors`, with the same names.
        network: filled in place; unchanged when an error is raised, and so is the teacher.
        teacher: the teacher's backbone.
        teacher_mlm: the teacher's masked-word head, if it has one.

    Returns:
        ALBEF's names of the loaded, interpolated and unused tensors, and our names of the new ones.

    Raises:
        ValueError: the file is unreadable or has another layout or other sizes; names what is missing, unused or
            differs.
    """
    backbone = network.backbone
    if not isinstance(backbone.fusion, CrossFusion):
        raise ValueError(f"{path}: ALBEF's weights need model.fusion_type: cross")
    if not isinstance(backbone.image_encoder, ImageEncoder) or not isinstance(backbone.text_encoder, TextEncoder):
        raise ValueError(f"{path}: ALBEF's weights need a timm ViT and a BERT")
    # a fine-tuned model's text encoder has no MLM head, and so its keys lack the level `bert`
    plain = re.compile(r"^(text_encoder(_m)?)\.bert\.")
    state = {plain.sub(r"\1.", key): value for key, value in read_weights(path).items()}
    online, momentum = _split(state)
    _check_tie(online, path)
    wanted = _views(backbone, network.get_head("mlm"))
    if (itm := network.get_head("itm")) is not None:
        wanted |= _prefixed("itm_head.", itm.classifier)
    if (temperature := network.get_head("temperature")) is not None:
        wanted["temp"] = temperature.detach()
    report = _prepare(online, wanted, backbone, path)
    _check_tie(momentum, path)
    copies = _views(teacher, teacher_mlm)
    copied = _prepare(momentum, copies, teacher, path) if momentum else WeightReport(())
    for key in report.loaded:
        wanted[key].copy_(online[key])
    for key, view in copies.items():
        view.copy_(momentum[key] if key in copied.loaded else wanted[key])
    left_out = [key for key in state if key in _NEVER_READ]
    ours = [name for name in ("mim", "mrm_image", "mrm_text") if network.get_head(name) is not None]
    return WeightReport(
        loaded=(*report.loaded, *(f"momentum {key}" for key in copied.loaded)),
        interpolated=(*report.interpolated, *(f"momentum {key}" for key in copied.interpolated)),
        new=(*report.new, *ours),
        unused=(*report.unused, *(f"momentum {key}" for key in copied.unused), *left_out),
    )


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors into those of the network and of its momentum copy, the latter under the former's names."""
    online: dict[str, Tensor] = {}
    momentum: dict[str, Tensor] = {}
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        plain = f"{first.removesuffix('_m')}{dot}{rest}"
        if plain not in _NEVER_READ:
            (momentum if first.endswith("_m") else online)[plain] = value
    return online, momentum


def _check_tie(state: dict[str, Tensor], path: Path) -> None:
    """Remove the MLM head's decoder; raise ValueError unless it repeats the word embeddings and the head's bias."""
    for copy, original in (("decoder.weight", "embeddings.word_embeddings.weight"), ("decoder.bias", None)):
        repeated = state.pop(f"text_encoder.cls.predictions.{copy}", None)
        origin = state.get(f"text_encoder.{original or 'cls.predictions.bias'}")
        if repeated is not None and (origin is None or not torch.equal(repeated, origin)):
            raise ValueError(f"{path}: cls.predictions.{copy} differs from what it shares; this is not an ALBEF file")


def _views(backbone: Backbone, mlm: MLMHead | None) -> dict[str, Tensor]:
    """Return views of a network's memory under ALBEF's names."""
    assert isinstance(backbone.image_encoder, ImageEncoder)
    assert isinstance(backbone.text_encoder, TextEncoder)
    text = backbone.text_encoder.bert
    views = _prefixed("visual_encoder.", backbone.image_encoder.vit)
    views |= _prefixed("text_encoder.", text)
    for index, layer in enumerate(backbone.fusion.layers, start=len(text.encoder.layer)):
        assert isinstance(layer, CrossLayer)
        views |= {
            f"text_encoder.encoder.layer.{index}.{name}": view for name, view in layer.bert_named_tensors().items()
        }
    views |= _prefixed("vision_proj.", backbone.image_projection) | _prefixed("text_proj.", backbone.text_projection)
    if mlm is not None:
        views |= {f"text_encoder.cls.predictions.{name}": view for name, view in mlm.bert_named_tensors().items()}
    return views


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def _prepare(found: dict[str, Tensor], wanted: dict[str, Tensor], backbone: Backbone, path: Path) -> WeightReport:
    """Resample `found` to the backbone's image size, and check that its tensors fit `wanted`, heads excepted."""
    interpolated = []
    positions, grid = found.get(_POSITIONS), backbone.image_encoder.grid
    num_prefix_tokens = backbone.image_encoder.num_prefix_tokens
    side = 0 if positions is None else math.isqrt(max(0, positions.shape[1] - num_prefix_tokens))
    is_square = positions is not None and side * side == positions.shape[1] - num_prefix_tokens
    if positions is not None and is_square and (side, side) != grid:  # ALBEF's images are square
        found[_POSITIONS] = resample_abs_pos_embed(
            positions,
            new_size=list(grid),
            old_size=[side, side],
            num_prefix_tokens=num_prefix_tokens,
            antialias=False,  # as ALBEF's own code does
        )
        interpolated.append(_POSITIONS)
    new = tuple(key for key in wanted if key.startswith(_HEADS) and key not in found)
    unused = tuple(key for key in found if key.startswith(_HEADS) and key not in wanted)
    check_keys(
        {key: value for key, value in found.items() if key not in unused},
        {key: value for key, value in wanted.items() if key not in new},
        str(path),
    )
    loaded = tuple(key for key in wanted if key not in new)
    return WeightReport(loaded=loaded, interpolated=tuple(interpolated), new=new, unused=unused)
