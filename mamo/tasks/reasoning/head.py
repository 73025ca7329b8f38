"""The reasoning head: classifies a sentence about one image or a pair, each fused with it by the same weights.

Legend: B statements, I images of each (1 or 2), S fused tokens of one image, D fusion width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.fusion import LAYER_NORM_EPS, FusionEncoder, FusionLayer
from mamo.models.heads import fp32_linear
from mamo.models.init import init_like_bert
from mamo.models.layers import LayeredModule


class ReasoningHead(LayeredModule):
    """Transformer layers across the fused tokens of all images, then an MLP on the mean and difference of the images.

    Every image has a vector h: the fused [CLS], after it has attended to the tokens of all images, and the mean of its
    fused patches. The MLP reads the mean of h, |h0 - h1| (zero for one image), and, only where the sentence
    distinguishes left from right, h0 - h1. Under the same condition a side embedding is added to the layers' input. So
    exchanging the two images never changes the answer to an unordered sentence ("both images show a dog", "there are
    three cups in total"), only to an ordered one ("the left image shows ...").
    """

    layers: nn.ModuleList

    def __init__(self, fusion: FusionEncoder, layers: int) -> None:
        """Build the head.

        Raises:
            ValueError: the fusion gives no fused patches.
        """
        super().__init__()
        if not fusion.has_patch_outputs:
            raise ValueError(f"reasoning reads fused image tokens, and {type(fusion).__name__} gives none")
        width = fusion.width
        self.num_image_positions, self.num_prefix_tokens = fusion.num_image_positions, fusion.num_prefix_tokens
        self.side = nn.Parameter(torch.empty(2, width))
        nn.init.trunc_normal_(self.side, std=0.02, a=-0.04, b=0.04)
        self.dense = nn.Linear(6 * width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(width, 1)
        self.apply(init_like_bert)
        sizes = (width, fusion.heads, fusion.mlp_width, fusion.dropout_p)
        self.layers = nn.ModuleList([FusionLayer(*sizes) for _ in range(layers)])

    def forward(self, fused: Tensor, text_is_valid: Tensor, is_ordered: Tensor) -> Tensor:
        """Compute logits that the sentences are true.

        Args:
            fused: float [B, I, S, D], all tokens of each image fused with the sentence.
            text_is_valid: bool [B, L], False for padding.
            is_ordered: bool [B], whether the sentence distinguishes the first image from the second.

        Returns:
            float [B], in fp32 or finer.
        """
        b, n_images, s, d = fused.shape
        ordered = is_ordered.to(fused.dtype)
        sided = fused + ordered.view(b, 1, 1, 1) * self.side[:n_images, None]  # [B, I, S, D]
        tokens = sided.reshape(b, n_images * s, d)
        is_valid = functional.pad(text_is_valid, (self.num_image_positions, 0), value=True).repeat(
            1, n_images
        )  # [B, I S]
        at_cls = torch.arange(n_images, device=fused.device) * s + self.num_image_positions
        cls_positions = at_cls.expand(b, n_images)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, is_valid)
        cls = self.layers[-1](tokens, is_valid, cls_positions)  # [B, I, D]
        patches = fused[:, :, self.num_prefix_tokens : self.num_image_positions].mean(dim=2)
        h = torch.cat([cls, patches], dim=-1)  # [B, I, 2 D]
        difference = h[:, 0] - h[:, -1]  # of one image from itself: zero
        joined = torch.cat([h.mean(dim=1), difference.abs(), ordered[:, None] * difference], dim=-1)  # [B, 6 D]
        return fp32_linear(self.classifier, functional.gelu(self.norm(self.dense(joined))))[:, 0]

    def init_from(self, fusion: FusionEncoder) -> None:
        """Copy the fusion's last layer, whose [CLS] is trained to attend to patches and words, into every layer."""
        for layer in self.layers:
            layer.load_state_dict(fusion.layers[-1].state_dict())
