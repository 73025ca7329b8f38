"""The fusion encoder: its interface, and BERT-compatible layers over the concatenated image and text tokens.

Legend: B batch, P patches, L text tokens, S fused tokens (image first), R output tokens, D width, A attention heads.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.attention import attend, attention_weights
from mamo.models.init import init_like_bert, init_position
from mamo.models.layers import LayeredModule

LAYER_NORM_EPS = 1e-12  # BERT's


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Gather tokens [B, S, D] at positions int64 [B, R] -> [B, R, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def index_rows(rows: Tensor, chosen: Tensor | None) -> Tensor:
    """Index rows [N, ...] at int64 [M], repeats allowed -> [M, ...]. None returns the rows unchanged.

    Two ways, equal in value. On a CPU indexing is slower than `index_select`, its backward pass several times. On a GPU
    the backward pass of `index_select` sums repeated rows in no fixed order, so a resumed run would not give the same
    bits.
    """
    if chosen is None:
        return rows
    return rows.index_select(0, chosen) if rows.device.type == "cpu" else rows[chosen]


def image_rows(image: Tensor, n_texts: int, image_indices: Tensor | None) -> Tensor | None:
    """Return the image of each text, int64 [B], by the rule of `FusionEncoder.fuse`; None for row by row."""
    n_chosen = 0 if image_indices is None else len(image_indices)
    if n_chosen == n_texts or (image_indices is None and n_texts == len(image)):
        return image_indices
    in_turn = torch.arange(n_texts - n_chosen, device=image.device) % len(image)
    return in_turn if image_indices is None else torch.cat([in_turn, image_indices])


def chunk_views(stacked: nn.Linear, prefix: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Split a stacked linear layer into views of its memory, named ``PREFIX.NAME.weight`` and ``.bias``."""
    parts = zip(names, stacked.weight.detach().chunk(len(names)), stacked.bias.detach().chunk(len(names)))
    return {f"{prefix}.{name}.{key}": part for name, *both in parts for key, part in zip(("weight", "bias"), both)}


class PostNormLayer(nn.Module):
    """Parts of a post-norm transformer layer, with the parameters of Hugging Face's ``BertLayer`` and fused qkv."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, dropout: float = 0.0, layer_norm_eps: float = LAYER_NORM_EPS
    ) -> None:
        super().__init__()
        if width % heads != 0:
            raise ValueError(f"fusion width {width} is not a multiple of its {heads} heads")
        self.width, self.heads, self.dropout_p = width, heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_like_bert)

    @property
    def attention_dropout_p(self) -> float:
        """Dropout of attention weights: none outside training."""
        return self.dropout_p if self.training else 0.0

    def project(self, tokens: Tensor, queries_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values.

        Args:
            tokens: float [B, S, D], for keys and values [B, A, S, D/A].
            queries_in: float [B, R, D], for queries [B, A, R, D/A].
        """
        shape = (tokens.shape[0], -1, 3, self.heads, self.width // self.heads)
        if queries_in is tokens:
            query, key, value = self.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4)  # each [B, A, S, D/A]
            return query, key, value
        weight, bias, width = self.qkv.weight, self.qkv.bias, self.width
        query = functional.linear(queries_in, weight[:width], bias[:width])
        query = query.view(shape[0], -1, *shape[3:]).transpose(1, 2)
        both = functional.linear(tokens, weight[width:], bias[width:]).view(shape[0], -1, 2, *shape[3:])
        key, value = both.permute(2, 0, 3, 1, 4)
        return query, key, value

    def add(self, queries_in: Tensor, attn_output: Tensor, out: nn.Module, norm: nn.Module) -> Tensor:
        """Compute the residual branch of an attention: ``norm(queries_in + out(attn_output))``.

        Args:
            queries_in: float [B, R, D].
            attn_output: float [B, A, R, D/A].
            out, norm: of this attention.
        """
        merged = attn_output.transpose(1, 2).reshape(queries_in.shape)  # [B, R, D]
        added: Tensor = norm(queries_in + self.dropout(out(merged)))
        return added

    def transform(self, tokens: Tensor) -> Tensor:
        """Compute the residual branch of the MLP: float [B, R, D] -> [B, R, D]."""
        updated: Tensor = self.norm2(tokens + self.dropout(self.fc2(functional.gelu(self.fc1(tokens)))))
        return updated

    def output_and_mlp(self, queries_in: Tensor, attn_output: Tensor) -> Tensor:
        """Compute the layer after its attention: [B, R, D], ``attn_output`` [B, A, R, D/A] -> float [B, R, D]."""
        return self.transform(self.add(queries_in, attn_output, self.out, self.norm1))

    def bert_named_tensors(self) -> dict[str, Tensor]:
        """Return views of the layer's memory under the names of a Hugging Face ``BertLayer``'s state dict."""
        views = chunk_views(self.qkv, "attention.self", ("query", "key", "value"))
        modules = {
            "attention.output.dense": self.out,
            "attention.output.LayerNorm": self.norm1,
            "intermediate.dense": self.fc1,
            "output.dense": self.fc2,
            "output.LayerNorm": self.norm2,
        }
        for name, module in modules.items():
            views |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return views


