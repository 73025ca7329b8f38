"""The image encoder: a Vision Transformer of timm by name, on all patches or only the visible ones, and its weights.

Legend: B batch, H height and W width in pixels, P patches, D width, A heads, S tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from mamo.config.values import Values
from mamo.models.convert_clip import check_config, from_transformers
from mamo.models.init import init_by_fan_in, init_position
from mamo.models.timm_models import meta_model, published_model
from mamo.models.towers import ImageTower, paint_masked
from mamo.models.weights import WeightReport, check_keys, read_weights

# Parts of a timm model after the token features: a classifier, a pooling layer, the norm of a pooled feature.
_CLASSIFIER_PREFIXES = ("head.", "head_dist.", "pre_logits.", "attn_pool.", "fc_norm.")


class ImageEncoder(ImageTower):
    """A Vision Transformer of timm, by name: a `VisionTransformer`, or an `Eva` (EVA-02, DINOv3, PE).

    Positions are absolute, rotary (Su et al. 2021) or both; a visible patch keeps the angles of its place. Registers
    (Darcet et al. 2024) take part in every layer and are dropped from the output, as DINOv2 does. A norm that timm puts
    after the mean of the tokens is the norm of the tokens here.
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
        pooling: Literal["token", "attention"] = "token",
        stem: Literal["patch", "convolutions"] = "patch",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        """Build the network with random weights; None keeps the size of the named model.

        Args:
            name: of timm.
            image_size_px: height and width.
            patch_size_px, width, depth, heads: sizes in place of the named model's.
            pooling: `token`, the class token or else the mean patch; `attention`, the named model's attention pooling.
            stem: `patch`, one projection of each patch; `convolutions`, 3 x 3 ones that halve the image until a patch
                is left (Xiao et al. 2021). They mix neighbours, so masked patches are painted with a learned colour.
            dropout: of attention weights and of both branches of each layer.
            drop_path: probability that the last layer is left out of a sample; that of earlier ones grows from 0.

        Raises:
            ValueError: an unknown name, a model of another family, one whose patches overlap, one without the
                pooling, or an image size that the patch size does not divide.
        """
        _check(name, image_size_px, patch_size_px, width, heads, pooling, stem)
        patch_px = patch_size_px or meta_model(name).patch_embed.patch_size[0]
        overrides = {
            "patch_size": patch_size_px,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "attn_drop_rate": dropout or None,
            "proj_drop_rate": dropout or None,
            "drop_path_rate": drop_path or None,
            "embed_layer": None if stem == "patch" else _convolutional_stem,
        }
        options: Values = {key: value for key, value in overrides.items() if value is not None}
        # global_pool="" omits the pooling layers, which would get no gradient, and keeps the norm of the tokens
        pool = "map" if pooling == "attention" else ""
        vit: Any = timm.create_model(
            name, img_size=image_size_px, num_classes=0, global_pool=pool, dynamic_img_size=False, **options
        )
        super().__init__(
            width=vit.embed_dim,
            grid=tuple(vit.patch_embed.grid_size),
            patch_size_px=(patch_px, patch_px),
            mean=vit.pretrained_cfg["mean"],
            std=vit.pretrained_cfg["std"],
            num_prefix_tokens=int(vit.cls_token is not None),
        )
        self.num_registers = vit.num_prefix_tokens - self.num_prefix_tokens
        vit.apply(init_by_fan_in)
        if vit.pos_embed is not None:
            init_position(vit.pos_embed, self.grid, 0 if vit.no_embed_class else vit.num_prefix_tokens)
        self.name = name
        self.vit = vit
        self.mask_colour = None if stem == "patch" else nn.Parameter(torch.zeros(3))

    @property
    def layers(self) -> Sequence[nn.Module]:
        """timm's blocks."""
        return list(self.vit.blocks)

    def embed(self, image: Tensor) -> Tensor:
        """Embed uint8 or normalised float images [B, 3, H, W].

        Returns:
            float [B, num_prefix_tokens + num_registers + P, D]: class token, registers, and the patches with their
            absolute positions; with a convolutional stem the normalised image, as masked patches are painted first.
        """
        image = self.normalize(image).to(next(self.vit.patch_embed.parameters()).dtype)
        return image if self.mask_colour is not None else self._tokens(image)

    def _tokens(self, image: Tensor) -> Tensor:
        found = self.vit._pos_embed(self.vit.patch_embed(image))  # an Eva returns its rotary positions too
        tokens: Tensor = found[0] if isinstance(found, tuple) else found
        return tokens

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode all embedded tokens, or (He et al. 2022, MAE) only the visible patches with the class token.

        The tokens are returned after the final norm.
        """
        vit, tokens, n_prefix = self.vit, embedded, self.vit.num_prefix_tokens
        if self.mask_colour is not None:
            tokens = tokens if visible is None else paint_masked(tokens, visible, self.grid, self.mask_colour)
            tokens = self._tokens(tokens)
        angles = None if getattr(vit, "rope", None) is None else vit.rope.get_embed()  # [P, 2 * D / A]
        if visible is not None:
            prefix, patches = tokens[:, :n_prefix], tokens[:, n_prefix:]
            seen = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))  # [B, P_visible, D]
            tokens = torch.cat([prefix, seen], dim=1) if n_prefix else seen
            angles = None if angles is None else angles[visible].unsqueeze(1)  # [B, 1, P_visible, 2 * D / A]
        tokens = vit.norm_pre(tokens)
        for block in vit.blocks:
            tokens = block(tokens) if angles is None else block(tokens, rope=angles)
        encoded: Tensor = vit.norm(tokens)
        if self.num_registers:
            encoded = torch.cat([encoded[:, : self.num_prefix_tokens], encoded[:, n_prefix:]], dim=1)
        return encoded

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool tokens [B, num_prefix_tokens + P, D] to [B, D]; see ``pooling``."""
        if self.vit.attn_pool is None:
            return super().pool(tokens)
        has_class_token = isinstance(self.vit, Eva) or self.vit.pool_include_prefix
        pooled: Tensor = self.vit.attn_pool(tokens if has_class_token else tokens[:, self.num_prefix_tokens :])
        return pooled

    def position_parameters(self) -> dict[str, int]:
        """See `ImageTower.position_parameters`. Rotary positions have no parameters."""
        if self.vit.pos_embed is None:
            return {}
        return {"vit.pos_embed": 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens}

    def use_fused_attention(self, is_fused: bool) -> None:
        """Choose between timm's fused attention and its plain matrix products."""
        for attention in self._attentions():
            attention.fused_attn = is_fused

    def _attentions(self) -> list[Any]:
        return [module for module in self.vit.modules() if hasattr(module, "fused_attn")]

    @contextmanager
    def recording_attention(self) -> Iterator[list[Tensor]]:
        """Record attention weights [B, A, S, S]; see `ImageTower.recording_attention`.

        Within the context attention runs as plain products, so that the encoding depends on the recorded weights and
        can be differentiated by them.
        """
        weights: list[Tensor] = []
        attentions = self._attentions()
        was_fused = [attention.fused_attn for attention in attentions]
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
            for attention, is_fused in zip(attentions, was_fused):
                attention.fused_attn = is_fused


