"""An image encoder of stages that halve the image: a ConvNeXt or Swin Transformer of timm by name, and its weights.

Legend: B batch, H and W height and width in pixels, P patches in a grid [h, w], D width.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.convnext import ConvNeXt
from timm.models.convnext import checkpoint_filter_fn as filter_convnext
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from torch import Tensor, nn

from mamo.config.values import Values
from mamo.models.image_encoder import check_image_size
from mamo.models.timm_models import meta_model, published_model
from mamo.models.towers import ImageTower, paint_masked
from mamo.models.weights import WeightReport, check_keys, read_weights


def has_stages(name: str) -> bool:
    """Say whether a timm model is one of those that :class:`StageEncoder` encodes. Raises ValueError if unknown."""
    return isinstance(meta_model(name), ConvNeXt | SwinTransformer)


class StageEncoder(ImageTower):
    """A ConvNeXt or Swin Transformer of timm, by name: the features of one stage are the patches.

    Later stages are left out. There is no class token. The layers mix neighbouring patches, so masked patches cannot be
    left out before them as a ViT's are: their pixels are painted with a learned colour before the first layer, and
    their features are dropped after the last one. No masked pixel reaches the output, and a masked image costs as much
    as a whole one. With all patches visible nothing is painted.
    """

    def __init__(
        self,
        name: str,
        image_size_px: tuple[int, int],
        *,
        patch_size_px: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        """Build the network with random weights; None keeps the size of the named model.

        Args:
            name: of timm.
            image_size_px: height and width.
            patch_size_px: stride of the stage whose features are the patches; None is the last stage's.
            width: features of that stage; each earlier stage has half of the next one's.
            depth: blocks of all stages up to it, spread evenly; the last ones have one more where they do not divide.
            heads: attention heads of that stage of a Swin Transformer; each earlier stage has half of the next one's.
            dropout: of attention weights and of both branches of each block of a Swin Transformer.
            drop_path: probability that the last block is left out of a sample; that of earlier ones grows from 0.

        Raises:
            ValueError: an unknown name, a model of another family, a stride that no stage has, sizes that do not
                divide, or dropout of a ConvNeXt.
        """
        meta = meta_model(name)
        stage = _stage_of(name, meta, patch_size_px)
        stride = meta.feature_info[stage]["reduction"]
        check_image_size(name, image_size_px, stride)
        options = _sizes(name, meta, stage, width, depth, heads)
        if isinstance(meta, SwinTransformer):
            options |= {"img_size": image_size_px, "proj_drop_rate": dropout, "attn_drop_rate": dropout}
        elif dropout:
            raise ValueError(f"model.image.dropout: {name!r} has convolutions, which use model.image.drop_path; use 0")
        net: Any = timm.create_model(name, num_classes=0, global_pool="", drop_path_rate=drop_path, **options)
        net.prune_intermediate_layers([stage])
        super().__init__(
            width=net.feature_info[stage]["num_chs"],
            grid=(image_size_px[0] // stride, image_size_px[1] // stride),
            patch_size_px=(stride, stride),
            mean=net.pretrained_cfg["mean"],
            std=net.pretrained_cfg["std"],
        )
        self.name = name
        self.net = net
        self.mask_colour = nn.Parameter(torch.zeros(3))

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Return timm's blocks of all stages."""
        stages: Any = self.net.layers if isinstance(self.net, SwinTransformer) else self.net.stages
        return [block for stage in stages for block in stage.blocks]

    def embed(self, image: Tensor) -> Tensor:
        """Return the normalised image float [B, 3, H, W]: masked patches are painted before the first layer."""
        return self.normalize(image).to(self.mask_colour.dtype)

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode images, or their visible patches, as the class describes; see `ImageTower.encode`."""
        if visible is not None:
            embedded = paint_masked(embedded, visible, self.grid, self.mask_colour)
        features = self.net.forward_features(embedded)  # [B, D, h, w], of a Swin Transformer [B, h, w, D]
        is_last = isinstance(self.net, SwinTransformer)
        tokens: Tensor = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
        return tokens if visible is None else tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))

    def resample_positions(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return functions for a Swin Transformer's tables: a window is at most as large as a stage's grid."""
        return {
            f"{name}.relative_position_bias_table": functools.partial(
                resize_rel_pos_bias_table,
                new_window_size=part.window_size,
                new_bias_shape=part.relative_position_bias_table.shape,
            )
            for name, part in self.named_modules()
            if isinstance(part, WindowAttention)
        }

    def use_fused_attention(self, is_fused: bool) -> None:
        """Choose between timm's fused attention and its plain matrix products."""
        for module in self.net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = is_fused


