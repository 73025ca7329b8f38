"""Start a network from a whole CLIP or SigLIP: both towers, the projections of ITC and its temperature."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mamo.hub import hub_folder
from mamo.models.clip_text import ClipTextTower, SiglipTextTower
from mamo.models.convert_clip_text import OPEN_CLIP_CONFIG, ClipWeights, clip_weights
from mamo.models.image_encoder import ImageEncoder, load_image_weights
from mamo.models.vlm import Mamo
from mamo.models.weights import WeightReport, check_keys, read_weights

_FILES = ("model.safetensors", "open_clip_model.safetensors")
"""A repository may hold both, of the same weights."""


def load_clip(network: Mamo, source: str) -> WeightReport:
    """Fill both towers, the projections of ITC and the temperature; the fusion and the other heads stay as they are.

    SigLIP's image feature is that of its attention pooling (`model.image.pooling: attention`). Without that the image
    projection stays new.

    Args:
        network: filled in place. Its image tower computes what the one of the file does, by its name.
        source: a folder or a file in one, or a hub name, in the layout of transformers or open_clip.

    Raises:
        ValueError: a tower is of another kind, or naming the keys that are missing, unused or of another shape.
    """
    backbone = network.backbone
    if not isinstance(backbone.image_encoder, ImageEncoder) or not isinstance(backbone.text_encoder, ClipTextTower):
        raise ValueError(f"model.clip: {source} needs a timm ViT and no other text tower; remove their module:Class")
    path = clip_path(source)
    found = clip_weights(read_weights(path))
    if "image" not in found.projections and backbone.image_encoder.vit.attn_pool is not None:
        found.projections["image"] = torch.eye(backbone.image_encoder.width), None  # SigLIP's feature is what it pools
    check_projections(found, backbone.image_projection, backbone.text_projection, source)
    text = load_clip_text(backbone.text_encoder, found, source)
    image = load_image_weights(backbone.image_encoder, str(path))
    loaded, new = [*image.loaded, *text.loaded], [f"fusion.{name}" for name, _ in backbone.fusion.named_parameters()]
    with torch.no_grad():
        for name, projection in (("image", backbone.image_projection), ("text", backbone.text_projection)):
            if name in found.projections:
                weight, bias = found.projections[name]
                projection.weight.copy_(weight)
                projection.bias.copy_(torch.zeros_like(projection.bias) if bias is None else bias)
            (loaded if name in found.projections else new).append(f"{name}_projection")
        for name, value in (("temperature", found.temperature), ("itc_bias", found.bias)):
            if (head := network.get_head(name)) is not None and value is not None:
                head.fill_(value)
                loaded.append(name)
    return WeightReport(tuple(loaded), interpolated=image.interpolated, new=(*text.new, *new))


def clip_path(source: str) -> Path:
    """Return the folder or file of weights at a path or hub name; of two layouts in one folder that of transformers."""
    path = Path(source)
    if not path.exists():
        path = hub_folder(source, _FILES, ("config.json", OPEN_CLIP_CONFIG))
    has_config = (path / "config.json").is_file() if path.is_dir() else False
    files = _FILES if has_config else _FILES[::-1]
    return next((path / name for name in files if (path / name).is_file()), path)


def check_projections(found: ClipWeights, image: nn.Linear, text: nn.Linear, source: str) -> None:
    """Raise ValueError where the shared space is not as wide as the network's."""
    for name, own in (("image", image), ("text", text)):
        if name in found.projections and found.projections[name][0].shape != own.weight.shape:
            theirs = found.projections[name][0].shape
            raise ValueError(
                f"model.clip: the {name} projection of {source} is {list(theirs)}, here {list(own.weight.shape)}; set "
                f"model.itc_width={theirs[0]}"
            )


def load_clip_text(tower: ClipTextTower, found: ClipWeights, source: str) -> WeightReport:
    """Fill a text tower. Words that were added to the vocabulary, such as [MASK], keep their initial values.

    Raises:
        ValueError: naming the keys that are missing, unused or of another shape.
    """
    kind = "siglip" if isinstance(tower, SiglipTextTower) else "clip"
    if found.kind not in ("", kind):
        raise ValueError(f"{source}: config.json says model_type {kind}, the weights are those of a {found.kind}")
    wanted: dict[str, Tensor] = dict(tower.state_dict())
    words = found.tower.get("words.weight")
    new: tuple[str, ...] = ()
    if words is not None and len(words) < len(wanted["words.weight"]):
        new = (f"words.weight[{len(words)}:]",)
        wanted["words.weight"] = wanted["words.weight"][: len(words)]
    check_keys(found.tower, wanted, source)
    for name, view in wanted.items():
        view.copy_(found.tower[name])
    return WeightReport(tuple(wanted), new=new)
