"""The MAMO network: encoders, fusion and projections (the part that has a teacher copy), and the heads.

Legend: B batch, L text tokens, P patches, D width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion
from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.init import init_by_fan_in
from mamo.models.text_encoder import TextEncoder


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


class Network(nn.Module):
    """A backbone with heads.

    Heads lie at the network by their names: `network.itm`, `network.mlm`, ...; see `get_head`. The names of parameters
    begin with `backbone.` or with the name of their head.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module | nn.Parameter]) -> None:
        """Take the backbone and the heads, in order."""
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            setattr(self, name, head)

    def get_head(self, name: str) -> Any:
        """Return a head, None where the network does not have it."""
        return getattr(self, name, None)


class Mamo(Network):
    """MAMO's network: encoders, fusion and projections, and the heads of the losses in use."""

    backbone: Backbone
    temperature: nn.Parameter
    itm: ITMHead
    mlm: MLMHead
    mim: MIMHead
    mrm_image: MRMHead
    mrm_text: MRMHead