def _stage_of(name: str, meta: Any, patch_size_px: int | None) -> int:
    """Return the index of the stage with this stride; None is the last one."""
    if not isinstance(meta, ConvNeXt | SwinTransformer):
        raise ValueError(f"image encoder {name!r} is a {type(meta).__name__}: choose a ConvNeXt or SwinTransformer")
    strides = [info["reduction"] for info in meta.feature_info]
    if patch_size_px is None:
        return len(strides) - 1
    if patch_size_px not in strides:
        raise ValueError(
            f"model.image.patch_size_px: {patch_size_px} is no stride of a stage of {name!r}; use one of "
            f"{', '.join(map(str, strides))}"
        )
    return strides.index(patch_size_px)


def _sizes(name: str, meta: Any, stage: int, width: int | None, depth: int | None, heads: int | None) -> Values:
    """Return timm's options for sizes other than the named model's; see :class:`StageEncoder`.

    Raises:
        ValueError: names the key whose value does not divide.
    """
    is_swin, n_stages = isinstance(meta, SwinTransformer), len(meta.feature_info)
    widths = [info["num_chs"] for info in meta.feature_info]
    options: Values = {}
    if width is not None:
        if width % 2**stage:
            raise ValueError(
                f"model.image.width: {width} cannot be halved {stage} times, once for each stage of {name!r} before "
                f"that of {meta.feature_info[stage]['reduction']} px; use a multiple of {2**stage}"
            )
        widths = [(width >> stage) << k for k in range(n_stages)]
        options |= {"embed_dim": widths[0]} if is_swin else {"dims": tuple(widths)}
    if depth is not None:
        if depth <= stage:
            raise ValueError(f"model.image.depth: {depth} is less than one block in each of the {stage + 1} stages")
        base, extra = divmod(depth, stage + 1)
        options["depths"] = tuple(base + (stage - extra < k <= stage) for k in range(n_stages))
    if is_swin and heads is not None:
        n_heads = [max(1, heads >> (stage - k)) if k <= stage else heads << (k - stage) for k in range(n_stages)]
        options["num_heads"] = tuple(n_heads)
        odd = next((k for k in range(stage + 1) if widths[k] % n_heads[k]), None)
        if odd is not None:
            raise ValueError(
                f"model.image.heads: {heads} gives stage {odd} of {name!r} {n_heads[odd]} heads, which do not divide "
                f"its width {widths[odd]}; choose another model.image.width or model.image.heads"
            )
    return options


def load_stage_weights(encoder: StageEncoder, source: str) -> WeightReport:
    """Fill the encoder from published weights in timm's layout, or the first authors' or open_clip's.

    Weights of later stages, a classifier and a norm after the last stage are left out. A Swin Transformer's tables
    of relative positions are resampled where a window has another size.

    Args:
        encoder: filled in place, but for the colour of masked patches; unchanged when an error is raised.
        source: ``"timm"`` (the published weights of the encoder's name, needs network), a local .safetensors, .pt or
            .pth file, or a folder of .safetensors files.

    Raises:
        ValueError: naming the keys that are missing, unused or of another shape.
    """
    state = published_model(encoder.name).state_dict() if source == "timm" else read_weights(Path(source))
    own = encoder.net.state_dict()
    if isinstance(encoder.net, SwinTransformer):
        state, left_out = _without_later(state, "layers", len(encoder.net.layers), own)
        before = {key: value.shape for key, value in state.items()}
        state = filter_swin(state, encoder.net)
    else:
        state, left_out = _without_later(filter_convnext(state, encoder.net), "stages", len(encoder.net.stages), own)  # type: ignore[no-untyped-call]
        before = {key: value.shape for key, value in state.items()}
    check_keys(state, own, source)
    resampled = tuple(sorted(key for key in state if before.get(key, state[key].shape) != state[key].shape))
    encoder.net.load_state_dict(state)
    return WeightReport(loaded=tuple(sorted(state)), interpolated=resampled, new=("mask_colour",), unused=left_out)


def _without_later(
    state: dict[str, Tensor], stages: str, n_stages: int, own: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights of the stem and the first stages, and the keys of what comes after them."""

    def is_later(key: str) -> bool:
        first, _, rest = key.partition(".")
        if first == stages:
            return int(rest.partition(".")[0]) >= n_stages
        return first in ("head", "norm", "norm_pre") and key not in own

    left_out = tuple(sorted(filter(is_later, state)))
    return {key: value for key, value in state.items() if key not in left_out}, left_out
