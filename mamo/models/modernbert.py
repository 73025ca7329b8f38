"""The text encoder ModernBERT: rotary positions, layers that normalise first, most of them attending within a window.

Legend: B batch, L text tokens, D width.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel

from mamo.models.attention import BERT_ATTENTION
from mamo.models.init import init_by_fan_in
from mamo.models.text_encoder import PublishedTextTower
from mamo.models.weights import WeightReport, check_keys, read_weights

_HEAD_PREFIXES = ("head.", "decoder.", "classifier.")


class ModernBertTower(PublishedTextTower):
    """All layers of ``transformers.ModernBertModel`` and its final norm."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config._attn_implementation = BERT_ATTENTION
        self.model: Any = ModernBertModel(config)
        self.model.apply(init_by_fan_in)
        self.config: ModernBertConfig = self.model.config
        self.width: int = config.hidden_size

    @property
    def layers(self) -> Sequence[nn.Module]:
        """ModernBERT's layers."""
        return list(self.model.layers)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """See `TextTower.word_embeddings`."""
        embeddings: nn.Embedding = self.model.embeddings.tok_embeddings
        return embeddings

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up words: token ids int64 [..., L] -> float [..., L, D]. Positions enter in the attention."""
        embedded: Tensor = self.word_embeddings(input_ids)
        return embedded

    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Normalise words and run the layers: float [B, L, D], bool [B, L] -> float [B, L, D]."""
        places = torch.arange(is_valid.shape[1], device=is_valid.device)
        is_near = (places[:, None] - places).abs() <= self.config.local_attention // 2  # [L, L]
        everywhere = is_valid[:, None, None, :]  # [B, 1, 1, L]
        # a padded query attends to every valid token: one without any would be NaN
        near = everywhere & (is_near | ~is_valid[:, None, :, None])  # [B, 1, L, L]
        masks = {"full_attention": everywhere, "sliding_attention": near}
        encoded: Tensor = self.model(inputs_embeds=embedded, attention_mask=masks).last_hidden_state
        return encoded


def load_modernbert(tower: ModernBertTower, path: Path) -> WeightReport:
    """Fill a tower from a folder or file of weights, with or without the prefix ``model.`` and heads.

    Raises:
        ValueError: naming the keys that are missing, unused (other than those of heads) or of another shape.
    """
    state = {key.removeprefix("model."): value for key, value in read_weights(path).items()}
    unused = tuple(key for key in state if key.startswith(_HEAD_PREFIXES))
    state = {key: value for key, value in state.items() if key not in unused}
    own = tower.model.state_dict()
    check_keys(state, own, str(path))
    tower.model.load_state_dict(state)
    return WeightReport(loaded=tuple(own), unused=unused)
