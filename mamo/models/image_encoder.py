"""The image encoder: a timm VisionTransformer by name, on all patches or only the visible ones, and its weights.

Legend: B batch, H height and W width in pixels, P patches, D width, A heads, S tokens.
"""

import difflib
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mamo.config.values import Values
from mamo.models.convert_clip import check_config, from_transformers
from mamo.models.init import init_by_fan_in, init_position
from mamo.models.towers import ImageTower
from mamo.models.weights import WeightReport, check_keys, read_weights

# Parts of a timm model after the token features: a classifier, a pooling layer, the norm of a pooled feature.
_CLASSIFIER_PREFIXES = ("head.", "head_dist.", "pre_logits.", "attn_pool.", "fc_norm.")


class ImageEncoder(ImageTower):
    """A timm VisionTransformer with absolute position embeddings, by name."""

    def __init__(
        self,
        name: str,
        image_size_px: tuple[int, int],
        *,
        patch_size_px: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
    ) -> None:
        """Build the network with random weights; None keeps the size of the named model.

        Raises:
            ValueError: an unknown name, a model of another family, one whose patches overlap, one with register
                tokens, or an image size that the patch size does not divide.
        """
        _check(name, image_size_px, patch_size_px, width, heads)
        overrides = {"patch_size": patch_size_px, "embed_dim": width, "depth": depth, "num_heads": heads}
        options: Values = {key: value for key, value in overrides.items() if value is not None}
        # global_pool="" omits the pooling layers, which would get no gradient, and keeps the norm of the tokens
        vit: Any = timm.create_model(name, img_size=image_size_px, num_classes=0, global_pool="", **options)
        super().__init__(
            width=vit.embed_dim,
            grid=tuple(vit.patch_embed.grid_size),
            patch_size_px=tuple(vit.patch_embed.patch_size),
            mean=vit.pretrained_cfg["mean"],
            std=vit.pretrained_cfg["std"],
            num_prefix_tokens=vit.num_prefix_tokens,
        )
        vit.apply(init_by_fan_in)
        init_position(vit.pos_embed, vit.patch_embed.grid_size, 0 if vit.no_embed_class else vit.num_prefix_tokens)
        self.name = name
        self.vit = vit

    @property
    def layers(self) -> Sequence[nn.Module]:
        """timm's blocks."""
        return list(self.vit.blocks)

    def embed(self, image: Tensor) -> Tensor:
        """Embed uint8 or normalised float images [B, 3, H, W].

        Returns:
            float [B, num_prefix_tokens + P, D]: the class token and the patches with their positions.
        """
        image = self.normalize(image).to(self.vit.patch_embed.proj.weight.dtype)
        tokens: Tensor = self.vit._pos_embed(self.vit.patch_embed(image))
        return tokens

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode all embedded tokens, or (He et al. 2022, MAE) only the visible patches with the class token.

        The tokens are returned after the final norm.
        """
        vit, tokens = self.vit, embedded
        if visible is not None:
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            seen = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))  # [B, P_visible, D]
            tokens = torch.cat([prefix, seen], dim=1) if self.num_prefix_tokens else seen
        encoded: Tensor = vit.norm(vit.blocks(vit.norm_pre(tokens)))
        return encoded

    def position_parameters(self) -> dict[str, int]:
        """See `ImageTower.position_parameters`."""
        return {"vit.pos_embed": 0 if self.vit.no_embed_class else self.num_prefix_tokens}

    def use_fused_attention(self, is_fused: bool) -> None:
        """Choose between timm's fused attention and its plain matrix products."""
        for block in self.vit.blocks:
            block.attn.fused_attn = is_fused

    @contextmanager
    def recording_attention(self) -> Iterator[list[Tensor]]:
        """Record attention weights [B, A, S, S]; see `ImageTower.recording_attention`.

        Within the context attention runs as plain products, so that the encoding depends on the recorded weights and
        can be differentiated by them.
        """
        weights: list[Tensor] = []
        was_fused = [block.attn.fused_attn for block in self.vit.blocks]
        self.use_fused_attention(False)
        hooks = [
            block.attn.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output))
            for block in self.vit.blocks
        ]
        try:
            yield weights
        finally:
            for hook in hooks:
                hook.remove()
            for block, is_fused in zip(self.vit.blocks, was_fused):
                block.attn.fused_attn = is_fused


