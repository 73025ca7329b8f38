"""The text towers of CLIP and SigLIP, with their masks, their pooled token and their tokenizers.

Both give their pooled token first, in the place of the start of the text: ITC projects it, and ITM reads what the
fusion makes of it.

Legend: B batch, L text tokens, N positions of the tower, D width.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, SiglipTextConfig
from transformers.activations import ACT2FN

from mamo.models.attention import attend
from mamo.models.init import init_by_fan_in
from mamo.models.text_encoder import PublishedTextTower

WORD_STD, POSITION_STD = 0.02, 0.01  # of random weights, as CLIP starts


class PreNormLayer(nn.Module):
    """A transformer layer that normalises first: ``x = x + Attention(LN(x)); x = x + W2 act(W1 LN(x))``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_dropout
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Transform float [B, L, D]; ``mask`` bool [L, L], True where a token (row) attends, None for everywhere."""
        projected = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = projected  # each [B, A, L, D/A]
        dropout_p = self.dropout_p if self.training else 0.0
        attended = attend(query, key, value, None if mask is None else mask[None, None], dropout_p)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        updated: Tensor = tokens + self.fc2(self.act(self.fc1(self.norm2(tokens))))
        return updated


class ClipTextTower(PublishedTextTower):
    """CLIP's text tower: causal, pooled at the end of the text (Radford et al. 2021)."""

    def __init__(self, config: CLIPTextConfig | SiglipTextConfig) -> None:
        super().__init__()
        sizes: Any = copy.deepcopy(config)
        self.config: Any = sizes
        self.width: int = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, self.width)
        self.positions = nn.Parameter(torch.empty(config.max_position_embeddings, self.width))
        self.blocks = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(self.width, eps=sizes.layer_norm_eps)
        self.apply(init_by_fan_in)
        nn.init.normal_(self.words.weight, std=WORD_STD)
        nn.init.normal_(self.positions, std=POSITION_STD)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers."""
        return list(self.blocks)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """See `TextTower.word_embeddings`."""
        return self.words

    def embed(self, input_ids: Tensor) -> Tensor:
        """Add words and positions: token ids int64 [..., L] -> float [..., L, D]."""
        embedded: Tensor = self.words(input_ids) + self.positions[: input_ids.shape[-1]]
        return embedded

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Run the causal layers and the final norm on float [B, L, D], with bool [B, L] False for padding behind.

        Returns:
            float [B, L, D]. The first token, which sees only itself, is replaced by the last valid one, CLIP's pooled
            token.
        """
        places = torch.arange(embedded.shape[1], device=embedded.device)
        encoded = self._run(embedded, places[:, None] >= places)
        ends = is_valid.sum(dim=1) - 1
        return torch.cat([encoded[torch.arange(len(ends), device=ends.device), ends][:, None], encoded[:, 1:]], dim=1)

    def _run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, mask)
        normed: Tensor = self.norm(tokens)
        return normed


class SiglipTextTower(ClipTextTower):
    """SigLIP's text tower: attends everywhere, padding included, and pools its last position (Zhai et al. 2023).

    It was trained on texts without a start, padded to all N positions, and gets them so: the first token is left out,
    and padding is added.
    """

    def embed(self, input_ids: Tensor) -> Tensor:
        """Add words and positions, which begin with the second token: int64 [..., L] -> float [..., L, D]."""
        positions = nn.functional.pad(self.positions[: input_ids.shape[-1] - 1], (0, 0, 1, 0))
        embedded: Tensor = self.words(input_ids) + positions
        return embedded

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Run the layers and the final norm on float [B, L, D]; ``is_valid`` is not read.

        Returns:
            float [B, L, D]: the state of the last of N positions, SigLIP's pooled token, then those of the words.
        """
        n_words = embedded.shape[1] - 1
        padding = self.words.weight[self.config.pad_token_id] + self.positions[n_words:]  # [N - L + 1, D]
        padded = torch.cat([embedded[:, 1:], padding.to(embedded.dtype).expand(len(embedded), -1, -1)], dim=1)
        encoded = self._run(padded, None)
        return torch.cat([encoded[:, -1:], encoded[:, :n_words]], dim=1)
