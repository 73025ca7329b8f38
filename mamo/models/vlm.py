"""The MAMO network: encoders, fusion and projections (the part that has a teacher copy), and the heads.

Legend: B batch, L text tokens, P patches, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion
from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.init import init_by_fan_in
from mamo.models.text_encoder import TextEncoder
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder


class Backbone(nn.Module):
    """Encoders, fusion and contrastive projections: everything that the momentum teacher copies."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        fusion: Fusion | CrossFusion,
        itc_width: int,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.fusion = fusion
        self.image_projection = nn.Linear(image_encoder.width, itc_width)
        self.text_projection = nn.Linear(text_encoder.width, itc_width)
        self.image_projection.apply(init_by_fan_in)
        self.text_projection.apply(init_by_fan_in)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """Encoded image tokens [B, num_prefix_tokens + P, D] -> L2-normalised fp32 features [B, D_itc] for ITC.

        Reads the class token, or the mean patch of encoders without one.
        """
        pooled = image_tokens[:, 0] if self.image_encoder.num_prefix_tokens else image_tokens.mean(dim=1)
        return functional.normalize(self.image_projection(pooled).float(), dim=-1)

    def text_feature(self, text_tokens: Tensor) -> Tensor:
        """Encoded text tokens [B, L, D] -> L2-normalised fp32 features [B, D_itc] for ITC, from [CLS]."""
        return functional.normalize(self.text_projection(text_tokens[:, 0]).float(), dim=-1)


class Mamo(nn.Module):
    """The online network: a backbone and the heads that the losses in use ask for.

    What no loss in use reaches is frozen rather than left out, so that backbones are alike whatever the losses:
    the projections without ITC, the mask token without ``mim`` and ``mrm``, the fusion without any fused head.
    A head that was not asked for is None.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        itc: bool = False,
        itm: bool = False,
        mlm: bool = False,
        mim_width: int | None = None,
        mim_blocks: int = 0,
        mrm_image: bool = False,
        mrm_text: bool = False,
        joint: bool = False,
        answer: AnswerDecoder | AnswerClassifier | None = None,
        pair: ReasoningHead | None = None,
        predictor_width: int | None = None,
        temperature: float = 0.07,
    ) -> None:
        """Build the heads.

        Args:
            backbone: the encoders and the fusion.
            itc, itm, mlm, mrm_image, mrm_text: which losses are in use.
            mim_width: width of the MIM targets, the image encoder's or ``3 * patch_px**2``; None without MIM.
            mim_blocks: transformer blocks in the MIM head, 0 to 6; 0 is an MLP.
            joint: whether the masked text is fused with the masked image, so that its losses reach the mask token too.
            answer, pair: the head of VQA or of reasoning over images, made for this backbone.
            predictor_width: hidden width of the MRM predictors; None is the fusion width.
            temperature: where the learned ITC temperature starts.

        Raises:
            ValueError: a loss on fused image tokens with a fusion that gives none.
        """
        super().__init__()
        fusion = backbone.fusion
        hidden_width = predictor_width or fusion.width
        self.backbone = backbone
        self.temperature = nn.Parameter(torch.tensor(temperature)) if itc else None
        self.itm = ITMHead(fusion.width) if itm else None
        self.mlm = MLMHead(fusion.width, backbone.text_encoder.word_embeddings) if mlm else None
        self.mim = MIMHead(fusion.width, mim_width, mim_blocks, fusion.heads) if mim_width else None
        self.mrm_image = MRMHead(fusion.width, hidden_width) if mrm_image else None
        self.mrm_text = MRMHead(fusion.width, hidden_width) if mrm_text else None
        self.answer = answer
        self.pair = pair
        if not itc:
            backbone.image_projection.requires_grad_(False)
            backbone.text_projection.requires_grad_(False)
        if isinstance(fusion, CrossFusion):
            if mim_width or mrm_image:
                raise ValueError("mim and mrm_image read fused image tokens, and cross-attention fusion gives none")
        elif not (mim_width or mrm_image or (joint and (mlm or mrm_text))):
            fusion.mask_token.requires_grad_(False)
        if not (itm or mlm or mim_width or mrm_image or mrm_text or answer or pair):
            fusion.requires_grad_(False)

    def judge(self, slots: Tensor, input_ids: Tensor, is_valid: Tensor, is_ordered: Tensor) -> Tensor:
        """Logits float32 [B] that sentences are true of their images: each image is fused with its sentence, then
        the pair head.

        Args:
            slots: float [B, I, num_prefix_tokens + P, D], images embedded for fusion.
            input_ids, is_valid: int64 and bool [B, L], the sentences, encoded once for all images.
            is_ordered: bool [B], whether a sentence tells the first image from the second.
        """
        assert self.pair is not None
        b, n_images = slots.shape[:2]
        text = self.backbone.text_encoder(input_ids, is_valid)
        text, text_is_valid = (value.repeat_interleave(n_images, dim=0) for value in (text, is_valid))
        fused = self.backbone.fusion(slots.flatten(0, 1), text, text_is_valid)
        logits: Tensor = self.pair(fused.view(b, n_images, *fused.shape[1:]), is_valid, is_ordered)
        return logits
