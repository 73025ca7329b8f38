"""A ring buffer of teacher features: further ITC candidates from past samples."""

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The last `size` (image feature, text feature, image id, caption id) tuples, oldest overwritten first.

    Any number of samples may be pushed at once; `size` need not be a multiple of it. State lives in buffers, so a
    checkpoint holds it. Slots that were never filled are not returned.
    """

    image_feature: Tensor
    text_feature: Tensor
    image_id: Tensor
    caption_id: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image_feature", torch.zeros(size, width))
        self.register_buffer("text_feature", torch.zeros(size, width))
        self.register_buffer("image_id", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("caption_id", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, image_feature: Tensor, text_feature: Tensor, image_id: Tensor, caption_id: Tensor) -> None:
        """Append [N, D] features and [N] ids of one global batch; of more than `size` samples the last are kept."""
        if self.size == 0:
            return
        n = image_feature.shape[0]
        kept = min(n, self.size)
        start = self.position + (n - kept)
        slots = (start + torch.arange(kept, device=self.position.device)) % self.size
        self.image_feature[slots] = image_feature[n - kept :].to(self.image_feature.dtype)
        self.text_feature[slots] = text_feature[n - kept :].to(self.text_feature.dtype)
        self.image_id[slots] = image_id[n - kept :]
        self.caption_id[slots] = caption_id[n - kept :]
        self.position.add_(n).remainder_(self.size)
        self.filled.add_(n).clamp_(max=self.size)

    def is_filled(self) -> Tensor:
        """bool [size], True at slots that hold a sample."""
        return torch.arange(self.size, device=self.filled.device) < self.filled
