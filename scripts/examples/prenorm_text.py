"""A text tower that is no BERT: a pre-norm transformer with learned positions."""

import torch
from torch import Tensor, nn

from mamo.config.schema import Section
from mamo.models.towers import TextTower


class PreNormSettings(Section):
    """Settings of the tower, in `model.text.settings`."""

    mlp_ratio: int = 4


class PreNormText(TextTower):
    """Transformer layers that normalise before attention and MLP, and once at the end."""

    settings_type = PreNormSettings

    def __init__(self, config, vocabulary_size: int, text_max_tokens: int, pad_token_id: int, settings) -> None:
        super().__init__()
        self.width = config.width
        self.words = nn.Embedding(vocabulary_size, self.width, padding_idx=pad_token_id)
        self.positions = nn.Parameter(0.02 * torch.randn(text_max_tokens, self.width))
        nn.init.normal_(self.words.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width,
                config.heads,
                settings.mlp_ratio * self.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(self.width)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return self.blocks

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The word embeddings, which the masked-word head shares."""
        return self.words

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return words plus positions [..., L, D]."""
        return self.words(input_ids) + self.positions[: input_ids.shape[-1]]

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Return encoded tokens [B, L, D]."""
        for block in self.blocks:
            embedded = block(embedded, src_key_padding_mask=~is_valid)
        return self.norm(embedded)