def choose_attention(network: nn.Module, device: torch.device, precision: str) -> None:
    """Choose the attention of the image encoders in a network, as `mamo.models.attention` does for the other layers.

    Training in bf16 on a CPU uses plain products, and so does the evaluation of such a network: the two ways round
    differently in bf16, which moved recalls by 0.2 points and a probe by 0.8.
    """
    for part in network.modules():
        if isinstance(part, ImageTower):
            part.use_fused_attention(device.type != "cpu" or precision != "bf16")


def _check(
    name: str, image_size_px: tuple[int, int], patch_size_px: int | None, width: int | None, heads: int | None
) -> None:
    """Raise ValueError for a model that :class:`ImageEncoder` cannot encode, before any weight is allocated."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"image encoder {name!r} is not a timm model{hint}")
    vit = _meta_model(name)
    reason = _why_refused(vit)
    if reason is not None:
        raise ValueError(
            f"image encoder {name!r} is not supported: {reason}. Choose a timm VisionTransformer with absolute position"
            " embeddings, such as vit_base_patch16_224"
        )
    patch_px = patch_size_px or vit.patch_embed.patch_size[0]
    if any(side <= 0 or side % patch_px != 0 for side in image_size_px):
        raise ValueError(
            f"image size {image_size_px[0]}x{image_size_px[1]} px is not divisible by the patch size {patch_px} px of"
            f" image encoder {name!r}: choose multiples of {patch_px}"
        )
    if math.prod(side // patch_px for side in image_size_px) < 2:
        raise ValueError(
            f"image size {image_size_px[0]}x{image_size_px[1]} px is one patch of {patch_px} px of image encoder "
            f"{name!r}: choose a larger image, so that patches can be masked"
        )
    heads = heads or vit.blocks[0].attn.num_heads
    if (width or vit.embed_dim) % heads != 0:
        raise ValueError(f"image encoder width {width or vit.embed_dim} is not a multiple of its {heads} heads")


@functools.cache
def _meta_model(name: str) -> Any:
    """Build a timm model that holds no memory, of which sizes are read. Building one takes half a second."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)
    except RuntimeError:  # timm's, for a tag that there is not
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ValueError(
            f"image encoder {name!r} has a tag that timm does not know; use {', '.join(tags[:6]) or 'none'}"
        ) from None


def _why_refused(vit: nn.Module) -> str | None:
    """Return the reason why a timm model is not supported, or None."""
    if not isinstance(vit, VisionTransformer):
        return f"it is a {type(vit).__name__}"
    if vit.num_prefix_tokens != int(vit.has_class_token):
        return f"it has {vit.num_prefix_tokens} tokens before the patches (registers or a distillation token)"
    if not isinstance(vit.patch_embed, PatchEmbed):
        return "its patches come from a convolutional network, through which masked pixels would leak"
    if vit.pos_embed is None:
        return "it has no absolute position embeddings"
    needed = ("fused_attn", "num_heads", "attn_drop")
    other = next((b for b in vit.blocks if not all(hasattr(getattr(b, "attn", None), name) for name in needed)), None)
    if other is not None:
        return f"its blocks are of {type(other).__name__}, without one attention of their own"
    return None


