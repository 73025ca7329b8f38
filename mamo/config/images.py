"""Keys about pictures: how they are augmented, and the image encoder."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from mamo.config.section import Positive, Section, Settings
from mamo.config.values import expand_path

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
GreyLevel = Annotated[int, Field(ge=0, le=255)]
_OF_CAPTIONS = ("word_dropout", "tag_subsets")
_UNUSED = {"scenes": ("shift_max", "zoom_max", "colour_jitter", "fill", *_OF_CAPTIONS), "records": _OF_CAPTIONS}
"""Keys of the augmentation that a source refuses."""


class AugmentationConfig(Section):
    """Training augmentation of real images; scenes are drawn, not augmented."""

    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Smallest area share of the random resized crop; 1 resizes the whole image."""
    horizontal_flip: bool = False
    """Mirror half of the images. Off by default: a mirrored image makes "left of" false."""
    randaugment: bool = False
    """Two random geometric or contrast operations (never colour), as ALBEF does."""
    shift_max: Share = 0.0
    """Largest random shift in each direction, as a share of the side; for small data."""
    zoom_max: Share = 0.0
    """Largest random change of size: an image becomes 1 / (1 + z) to 1 + z times as large."""
    colour_jitter: Share = 0.0
    """Largest random change of brightness, contrast and saturation, as a share; never of hue, which captions name."""
    fill: GreyLevel | list[GreyLevel] = 128
    """Colour that `randaugment`, `shift_max` and `zoom_max` move in: a grey level or [red, green, blue]."""
    word_dropout: Share = 0.0
    """Probability with which each word of a training caption is left out; one stays."""
    tag_subsets: bool = False
    """Train on random subsets, in their order, of the parts of captions that are comma-separated tags."""

    @field_validator("fill")
    @classmethod
    def _one_or_three(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, int) or len(value) == 3:
            return value
        raise ValueError("give one grey level or [red, green, blue]")

    def problems(self) -> Iterator[str]:
        """Yield a colour that nothing reads."""
        if self.fill != 128 and not (self.randaugment or self.shift_max or self.zoom_max):
            yield "fill: is read by randaugment, shift_max and zoom_max, which are off; remove it"

    def source_problems(self, source: str) -> Iterator[str]:
        """Yield the keys that contradict `data.source`."""
        for key in _UNUSED.get(source, ()):
            if getattr(self, key) != type(self).model_fields[key].default:
                kind = "drawn, not augmented" if source == "scenes" else "not captions"
                yield f"augmentation.{key}: contradicts data.source: {source}, which are {kind}; remove it"


class ImageEncoderConfig(Section):
    """A timm model; the numbers override the named model's own."""

    name: str = "vit_tiny_patch16_224"
    """timm name of a VisionTransformer (also with registers), Eva (EVA-02, DINOv3, PE), ConvNeXt or SwinTransformer;
    the sizes below, where set, replace its own."""
    patch_size_px: Positive | None = None
    """Side of a patch, of which the image size is a multiple; the stride of the stage whose features are patches."""
    width: Positive | None = None
    """Features of a token; of stages, each earlier one has half."""
    depth: Positive | None = None
    """Blocks; those of stages are spread evenly over them."""
    heads: Positive | None = None
    """Attention heads; they divide `width`. Convolutions have none."""
    stem: Literal["patch", "convolutions"] = "patch"
    """How a ViT embeds patches: one projection each, or 3 x 3 `convolutions`, for small data from random weights."""
    pooling: Literal["token", "attention"] = "token"
    """What ITC reads: the class token or else the mean patch, or the named model's `attention` pooling (SigLIP, PE)."""
    dropout: Share = 0.0
    """Dropout of attention weights and branches of the image encoder; ConvNeXt has none."""
    drop_path: Share = 0.0
    """Probability that the last block of the image encoder is left out of a sample; of earlier ones it grows from 0."""
    weights: str = "random"
    """`random`, `timm` (published, by name), or tensors in a file or folder under the names of timm, OpenAI's CLIP,
    open_clip or transformers."""
    pixel_statistics: Literal["encoder", "clip"] = "encoder"
    """Mean and deviation by which pixels are normalised: the named `encoder`'s, or CLIP's, as ALBEF does."""
    resizing: Literal["torchvision", "pillow"] = "torchvision"
    """Library that resizes images in evaluation; ALBEF's is Pillow. They differ by 2 of 255 at most."""
    settings: Settings = {}
    """Settings of an image tower whose class `name` gives as `module:Class`."""

    @field_validator("weights")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return expand_path(value)

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the keys of `model.image`."""
        if self.stem == "convolutions" and self.weights != "random":
            yield f"stem: convolutions contradicts model.image.weights: {self.weights}, of a patch stem; use random"
