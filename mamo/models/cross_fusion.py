"""Text-to-image cross-attention fusion (ALBEF, Li et al. 2021): BERT layers whose text tokens also attend to the image.

The image has no fused outputs: its tokens are only keys and values, the same for every text.

Legend: B batch, N image tokens, L text tokens, R output tokens, D width, A attention heads, d = D / A, K layers.
"""

import torch
from torch import Tensor, nn

from mamo.models.attention import attend, attention_weights
from mamo.models.fusion import (
    LAYER_NORM_EPS,
    FusionEncoder,
    PostNormLayer,
    Slices,
    chunk_views,
    gather_tokens,
    index_rows,
)
from mamo.models.init import init_like_bert
from mamo.models.layers import LayeredModule

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of images, float [B, A, N, d] each."""


class CrossLayer(PostNormLayer, LayeredModule):
    """Equal to Hugging Face's ``BertLayer`` with ``add_cross_attention``, its self-attention not causal.

    ``x = LN(x + Attention(x)); x = LN(x + CrossAttention(x, image)); x = LN(x + W2 gelu(W1 x))``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        image_width: int,
        dropout: float = 0.0,
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__(width, heads, mlp_width, dropout, layer_norm_eps)
        self.cross_query = nn.Linear(width, width)
        self.cross_key_value = nn.Linear(image_width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        for module in (self.cross_query, self.cross_key_value, self.cross_out):
            init_like_bert(module)

    @property
    def layers(self) -> list[nn.Module]:
        """The projection of the image, which runs apart from `forward`: once an image, not once a text."""
        return [self.cross_key_value]

    def forward(
        self,
        tokens: Tensor,
        is_valid: Tensor | None,
        key_value: KeyValue | None,
        output_positions: Tensor | None = None,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """Transform text tokens.

        Args:
            tokens: float [B, L, D].
            is_valid: bool [B, L], False for padding; None leaves out the self-attention, which was computed before.
            key_value: keys and values of the image from `project_image`; None leaves out what follows the
                self-attention.
            output_positions: int64 [B, R], the positions to compute; None for all.
            image_indices: see `FusionEncoder.fuse`.

        Returns:
            float [B, L, D] or [B, R, D].
        """
        if is_valid is not None:
            tokens = self.attend_text(tokens, is_valid, output_positions)
        elif output_positions is not None:
            tokens = gather_tokens(tokens, output_positions)
        return tokens if key_value is None else self.attend_image(tokens, key_value, image_indices)

    def project_image(self, image_tokens: Tensor) -> KeyValue:
        """Project encoded image tokens float [B, N, D_image] to keys and values."""
        both: Tensor = self.cross_key_value(image_tokens).unflatten(-1, (2, self.heads, -1))  # [B, N, 2, A, d]
        key, value = both.permute(2, 0, 3, 1, 4)
        return key, value

    def attend_text(self, tokens: Tensor, is_valid: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """Compute the self-attention branch: float [B, L, D] -> [B, L, D], or [B, R, D] at int64 [B, R]."""
        queries_in = tokens if output_positions is None else gather_tokens(tokens, output_positions)
        query, key, value = self.project(tokens, queries_in)
        attn_output = attend(query, key, value, is_valid[:, None, None, :], self.attention_dropout_p)
        return self.add(queries_in, attn_output, self.out, self.norm1)

    def image_query(self, tokens: Tensor) -> Tensor:
        """Project float [B, R, D] to queries [B, A, R, d] of the cross-attention."""
        query: Tensor = self.cross_query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return query

    def cross_output_and_mlp(self, tokens: Tensor, attn_output: Tensor) -> Tensor:
        """Compute the layer after its cross-attention: [B, R, D], ``attn_output`` [B, A, R, d] -> float [B, R, D]."""
        return self.transform(self.add(tokens, attn_output, self.cross_out, self.cross_norm))

    def attend_image(self, tokens: Tensor, key_value: KeyValue, image_indices: Tensor | None = None) -> Tensor:
        """Compute cross-attention and MLP: float [B, R, D], keys and values of `project_image` -> [B, R, D].

        Texts that are paired with the images in turn are one block of queries an image; see `FusionEncoder.fuse`.
        """
        query, (key, value), n_images = self.image_query(tokens), key_value, len(key_value[0])
        n_chosen = 0 if image_indices is None else len(image_indices)
        n_texts, n_heads, n_outputs, n_head = query.shape
        turns, parts = (n_texts - n_chosen) // n_images, []
        if turns > 0:
            block = query[: n_texts - n_chosen].reshape(turns, n_images, n_heads, n_outputs, n_head)
            block = block.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [I, A, turns * R, d]
            mixed = attend(block, key, value, None, self.attention_dropout_p)
            mixed = mixed.view(n_images, n_heads, turns, n_outputs, n_head)
            parts.append(mixed.permute(2, 0, 3, 1, 4).flatten(0, 1))  # [turns * I, R, A, d]
        if n_chosen > 0:
            rows = index_rows(key, image_indices), index_rows(value, image_indices)
            mixed = attend(query[n_texts - n_chosen :], *rows, None, self.attention_dropout_p)
            parts.append(mixed.transpose(1, 2))
        return self.cross_output_and_mlp(tokens, (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2))

    def attend_image_with_weights(self, tokens: Tensor, key_value: KeyValue) -> tuple[Tensor, Tensor]:
        """Return `attend_image` and its attention weights [B, A, R, N], on which the result depends."""
        key, value = key_value
        weights = attention_weights(self.image_query(tokens), key)
        return self.cross_output_and_mlp(tokens, weights @ value), weights

    def bert_named_tensors(self) -> dict[str, Tensor]:
        """Return views as `PostNormLayer.bert_named_tensors`, with the cross-attention."""
        views = super().bert_named_tensors()
        views |= chunk_views(self.cross_query, "crossattention.self", ("query",))
        views |= chunk_views(self.cross_key_value, "crossattention.self", ("key", "value"))
        for name, module in (("dense", self.cross_out), ("LayerNorm", self.cross_norm)):
            views |= {f"crossattention.output.{name}.{key}": value for key, value in module.state_dict().items()}
        return views


class CrossFusion(FusionEncoder):
    """Cross-attention fusion: text tokens attend to text and image in every layer; only the text has fused tokens.

    Computed once for each image are the keys and values of every layer (`embed_image`), once for each text the first
    layer's self-attention (`embed_text`).
    """

    has_patch_outputs = False

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        image_width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        dropout: float = 0.0,
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        if layers < 1:
            raise ValueError(f"fusion needs at least one layer, not {layers}")
        super().__init__(width, heads, mlp_width, grid, num_prefix_tokens, dropout, layer_norm_eps)
        sizes = width, heads, mlp_width, image_width, dropout, layer_norm_eps
        self.layers = nn.ModuleList([CrossLayer(*sizes) for _ in range(layers)])

    def embed_image(self, image_tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Project image tokens float [B, N, D_image] to keys and values of every layer.

        ``visible`` is not used: masked patches are absent from ``image_tokens``, and nothing attends to them.

        Returns:
            float [B, 2 K, A, N, d], keys and values in turn. In memory the images come second, so that the keys of a
            layer lie together, and the values: the products of attention then need no copy of them.
        """
        sides = [side for layer in self._layers() for side in layer.project_image(image_tokens)]
        return torch.stack(sides).transpose(0, 1)

    def embed_text(self, text_tokens: Tensor, is_valid: Tensor) -> Tensor:
        """Run the first self-attention: encoded text float [B, L, D], ``is_valid`` bool [B, L] -> [B, L, D]."""
        embedded: Tensor = self.layers[0](text_tokens, is_valid, None)
        return embedded

    def fuse(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        output_positions: Tensor | None = None,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """Run the layers on the text tokens; the last one computes only ``output_positions``."""
        tokens = text
        for index, (layer, key_value) in enumerate(zip(self.layers, _by_layer(image))):
            needed = output_positions if layer is self.layers[-1] else None
            tokens = layer(tokens, text_is_valid if index > 0 else None, key_value, needed, image_indices)
        return tokens

    def fuse_with_weights(
        self, image: Tensor, text: Tensor, text_is_valid: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Slices]:
        """Record the cross-attention weights [B, A, L, N] of a layer; see `FusionEncoder.fuse_with_weights`."""
        tokens, weights = text, torch.empty(0)
        for index, (module, key_value) in enumerate(zip(self._layers(), _by_layer(image))):
            if index > 0:
                tokens = module.attend_text(tokens, text_is_valid)
            if index == layer:
                tokens, weights = module.attend_image_with_weights(tokens, key_value)
            else:
                tokens = module.attend_image(tokens, key_value)
        everything = slice(None)
        return tokens[:, 0], weights, (everything, everything, everything, slice(self.num_prefix_tokens, None))

    def _layers(self) -> list[CrossLayer]:
        return [layer for layer in self.layers if isinstance(layer, CrossLayer)]


def _by_layer(image: Tensor) -> list[KeyValue]:
    """Split what `CrossFusion.embed_image` returns into the keys and values of each layer."""
    sides = image.unbind(1)  # its backward stacks the gradients once; indexing would fill all layers for each
    return list(zip(sides[::2], sides[1::2]))
