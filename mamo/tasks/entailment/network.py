"""The network of visual entailment: a backbone with a classifier of three labels on the fused [CLS].

Legend: B statements, L text tokens, D fusion width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.data.records import ENTAILMENT_LABELS
from mamo.models.fusion import LAYER_NORM_EPS
from mamo.models.heads import fp32_linear
from mamo.models.init import init_like_bert
from mamo.models.vlm import Backbone, Mamo


class EntailmentHead(nn.Module):
    """Linear, LayerNorm, GELU, Linear to a logit of each label (ALBEF: two linear layers on the fused [CLS])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(width, len(ENTAILMENT_LABELS))
        self.apply(init_like_bert)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits [B, 3] in fp32 or finer from the fused [CLS] float [B, D]."""
        return fp32_linear(self.classifier, functional.gelu(self.norm(self.dense(hidden))))


class EntailmentNetwork(Mamo):
    """Fuses an image with a sentence; `entailment` is the head."""

    entailment: EntailmentHead

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, {"entailment": EntailmentHead(backbone.fusion.width)})

    def embed(self, image: Tensor, is_blank: bool = False) -> Tensor:
        """Encode images uint8 [B, 3, H, W] and embed them for fusion: float [B, ...].

        With `is_blank` every pixel has the mean colour, so that the labels come from the sentences only.
        """
        pixels = self.backbone.image_encoder.normalize(image)
        return self.backbone.fusion.embed_image(
            self.backbone.image_encoder(torch.zeros_like(pixels) if is_blank else pixels)
        )

    def classify(self, image: Tensor, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        """Return logits [B, 3] of the labels, in the order of `ENTAILMENT_LABELS`.

        Args:
            image: float [B, ...], from `embed`.
            input_ids, is_valid: int64 and bool [B, L], the sentences.
        """
        fusion, text = self.backbone.fusion, self.backbone.text_encoder(input_ids, is_valid)
        cls = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=text.device))
        logits: Tensor = self.entailment(fusion(image, text, is_valid, output_positions=cls)[:, 0])
        return logits
