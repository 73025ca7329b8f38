"""The fusion encoder: BERT-compatible transformer layers over the concatenated image and text tokens.

Legend: B batch, P patches, L text tokens, S all tokens (image first), R tokens read, D width, A attention heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertLayer

from mamo.models.attention import attention
from mamo.models.init import init_like_bert, init_position

LAYER_NORM_EPS = 1e-12  # BERT's


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Gather tokens [B, S, D] at positions int64 [B, R] -> [B, R, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def index_rows(rows: Tensor, chosen: Tensor | None) -> Tensor:
    """Rows [N, ...] at int64 [M], in which one may occur several times -> [M, ...]; None for the rows as they are.

    The same values two ways. On a CPU indexing is slower than `index_select`, its backward pass several times; on a
    GPU that of `index_select` adds up what comes from one row in no fixed order, and a run would not continue to the
    same bits.
    """
    if chosen is None:
        return rows
    return rows.index_select(0, chosen) if rows.device.type == "cpu" else rows[chosen]


def chunk_views(stacked: nn.Linear, prefix: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The memory of a linear layer that stands for several, as ``PREFIX.NAME.weight`` and ``.bias`` of each."""
    parts = zip(names, stacked.weight.detach().chunk(len(names)), stacked.bias.detach().chunk(len(names)))
    return {f"{prefix}.{name}.{key}": part for name, *both in parts for key, part in zip(("weight", "bias"), both)}


