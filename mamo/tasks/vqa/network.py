"""The network of VQA: a backbone with an answer head."""

import torch
from torch import Tensor

from mamo.models.vlm import Backbone, Mamo
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder


class VqaNetwork(Mamo):
    """Fuses an image with a question; `answer` is the decoder or the classifier."""

    answer: AnswerDecoder | AnswerClassifier

    def __init__(self, backbone: Backbone, answer: AnswerDecoder | AnswerClassifier) -> None:
        super().__init__(backbone, {"answer": answer})

    def classify(self, image: Tensor, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        """Return the classifier's logits [B, N] from the fused [CLS].

        Args:
            image: images embedded for fusion, from the fusion's `embed_image`.
            input_ids, is_valid: int64 and bool [B, L], the questions.
        """
        assert isinstance(self.answer, AnswerClassifier)
        fusion, text = self.backbone.fusion, self.backbone.text_encoder(input_ids, is_valid)
        cls = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=text.device))
        logits: Tensor = self.answer(fusion(image, text, is_valid, output_positions=cls)[:, 0])
        return logits

    def remember(self, image: Tensor, input_ids: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder attends to, float [B, S, D], and which of it is valid, bool [B, S].

        Arguments as of `classify`.
        """
        fusion = self.backbone.fusion
        memory = fusion(image, self.backbone.text_encoder(input_ids, is_valid), is_valid)
        return memory, fusion.is_valid(is_valid)
