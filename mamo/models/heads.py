"""Heads on the fused tokens.

Legend: N tokens of all samples, B batch, K masked patches a sample, D fusion width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.fusion import LAYER_NORM_EPS, FusionLayer
from mamo.models.init import init_like_bert
from mamo.models.layers import LayeredModule


def fp32_linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """Compute `layer(hidden)` in fp32 or finer: scores that are ranked would tie in bf16."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return functional.linear(hidden.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class MLMHead(nn.Module):
    """BERT's masked-word head: dense, GELU, LayerNorm, then a decoder that shares the word embeddings' weight.

    Where the fusion width differs from the embeddings' width, the dense layer maps between them. ``decoder.weight``
    *is* ``word_embeddings.weight``: a network's state dict holds this memory under two names.
    """

    def __init__(self, width: int, word_embeddings: nn.Embedding, layer_norm_eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        embedding_width = word_embeddings.embedding_dim
        self.dense = nn.Linear(width, embedding_width)
        self.norm = nn.LayerNorm(embedding_width, eps=layer_norm_eps)
        self.apply(init_like_bert)
        self.decoder = nn.Linear(embedding_width, word_embeddings.num_embeddings)
        self.decoder.weight = word_embeddings.weight
        nn.init.zeros_(self.decoder.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute vocabulary logits [N, V] of fused tokens float [N, D]."""
        logits: Tensor = self.decoder(self.transform(hidden))
        return logits

    def transform(self, hidden: Tensor) -> Tensor:
        """Compute the decoder's input: float [..., D] -> [..., D_embedding]."""
        transformed: Tensor = self.norm(functional.gelu(self.dense(hidden)))
        return transformed

    def bert_named_tensors(self) -> dict[str, Tensor]:
        """Return views of the head's memory, without the shared weight, under BERT's names in ``cls.predictions``."""
        views = {f"transform.dense.{key}": value for key, value in self.dense.state_dict().items()}
        views |= {f"transform.LayerNorm.{key}": value for key, value in self.norm.state_dict().items()}
        return views | {"bias": self.decoder.bias.detach()}


class ITMHead(nn.Module):
    """Image-text matching: classifies whether a text belongs to an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 2)
        self.apply(init_like_bert)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits [B, 2] of (mismatch, match) from the fused text [CLS], float [B, D].

        In fp32 or finer: re-ranking orders pairs by these logits, and in bf16 many would tie.
        """
        return fp32_linear(self.classifier, hidden)


class MIMHead(LayeredModule):
    """Predicts the content of masked patches from their fused tokens.

    ``blocks=0`` (the paper's default, Table 10) is the MLP Linear-GELU-Linear. 1 to 6 are transformer blocks among the
    masked patches' tokens, then one Linear. The paper does not state the blocks' input. The fused tokens of the masked
    patches have already attended to the visible ones.
    """

    def __init__(self, width: int, out_width: int, blocks: int = 0, heads: int = 1) -> None:
        super().__init__()
        assert 0 <= blocks <= 6
        self.blocks = nn.ModuleList([FusionLayer(width, heads, 4 * width) for _ in range(blocks)])
        hidden = [] if blocks else [nn.Linear(width, width), nn.GELU()]
        self.project = nn.Sequential(*hidden, nn.Linear(width, out_width))
        self.project.apply(init_like_bert)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return list(self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict [B, K, D_out] from the fused tokens of the masked patches, float [B, K, D].

        ``D_out`` is the image encoder's width (teacher features) or ``3 * patch_px**2`` (pixels).
        """
        for block in self.blocks:
            tokens = block(tokens, None)
        predictions: Tensor = self.project(tokens)
        return predictions


class MRMHead(nn.Module):
    """The student's predictor for masked representation modelling: Linear-GELU-Linear, D -> hidden -> D."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, width))
        self.apply(init_like_bert)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the teacher's fused tokens [..., D] from the student's, float [..., D]."""
        predictions: Tensor = self.layers(tokens)
        return predictions