def _convolutional_stem(img_size: tuple[int, int], patch_size: int, embed_dim: int, **_: object) -> HybridEmbed:
    """Build timm's stem of 3 x 3 convolutions with stride 2, and a last one of 1 x 1, in place of a `PatchEmbed`.

    Its norms are layer norms: batch norms would make a sample depend on the others.
    """
    halvings = int(math.log2(patch_size))
    stem: Any = ConvStem(
        depth=halvings + 1,
        channels=(*(max(8, embed_dim >> (halvings - 1 - k)) for k in range(halvings)), embed_dim),
        kernel_size=(*[3] * halvings, 1),
        stride=(*[2] * halvings, 1),
        norm_layer="layernorm2d",  # type: ignore[arg-type]
        act_layer=nn.GELU,
    )
    stem.num_features = embed_dim
    grid = (img_size[0] // patch_size, img_size[1] // patch_size)
    return HybridEmbed(stem, img_size, 1, feature_size=grid, feature_ratio=patch_size, embed_dim=embed_dim, proj=False)


def choose_attention(network: nn.Module, device: torch.device, precision: str) -> None:
    """Choose the attention of the image encoders in a network, as `mamo.models.attention` does for the other layers.

    Training in bf16 on a CPU uses plain products, and so does the evaluation of such a network: the two ways round
    differently in bf16, which moved recalls by 0.2 points and a probe by 0.8.
    """
    for part in network.modules():
        if isinstance(part, ImageTower):
            part.use_fused_attention(device.type != "cpu" or precision != "bf16")


def _check(
    name: str,
    image_size_px: tuple[int, int],
    patch_size_px: int | None,
    width: int | None,
    heads: int | None,
    pooling: str,
    stem: str,
) -> None:
    """Raise ValueError for a model that :class:`ImageEncoder` cannot encode, before any weight is allocated."""
    vit = meta_model(name)
    reason = _why_refused(vit)
    if reason is not None:
        raise ValueError(
            f"image encoder {name!r} is not supported: {reason}. Choose a VisionTransformer or an Eva of timm, such as "
            "vit_base_patch16_224 or vit_small_patch16_dinov3, or a ConvNeXt or SwinTransformer"
        )
    patch_px = patch_size_px or vit.patch_embed.patch_size[0]
    check_image_size(name, image_size_px, patch_px)
    width, heads = width or vit.embed_dim, heads or vit.blocks[0].attn.num_heads
    assert width is not None
    assert heads is not None
    if width % heads != 0:
        raise ValueError(f"image encoder width {width} is not a multiple of its {heads} heads")
    if getattr(vit, "rope", None) is not None and width // heads % 4:
        raise ValueError(
            f"image encoder {name!r} has rotary positions, which need a multiple of 4 features a head, not "
            f"{width // heads}: choose another model.image.width or model.image.heads"
        )
    if pooling == "attention" and vit.attn_pool is None:
        raise ValueError(
            f"model.image.pooling: image encoder {name!r} has no attention pooling; use token, or a SigLIP or PE"
        )
    if pooling == "attention" and isinstance(vit, Eva) and width % vit.attn_pool.num_heads:
        raise ValueError(
            f"model.image.width: {width} is not a multiple of the {vit.attn_pool.num_heads} heads of the attention "
            f"pooling of {name!r}"
        )
    if stem == "convolutions" and (isinstance(vit, Eva) or patch_px < 2 or patch_px & (patch_px - 1)):
        raise ValueError(
            "model.image.stem: convolutions needs a VisionTransformer and patches of 2, 4, 8, 16 or 32 px, which it "
            f"reaches by halving; {name!r} is {_a(vit)} with patches of {patch_px} px"
        )


def check_image_size(name: str, image_size_px: tuple[int, int], patch_px: int) -> None:
    """Raise ValueError for an image size that patches do not divide, or that is one patch."""
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


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _why_refused(vit: nn.Module) -> str | None:
    """Return the reason why a timm model is not supported, or None."""
    if not isinstance(vit, VisionTransformer | Eva):
        return f"it is {_a(vit)}"
    if hasattr(vit, "dist_token"):
        return "it has a distillation token before the patches"
    if not isinstance(vit.patch_embed, PatchEmbed):
        return "its patches come from a convolutional network, through which masked pixels would leak"
    rotary = getattr(vit, "rope", None)
    if rotary is not None and not isinstance(rotary, RotaryEmbeddingCat | RotaryEmbeddingDinoV3):
        return f"its rotary positions are of another kind ({type(rotary).__name__})"
    if vit.pos_embed is None and rotary is None:
        return "it has no position embeddings"
    needed = ("fused_attn", "num_heads", "attn_drop")
    other = next((b for b in vit.blocks if not all(hasattr(getattr(b, "attn", None), name) for name in needed)), None)
    if other is not None:
        return f"its blocks are of {type(other).__name__}, without one attention of their own"
    return None


def load_image_weights(encoder: ImageEncoder, source: str) -> WeightReport:
    """Fill the encoder from published weights; resample the position embeddings to its grid.

    Supported are timm's own layout (ViT, DeiT also under ``model``, DINOv2, DINOv3, EVA-02, PE, CLIP and SigLIP towers;
    a norm after the mean of the tokens, `fc_norm`, becomes the norm of the tokens) and CLIP or SigLIP models,
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
        published = published_model(encoder.name)
        state, grid = published.state_dict(), (*published.patch_embed.grid_size,)
    else:
        state = read_weights(Path(source))
    own = encoder.vit.state_dict()
    state, non_tower_keys = _image_tower(state, encoder.vit, Path(source))
    if "norm.weight" in own and "norm.weight" not in state:  # timm's norm after the mean of the tokens
        state = {key.replace("fc_norm.", "norm.", 1): value for key, value in state.items()}
    heads = tuple(sorted(key for key in state if key.startswith(_CLASSIFIER_PREFIXES) and key not in own))
    state = {key: value for key, value in state.items() if key not in heads}
    interpolated: tuple[str, ...] = ()
    if "pos_embed" in state and _resample_positions(encoder, state, source, grid):
        interpolated = ("pos_embed",)
    check_keys(state, own, source)
    encoder.vit.load_state_dict(state)
    return WeightReport(loaded=tuple(sorted(state)), interpolated=interpolated, unused=heads + non_tower_keys)


def _image_tower(
    state: dict[str, Tensor], vit: VisionTransformer | Eva, source: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights under timm's names, and the keys outside the image tower. timm's own files stay unchanged.

    timm renames the keys that OpenAI and open_clip store under ``visual.``, and resamples patches of another size and
    positions. Both are restored here: such patches are refused, positions are resampled with a report.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if (found := from_transformers(state, has_pooling=vit.attn_pool is not None)) is not None:
        check_config(source, vit)
        return found
    non_tower_keys = tuple(sorted(key for key in state if not key.startswith("visual.")))
    if len(non_tower_keys) == len(state):
        return state, ()
    positions = state.get("visual.positional_embedding", state.get("visual.trunk.pos_embed"))
    patches = state.get("visual.conv1.weight", state.get("visual.trunk.patch_embed.proj.weight"))
    tower: dict[str, Tensor] = filter_eva(state, vit) if isinstance(vit, Eva) else filter_vit(state, vit)
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
    num_prefix_tokens = encoder.position_parameters().get("vit.pos_embed", 0)
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