class FusionLayer(PostNormLayer):
    """A post-norm transformer layer, equal to Hugging Face's ``BertLayer`` (Devlin et al. 2019).

    ``x = LN(x + Attention(x)); x = LN(x + W2 gelu(W1 x))``, dropout on attention weights and on both branches.
    """

    def forward(self, tokens: Tensor, is_valid: Tensor | None, output_positions: Tensor | None = None) -> Tensor:
        """Transform tokens at all positions, or only at some.

        Args:
            tokens: float [B, S, D].
            is_valid: bool [B, S], False for padding, which no token attends to; None if all are valid.
            output_positions: int64 [B, R], the positions to compute: queries, output projection and MLP only there,
                keys and values of all tokens. None for all.

        Returns:
            float [B, S, D] or [B, R, D].
        """
        queries_in = tokens if output_positions is None else gather_tokens(tokens, output_positions)
        query, key, value = self.project(tokens, queries_in)
        mask = None if is_valid is None else is_valid[:, None, None, :]  # [B, 1, 1, S]
        return self.output_and_mlp(queries_in, attend(query, key, value, mask, self.attention_dropout_p))

    def attend_at(self, tokens: Tensor, is_valid: Tensor, output_positions: Tensor) -> Tensor:
        """Equal `forward` at ``output_positions`` in eval mode, without keys and values of all tokens.

        A key's projection is moved to the query, q (K x) = (K^T q) x, and a value's behind the sum over tokens. For R
        outputs that takes R D (D + S A) multiplications in place of S D^2, which pays for a few outputs.
        """
        queries_in = gather_tokens(tokens, output_positions)
        n_batch, n_outputs, n_heads, n_head = *queries_in.shape[:2], self.heads, self.width // self.heads
        query_weight, key_weight, value_weight = self.qkv.weight.view(3, n_heads, n_head, -1)  # [A, d, D] each
        query_bias, _, value_bias = self.qkv.bias.chunk(3)  # a key's adds the same to all scores of a query
        query = functional.linear(queries_in, query_weight.flatten(0, 1), query_bias)
        query = query.view(-1, n_heads, n_head).transpose(0, 1) @ key_weight  # [A, B * R, D]
        query = query.view(n_heads, n_batch, n_outputs, -1).permute(1, 2, 0, 3).flatten(1, 2)[:, None]  # [B, 1, R A, D]
        mixed = functional.scaled_dot_product_attention(
            query, tokens[:, None], tokens[:, None], is_valid[:, None, None, :], scale=n_head**-0.5
        )
        by_head = mixed.view(-1, n_heads, self.width).transpose(0, 1) @ value_weight.mT  # [A, B * R, d]
        attn_output = by_head.view(n_heads, n_batch, n_outputs, n_head).transpose(0, 1)
        return self.output_and_mlp(queries_in, attn_output + value_bias.view(n_heads, 1, n_head))

    def forward_with_weights(self, tokens: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return `forward` of all tokens and its attention weights [B, A, S, S], on which the result depends."""
        query, key, value = self.project(tokens, tokens)
        weights = attention_weights(query, key, is_valid[:, None, None, :])
        return self.output_and_mlp(tokens, weights @ value), weights


Slices = tuple[slice, slice, slice, slice]


class FusionEncoder(LayeredModule, ABC):
    """Fuses image and text tokens. The parts of the work that do not depend on the other side are done once for each
    image (`embed_image`) and each text (`embed_text`), in however many pairs they occur.

    ``width`` is D, ``heads`` A; ``mlp_width`` and ``dropout_p`` are those of its layers; ``grid`` is the rows and
    columns of patches; ``layer_norm_eps`` is that of its layers. The fused tokens are ``num_prefix_tokens`` class
    tokens and P patches, together ``num_image_positions``, then the text. Without ``has_patch_outputs`` they are only
    the text, and ``num_image_positions`` is 0.
    """

    has_patch_outputs: ClassVar[bool] = True
    layers: nn.ModuleList

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        dropout_p: float,
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.layer_norm_eps = layer_norm_eps
        self.width, self.heads, self.mlp_width, self.dropout_p = width, heads, mlp_width, dropout_p
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.num_image_positions = num_prefix_tokens + grid[0] * grid[1] if self.has_patch_outputs else 0

    @abstractmethod
    def embed_image(self, image_tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Compute the part that depends only on the image.

        Args:
            image_tokens: float [B, num_prefix_tokens + P, D_image], encoded, or
                [B, num_prefix_tokens + P_visible, D_image] with ``visible``.
            visible: int64 [B, P_visible], the patches that were encoded; the others are masked. None for all.

        Returns:
            float [B, ...], one row an image.
        """

    @abstractmethod
    def embed_text(self, text_tokens: Tensor, is_valid: Tensor) -> Tensor:
        """Compute the part that depends only on the text: float [B, L, D_text], bool [B, L] -> [B, L, D]."""

    @abstractmethod
    def fuse(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        output_positions: Tensor | None = None,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """Fuse embedded images with embedded texts.

        Args:
            image: from `embed_image`, [B, ...] or, with ``image_indices``, [I, ...].
            text: float [B, L, D], from `embed_text`.
            text_is_valid: bool [B, L], False for padding.
            output_positions: int64 [B, R], the fused tokens to compute, from `text_positions` and `patch_positions`.
                None for all.
            image_indices: int64 [C], the images of the last C texts. The B - C texts before them, a multiple of I, are
                paired with all images in turn, where `CrossFusion` copies no image. None pairs all texts in turn.

        Returns:
            float [B, S, D] or [B, R, D].
        """

    def share_image(self, image: Tensor) -> Tensor:
        """Compute for `fuse_pairs` what all pairs of an image share, of images from `embed_image`: [I, ...]."""
        return image

    def fuse_pairs(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        output_positions: Tensor,
        image_indices: Tensor,
        text_indices: Tensor,
    ) -> Tensor:
        """Equal `fuse` of many pairs of the same images and texts to rounding, in eval mode and without a gradient.

        Args:
            image: from `share_image`, [I, ...].
            text: float [T, L, D], from `embed_text`.
            text_is_valid: bool [T, L], False for padding.
            output_positions: int64 [B, R], as of `fuse`.
            image_indices, text_indices: the pairs, int64 [B] each.

        Returns:
            float [B, R, D].
        """
        words, is_valid = index_rows(text, text_indices), index_rows(text_is_valid, text_indices)
        return self.fuse(image, words, is_valid, output_positions, image_indices)

    def forward(
        self, image: Tensor, text: Tensor, text_is_valid: Tensor, output_positions: Tensor | None = None
    ) -> Tensor:
        """Fuse as `fuse`, with ``text`` float [B, L, D_text] from the text encoder."""
        return self.fuse(image, self.embed_text(text, text_is_valid), text_is_valid, output_positions)

    def fuse_with_weights(
        self, image: Tensor, text: Tensor, text_is_valid: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Slices]:
        """Fuse as `fuse`, recording the attention of one layer, for Grad-CAM.

        Returns:
            The fused [CLS] float [B, D], the attention weights [B, A, ...] of ``layer``, on which it depends, and the
            slices of the weights with which text tokens attend to patches.

        Raises:
            ValueError: the fusion records no attention.
        """
        raise ValueError(
            f"{type(self).__name__} records no attention, which Grad-CAM in the fusion needs; set "
            "evaluation.grounding_heat to image_encoder or occlusion"
        )

    def text_positions(self, positions: Tensor) -> Tensor:
        """Map text token indices (int64, any shape) to positions among the fused tokens."""
        return positions + self.num_image_positions

    def patch_positions(self, patches: Tensor) -> Tensor:
        """Map patch indices (int64, any shape) to positions among the fused tokens.

        Raises:
            ValueError: the fusion has no patch outputs.
        """
        if not self.has_patch_outputs:
            raise ValueError(f"{type(self).__name__} gives no fused image tokens")
        return patches + self.num_prefix_tokens

    def is_valid(self, text_is_valid: Tensor) -> Tensor:
        """Return which fused tokens are valid, bool [B, S]: all of the image, and those of the text in bool [B, L]."""
        return functional.pad(text_is_valid, (self.num_image_positions, 0), value=True)

    def position_parameters(self) -> dict[str, int]:
        """See `ImageTower.position_parameters`."""
        return {}


class Fusion(FusionEncoder):
    """Concatenated self-attention over image and text tokens, with outputs for both modalities.

    Image tokens are projected, get a learned position and a learned modality embedding, and are normalised. A masked
    position holds a learned mask token instead of an encoded patch. Text tokens come post-norm and with positions from
    the text encoder, and get a modality embedding that starts at zero, so that the layers start with the input that
    BERT's upper layers expect. The paper does not state how image tokens enter; this follows MAE's decoder.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        image_width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        text_width: int,
        dropout: float = 0.0,
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        if layers < 1:
            raise ValueError(f"fusion needs at least one layer, not {layers}")
        super().__init__(width, heads, mlp_width, grid, num_prefix_tokens, dropout, layer_norm_eps)
        self.image_projection = nn.Linear(image_width, width)
        self.image_position = nn.Parameter(torch.empty(1, self.num_image_positions, width))
        self.image_modality = nn.Parameter(torch.empty(width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.image_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.text_projection = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.text_modality = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        sizes = width, heads, mlp_width, dropout, layer_norm_eps
        self.layers = nn.ModuleList([FusionLayer(*sizes) for _ in range(layers)])
        self.apply(init_like_bert)
        init_position(self.image_position, grid, num_prefix_tokens)
        for embedding in (self.image_modality, self.mask_token):
            nn.init.trunc_normal_(embedding, std=0.02, a=-0.04, b=0.04)

    def position_parameters(self) -> dict[str, int]:
        """See `ImageTower.position_parameters`."""
        return {"image_position": self.num_prefix_tokens}

    def embed_image(self, image_tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Project image tokens and add positions; fill masked positions with the mask token.

        Returns:
            float [B, num_prefix_tokens + P, D].
        """
        tokens = self.image_projection(image_tokens)
        if visible is not None:
            prefix = torch.arange(self.num_prefix_tokens, device=visible.device).expand(visible.shape[0], -1)
            positions = torch.cat([prefix, self.patch_positions(visible)], dim=1)  # [B, num_prefix_tokens + P_visible]
            masked = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.num_image_positions, -1)
            tokens = masked.scatter(1, positions.unsqueeze(-1).expand(-1, -1, self.width), tokens)
        embedded: Tensor = self.dropout(self.image_norm(tokens + (self.image_position + self.image_modality)))
        return embedded

    def embed_text(self, text_tokens: Tensor, is_valid: Tensor) -> Tensor:
        """Project text tokens and add the modality embedding: float [B, L, D_text] -> [B, L, D]."""
        embedded: Tensor = self.text_projection(text_tokens) + self.text_modality
        return embedded

    def fuse(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        output_positions: Tensor | None = None,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """Run the layers on the concatenated tokens; the last one computes only ``output_positions``."""
        rows = image_rows(image, len(text), image_indices)
        tokens, is_valid = self.join(index_rows(image, rows), text, text_is_valid)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, is_valid)
        fused: Tensor = self.layers[-1](tokens, is_valid, output_positions)
        return fused

    def share_image(self, image: Tensor) -> Tensor:
        """Append queries, keys and values of the first layer: float [I, S_image, D] -> [I, S_image, 4 D]."""
        return self._with_projections(image) if self._can_share() else image

    def fuse_pairs(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        output_positions: Tensor,
        image_indices: Tensor,
        text_indices: Tensor,
    ) -> Tensor:
        """See `FusionEncoder.fuse_pairs`; the first layer projects images and texts, not pairs."""
        if not self._can_share():
            pairs = output_positions, image_indices, text_indices
            return super().fuse_pairs(image, text, text_is_valid, *pairs)
        first, *between, last = self.layers
        assert isinstance(first, FusionLayer)
        assert isinstance(last, FusionLayer)
        sides = index_rows(image, image_indices), index_rows(self._with_projections(text), text_indices)
        joined = torch.cat(sides, dim=1)  # [B, S, 4 D]
        is_valid = self.is_valid(index_rows(text_is_valid, text_indices))
        projected = joined[..., self.width :].view(*joined.shape[:2], 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attn_output = attend(query, key, value, is_valid[:, None, None, :])
        tokens = first.output_and_mlp(joined[..., : self.width], attn_output)
        for layer in between:
            tokens = layer(tokens, is_valid)
        return last.attend_at(tokens, is_valid, output_positions)

    def _can_share(self) -> bool:
        return len(self.layers) > 1 and all(type(layer) is FusionLayer for layer in self.layers)

    def _with_projections(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, self.layers[0].qkv(tokens)], dim=-1)  # type: ignore[operator]

    def fuse_with_weights(
        self, image: Tensor, text: Tensor, text_is_valid: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Slices]:
        """Record the self-attention weights [B, A, S, S] of a layer; see `FusionEncoder.fuse_with_weights`."""
        tokens, is_valid = self.join(image, text, text_is_valid)
        weights = torch.empty(0)
        for index, module in enumerate(self.layers):
            assert isinstance(module, FusionLayer)
            if index == layer:
                tokens, weights = module.forward_with_weights(tokens, is_valid)
            else:
                tokens = module(tokens, is_valid)
        first, everything = self.num_image_positions, slice(None)
        words_to_patches = (everything, everything, slice(first, None), slice(self.num_prefix_tokens, first))
        return tokens[:, first], weights, words_to_patches

    def join(self, image: Tensor, text: Tensor, text_is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate embedded image and text: the first layer's input [B, S, D], and its validity bool [B, S]."""
        return torch.cat([image, text], dim=1), self.is_valid(text_is_valid)
