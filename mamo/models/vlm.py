"""The MAMO network: a backbone of encoders, fusion and projections, which the teacher copies, and the heads.

Legend: B batch, L text tokens, P patches, D width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mamo.models.fusion import FusionEncoder
from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead
from mamo.models.init import init_by_fan_in
from mamo.models.towers import ImageTower, TextTower


class Backbone(nn.Module):
    """Encoders, fusion and contrastive projections: the part that the momentum teacher copies."""

    def __init__(
        self,
        image_encoder: ImageTower,
        text_encoder: TextTower,
        fusion: FusionEncoder,
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
        """Pool and project image tokens [B, num_prefix_tokens + P, D] to L2-normalised fp32 ITC features [B, D_itc]."""
        pooled = self.image_encoder.pool(image_tokens)
        return functional.normalize(self.image_projection(pooled).float(), dim=-1)

    def text_feature(self, text_tokens: Tensor) -> Tensor:
        """Pool and project text tokens [B, L, D] to L2-normalised fp32 ITC features [B, D_itc]."""
        pooled = self.text_encoder.pool(text_tokens)
        return functional.normalize(self.text_projection(pooled).float(), dim=-1)


class Network(nn.Module):
    """A backbone with heads.

    Heads are attributes: `network.itm`, `network.mlm`, ...; see `get_head`. The names of parameters begin with
    `backbone.` or with the name of their head.
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
