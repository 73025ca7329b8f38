"""Text-to-image cross-attention fusion (ALBEF, Li et al. 2021): BERT layers whose text tokens also attend to the image.

The image has no fused outputs: its tokens are keys and values alone, the same whatever the text says.

Legend: B batch, N image tokens, L text tokens, R tokens read, D width, A attention heads, d = D / A, K layers.
"""

import torch
from torch import Tensor, nn

from mamo.models.attention import attention
from mamo.models.fusion import LAYER_NORM_EPS, FusionLayer, chunk_views, gather_tokens, index_rows
from mamo.models.init import init_like_bert


class CrossLayer(FusionLayer):
    """Equal to Hugging Face's ``BertLayer`` with ``add_cross_attention``, its self-attention not causal.

    ``x = LN(x + Attention(x)); x = LN(x + CrossAttention(x, image)); x = LN(x + W2 gelu(W1 x))``.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, image_width: int, dropout: float = 0.0) -> None:
        super().__init__(width, heads, mlp_width, dropout)
        self.cross_query = nn.Linear(width, width)
        self.cross_key_value = nn.Linear(image_width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        for module in (self.cross_query, self.cross_key_value, self.cross_out):
            init_like_bert(module)

    def project_image(self, image_tokens: Tensor) -> Tensor:
        """Encoded image tokens float [B, N, D_image] -> keys and values [B, 2, A, N, d]."""
        both: Tensor = self.cross_key_value(image_tokens).unflatten(-1, (2, self.heads, -1))  # [B, N, 2, A, d]
        return both.permute(0, 2, 3, 1, 4)

    def attend_text(self, tokens: Tensor, is_valid: Tensor, read: Tensor | None = None) -> Tensor:
        """The self-attention branch: float [B, L, D] -> [B, L, D], or [B, R, D] at ``read`` int64 [B, R]."""
        kept = tokens if read is None else gather_tokens(tokens, read)
        query, key, value = self.project(tokens, kept)
        mixed = attention(query, key, value, is_valid[:, None, None, :], self.attention_dropout_p)
        return self.add(kept, mixed, self.out, self.norm1)

    def image_query(self, tokens: Tensor) -> Tensor:
        """Queries [B, A, R, d] of float [B, R, D]."""
        query: Tensor = self.cross_query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return query

    def finish_image(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """What follows cross-attention: tokens [B, R, D] and mixed values [B, A, R, d] -> float [B, R, D]."""
        return self.transform(self.add(tokens, mixed, self.cross_out, self.cross_norm))

    def attend_image(self, tokens: Tensor, key_value: Tensor) -> Tensor:
        """Cross-attention and MLP: float [B, R, D], with keys and values from :meth:`project_image`, -> [B, R, D]."""
        key, value = key_value.unbind(1)
        mixed = attention(self.image_query(tokens), key, value, None, self.attention_dropout_p)
        return self.finish_image(tokens, mixed)

    def bert_named_tensors(self) -> dict[str, Tensor]:
        """As :meth:`FusionLayer.bert_named_tensors`, with the cross-attention."""
        views = super().bert_named_tensors()
        views |= chunk_views(self.cross_query, "crossattention.self", ("query",))
        views |= chunk_views(self.cross_key_value, "crossattention.self", ("key", "value"))
        for name, module in (("dense", self.cross_out), ("LayerNorm", self.cross_norm)):
            views |= {f"crossattention.output.{name}.{key}": value for key, value in module.state_dict().items()}
        return views


class CrossFusion(nn.Module):
    """Text tokens attend to text and image in every layer; the fused tokens are the text's.

    What does not depend on the other side is computed once for each image (the keys and values of every layer,
    :meth:`embed_image`) and for each text (the first layer's self-attention, :meth:`embed_text`), however many pairs
    they take part in.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"fusion needs at least one layer, not {layers}")
        self.width, self.heads, self.grid, self.num_prefix_tokens = width, heads, grid, num_prefix_tokens
        self.layers = nn.ModuleList([CrossLayer(width, heads, mlp_width, image_width, dropout) for _ in range(layers)])

    def text_positions(self, positions: Tensor) -> Tensor:
        """Text token indices (int64, any shape) -> positions among the fused tokens, for ``read``: the same."""
        return positions

    def embed_image(self, image_tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Keys and values of every layer.

        Args:
            image_tokens: float [B, N, D_image], encoded: all of them or the visible ones.
            visible: not read: what is masked is simply not there to attend to.

        Returns:
            float [B, K, 2, A, N, d].
        """
        return torch.stack([layer.project_image(image_tokens) for layer in self._layers()], dim=1)

    def embed_text(self, text_tokens: Tensor, is_valid: Tensor) -> Tensor:
        """Encoded text tokens float [B, L, D], ``is_valid`` bool [B, L] -> after the first self-attention [B, L, D]."""
        return self._layers()[0].attend_text(text_tokens, is_valid)

    def forward(self, image: Tensor, text: Tensor, text_is_valid: Tensor, read: Tensor | None = None) -> Tensor:
        """Fuse.

        Args:
            image: float [B, K, 2, A, N, d], from :meth:`embed_image`.
            text: float [B, L, D], from the text encoder.
            text_is_valid: bool [B, L], False for padding.
            read: int64 [B, R], the text positions that the caller needs; the last layer computes only these. None for
                all.

        Returns:
            float [B, L, D], or [B, R, D].
        """
        return self.fuse(image, self.embed_text(text, text_is_valid), text_is_valid, read)

    def fuse(
        self,
        image: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
        read: Tensor | None = None,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`forward`, of a text float [B, L, D] from :meth:`embed_text`.

        With ``image_indices``, int64 [B], each text meets the image of that number, float [I, K, 2, A, N, d].
        """
        tokens, layers = text, self._layers()
        # unbind, whose backward stacks the layers' gradients once; that of an index fills all layers for each
        for index, (layer, key_value) in enumerate(zip(layers, image.unbind(1))):
            needed = read if layer is layers[-1] else None
            if index > 0:
                tokens = layer.attend_text(tokens, text_is_valid, needed)
            elif needed is not None:
                tokens = gather_tokens(tokens, needed)
            # a layer at a time: those of all layers for all pairs would be the largest tensor of a step
            tokens = layer.attend_image(tokens, index_rows(key_value, image_indices))
        return tokens

    def _layers(self) -> list[CrossLayer]:
        return [layer for layer in self.layers if isinstance(layer, CrossLayer)]