class FusionLayer(nn.Module):
    """A post-norm transformer layer, equal to Hugging Face's ``BertLayer`` (Devlin et al. 2019) with fused qkv.

    ``x = LN(x + Attention(x)); x = LN(x + W2 gelu(W1 x))``, dropout on attention weights and on both branches.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads != 0:
            raise ValueError(f"fusion width {width} is not a multiple of its {heads} heads")
        self.width, self.heads, self.dropout_p = width, heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_like_bert)

    def forward(self, tokens: Tensor, is_valid: Tensor | None, read: Tensor | None = None) -> Tensor:
        """Transform tokens, all of them or only those that are read.

        Args:
            tokens: float [B, S, D].
            is_valid: bool [B, S], False for padding, which no token attends to; None if all are valid.
            read: int64 [B, R], the positions to compute (their queries, output projection and MLP alone; keys and
                values still come from all tokens); None for all.

        Returns:
            float [B, S, D] or [B, R, D].
        """
        kept = tokens if read is None else gather_tokens(tokens, read)
        query, key, value = self.project(tokens, kept)
        mask = None if is_valid is None else is_valid[:, None, None, :]  # [B, 1, 1, S]
        return self.finish(kept, attention(query, key, value, mask, self.attention_dropout_p))

    @property
    def attention_dropout_p(self) -> float:
        """Dropout of attention weights: none outside training."""
        return self.dropout_p if self.training else 0.0

    def finish(self, kept: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention: tokens ``kept`` [B, R, D] and mixed values [B, A, R, D/A] -> float [B, R, D]."""
        return self.transform(self.add(kept, mixed, self.out, self.norm1))

    def add(self, kept: Tensor, mixed: Tensor, out: nn.Module, norm: nn.Module) -> Tensor:
        """Attention's residual branch: ``norm(kept + out(mixed))``, of shapes as in :meth:`finish`."""
        added: Tensor = norm(kept + self.dropout(out(mixed.transpose(1, 2).reshape(kept.shape))))
        return added

    def transform(self, tokens: Tensor) -> Tensor:
        """The MLP's residual branch: float [B, R, D] -> [B, R, D]."""
        updated: Tensor = self.norm2(tokens + self.dropout(self.fc2(functional.gelu(self.fc1(tokens)))))
        return updated

    def project(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, A, R, D/A] of ``kept`` [B, R, D]; keys and values [B, A, S, D/A] of ``tokens`` [B, S, D]."""
        shape = (tokens.shape[0], -1, 3, self.heads, self.width // self.heads)
        if kept is tokens:
            query, key, value = self.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4)  # each [B, A, S, D/A]
            return query, key, value
        weight, bias, width = self.qkv.weight, self.qkv.bias, self.width
        query = functional.linear(kept, weight[:width], bias[:width]).view(shape[0], -1, *shape[3:]).transpose(1, 2)
        both = functional.linear(tokens, weight[width:], bias[width:]).view(shape[0], -1, 2, *shape[3:])
        key, value = both.permute(2, 0, 3, 1, 4)
        return query, key, value

    def bert_named_tensors(self) -> dict[str, Tensor]:
        """The layer's own memory under the names of a Hugging Face ``BertLayer``'s state dict."""
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

    def load_bert_layer(self, layer: BertLayer) -> None:
        """Copy the weights of a Hugging Face BERT layer.

        Raises:
            ValueError: if a size differs.
        """
        attention, mlp = layer.attention.self, layer.intermediate.dense
        theirs = (mlp.in_features, attention.num_attention_heads, mlp.out_features)
        ours = (self.width, self.heads, self.fc1.out_features)
        if theirs != ours:
            raise ValueError(
                f"a BERT layer of (width, heads, MLP width) {theirs} does not fit a fusion layer of {ours}"
            )
        state = layer.state_dict()
        for name, view in self.bert_named_tensors().items():
            view.copy_(state[name])


class Fusion(nn.Module):
    """Concatenated self-attention over image and text tokens, with outputs for both modalities.

    Image tokens are projected, get a learned position and a learned modality embedding, and are normalised; a masked
    slot holds a learned mask token instead of an encoded patch. Text tokens come from the text encoder, post-norm and
    with their positions in them, and only get a modality embedding that starts at zero: the layers see at the start
    what BERT's upper layers expect. The paper does not state how image tokens enter; this follows MAE's decoder.

    Token order: ``num_prefix_tokens`` class tokens, P patches (together ``num_image_positions``), then the text.
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
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"fusion needs at least one layer, not {layers}")
        self.width, self.heads, self.grid, self.num_prefix_tokens = width, heads, grid, num_prefix_tokens
        self.num_image_positions = num_prefix_tokens + grid[0] * grid[1]
        self.image_projection = nn.Linear(image_width, width)
        self.image_position = nn.Parameter(torch.empty(1, self.num_image_positions, width))
        self.image_modality = nn.Parameter(torch.empty(width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.image_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.text_projection = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.text_modality = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([FusionLayer(width, heads, mlp_width, dropout) for _ in range(layers)])
        self.apply(init_like_bert)
        init_position(self.image_position, grid, num_prefix_tokens)
        for embedding in (self.image_modality, self.mask_token):
            nn.init.trunc_normal_(embedding, std=0.02, a=-0.04, b=0.04)

    def position_parameters(self) -> dict[str, int]:
        """See `ImageEncoder.position_parameters`."""
        return {"image_position": self.num_prefix_tokens}

    def patch_positions(self, patches: Tensor) -> Tensor:
        """Patch indices (int64, any shape) -> positions among the fused tokens, for ``read``."""
        return patches + self.num_prefix_tokens

    def text_positions(self, positions: Tensor) -> Tensor:
        """Text token indices (int64, any shape) -> positions among the fused tokens, for ``read``."""
        return positions + self.num_image_positions

    def embed_image(self, image_tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Bring encoded image tokens to their slots.

        Args:
            image_tokens: float [B, num_prefix_tokens + P, D_image], or [B, num_prefix_tokens + P_visible, D_image] with ``visible``.
            visible: int64 [B, P_visible], the patches that were encoded; the other slots get the mask token.

        Returns:
            float [B, num_prefix_tokens + P, D].
        """
        tokens = self.image_projection(image_tokens)
        if visible is not None:
            prefix = torch.arange(self.num_prefix_tokens, device=visible.device).expand(visible.shape[0], -1)
            slots = torch.cat([prefix, self.patch_positions(visible)], dim=1)  # [B, num_prefix_tokens + P_visible]
            masked = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.num_image_positions, -1)
            tokens = masked.scatter(1, slots.unsqueeze(-1).expand(-1, -1, self.width), tokens)
        embedded: Tensor = self.dropout(self.image_norm(tokens + (self.image_position + self.image_modality)))
        return embedded

    def embed_text(self, text_tokens: Tensor, is_valid: Tensor) -> Tensor:
        """Bring encoded text tokens float [B, L, D_text], of which ``is_valid`` bool [B, L], to the fusion: [B, L, D].

        What an image does not change: done once for a text that meets several images.
        """
        embedded: Tensor = self.text_projection(text_tokens) + self.text_modality
        return embedded

    def forward(self, image: Tensor, text: Tensor, text_is_valid: Tensor, read: Tensor | None = None) -> Tensor:
        """Fuse embedded image tokens with encoded text tokens.

        Args:
            image: float [B, num_prefix_tokens + P, D], from :meth:`embed_image`.
            text: float [B, L, D_text], from the text encoder.
            text_is_valid: bool [B, L], False for padding.
            read: int64 [B, R], positions among the S = num_prefix_tokens + P + L fused tokens that the caller needs; the last
                layer computes only these. None for all.

        Returns:
            float [B, S, D], image tokens first, or [B, R, D].
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

        With ``image_indices``, int64 [B], each text meets the image of that number, float [I, num_prefix_tokens + P, D].
        """
        tokens, is_valid = self.join(index_rows(image, image_indices), text, text_is_valid)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, is_valid)
        fused: Tensor = self.layers[-1](tokens, is_valid, read)
        return fused

    def join(self, image: Tensor, text: Tensor, text_is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, S, D] that enter the first layer, and which are valid, bool [B, S]; both sides embedded."""
        return torch.cat([image, text], dim=1), self.is_valid(text_is_valid)

    def is_valid(self, text_is_valid: Tensor) -> Tensor:
        """Which fused tokens are valid, bool [B, S]: all of the image's, and of the text's those in bool [B, L]."""
        return functional.pad(text_is_valid, (self.num_image_positions, 0), value=True)