def load_image_weights(encoder: ImageEncoder, source: str) -> WeightReport:
    """Fill the encoder from published weights; resample the position embeddings to its grid.

    Supported are timm's own layout (ViT, DeiT also under ``model``, CLIP and SigLIP towers) and CLIP or SigLIP models,
    whole or only the image tower, in the layouts of OpenAI, open_clip and Hugging Face's transformers. Of a whole model
    the image tower is loaded. The weights do not show whether a CLIP was trained with QuickGELU: name the encoder
    accordingly (``vit_*_clip_quickgelu_*`` for OpenAI's). A transformers config.json in the same folder is compared.

    Args:
        encoder: filled in place; unchanged when an error is raised.
        source: ``"timm"`` (the published weights of the encoder's name, needs network), a local .safetensors, .pt or
            .pth file, or a folder of .safetensors files. Position embeddings in a file are read as a square grid where
            their number is a square, else as the encoder's own grid. A number that fits both is refused.

    Raises:
        ValueError: naming the keys that are missing, unused (other than those of a classifier, a pooling head or a text
            tower) or of another shape, or the values of a transformers config.json that differ from the encoder's.
    """
    grid: tuple[int, int] | None = None
    if source == "timm":
        try:
            published: Any = timm.create_model(encoder.name, pretrained=True)
            state, grid = published.state_dict(), (*published.patch_embed.grid_size,)
        except RuntimeError:  # timm's, for a model without published weights
            raise ValueError(f"timm has no published weights of {encoder.name}: name a file, or use random") from None
    else:
        state = read_weights(Path(source))
    own = encoder.vit.state_dict()
    state, non_tower_keys = _image_tower(state, encoder.vit, Path(source))
    heads = tuple(sorted(key for key in state if key.startswith(_CLASSIFIER_PREFIXES) and key not in own))
    state = {key: value for key, value in state.items() if key not in heads}
    interpolated: tuple[str, ...] = ()
    if "pos_embed" in state and _resample_positions(encoder, state, source, grid):
        interpolated = ("pos_embed",)
    check_keys(state, own, source)
    encoder.vit.load_state_dict(state)
    return WeightReport(loaded=tuple(sorted(state)), interpolated=interpolated, unused=heads + non_tower_keys)


def _image_tower(
    state: dict[str, Tensor], vit: VisionTransformer, source: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights under timm's names, and the keys outside the image tower. timm's own files stay unchanged.

    timm renames the keys that OpenAI and open_clip store under ``visual.``, and resamples patches of another size and
    positions. Both are restored here: such patches are refused, positions are resampled with a report.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if (found := from_transformers(state)) is not None:
        check_config(source, vit)
        return found
    non_tower_keys = tuple(sorted(key for key in state if not key.startswith("visual.")))
    if len(non_tower_keys) == len(state):
        return state, ()
    positions = state.get("visual.positional_embedding", state.get("visual.trunk.pos_embed"))
    patches = state.get("visual.conv1.weight", state.get("visual.trunk.patch_embed.proj.weight"))
    tower: dict[str, Tensor] = checkpoint_filter_fn(state, vit)
    tower.pop("head.bias", None)  # zeros that timm adds to a projection
    for name, stored in (("pos_embed", positions), ("patch_embed.proj.weight", patches)):
        if stored is not None and name in tower:
            tower[name] = stored[None] if name == "pos_embed" and stored.ndim == 2 else stored
    return tower, non_tower_keys


def _resample_positions(
    encoder: ImageEncoder, state: dict[str, Tensor], source: str, grid: tuple[int, int] | None
) -> bool:
    """Resample ``state["pos_embed"]`` to the encoder's grid; return whether it changed.

    Args:
        encoder: gives the grid.
        state: weights under timm's names.
        source: names them in messages.
        grid: rows and columns of the stored positions; None takes a square, where their number is one.

    Raises:
        ValueError: the positions fill a square and, in another arrangement, the encoder's grid: both may be meant.
    """
    num_prefix_tokens = 0 if encoder.vit.no_embed_class else encoder.num_prefix_tokens
    n_patches = state["pos_embed"].shape[1] - num_prefix_tokens
    side, (rows, columns) = math.isqrt(max(0, n_patches)), encoder.grid
    old = grid or (side, side)
    if old[0] * old[1] != n_patches or old == encoder.grid:
        return False
    if grid is None and n_patches == rows * columns:
        raise ValueError(
            f"weights of {source}: pos_embed has {n_patches} positions, which may be {side} x {side} patches or this "
            f"encoder's {rows} x {columns}, and a file does not say; set data.image_size_px to another number of "
            "patches, or start from the run that has them (checkpoint=RUN)"
        )
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=list(encoder.grid), old_size=list(old), num_prefix_tokens=num_prefix_tokens
    )
    return True
