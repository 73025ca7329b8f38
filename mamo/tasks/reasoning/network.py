"""The network of reasoning: a backbone and a head over one image or a pair."""

from torch import Tensor

from mamo.models.vlm import Backbone, Mamo
from mamo.tasks.reasoning.head import ReasoningHead


class ReasoningNetwork(Mamo):
    """Fuses each image with the sentence; `pair` is the head over all of them."""

    pair: ReasoningHead

    def __init__(self, backbone: Backbone, pair: ReasoningHead) -> None:
        super().__init__(backbone, {"pair": pair})

    def reason(self, images: Tensor, input_ids: Tensor, is_valid: Tensor, is_ordered: Tensor) -> Tensor:
        """Return logits float32 [B] that sentences are true of their images.

        Args:
            images: float [B, I, num_prefix_tokens + P, D], embedded for fusion.
            input_ids, is_valid: int64 and bool [B, L], the sentences, encoded once for all images.
            is_ordered: bool [B], whether a sentence distinguishes the first image from the second.
        """
        b, n_images = images.shape[:2]
        text = self.backbone.text_encoder(input_ids, is_valid)
        text, text_is_valid = (value.repeat_interleave(n_images, dim=0) for value in (text, is_valid))
        fused = self.backbone.fusion(images.flatten(0, 1), text, text_is_valid)
        logits: Tensor = self.pair(fused.view(b, n_images, *fused.shape[1:]), is_valid, is_ordered)
        return logits
