"""The feature queue against a plain `collections.deque`."""

from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamo.queue import FeatureQueue

WIDTH = 3


def samples(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`n` recognisable samples, numbered from `first`."""
    number = torch.arange(first, first + n)
    feature = number[:, None].float().expand(n, WIDTH)
    return feature + 0.25, -feature - 0.5, number * 10 + 1, number * 10 + 2


def contents(queue: FeatureQueue) -> list[tuple[float, float, int, int]]:
    """The filled slots, in the order of the sample's number."""
    is_filled = queue.is_filled()
    assert queue.image_feature.shape == queue.text_feature.shape == (queue.size, WIDTH)
    return sorted(
        zip(
            queue.image_feature[is_filled][:, -1].tolist(),
            queue.text_feature[is_filled][:, 0].tolist(),
            queue.image_id[is_filled].tolist(),
            queue.caption_id[is_filled].tolist(),
        )
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(size=st.integers(0, 12), pushes=st.lists(st.integers(0, 30), max_size=12))
def test_queue_equals_a_deque(size: int, pushes: list[int]) -> None:
    """Bug: batches that do not divide the size, or exceed it, keep the wrong samples or mix up their fields."""
    queue, expected, first = FeatureQueue(size, WIDTH), deque(maxlen=size), 0
    for n in pushes:
        image, text, image_id, caption_id = samples(first, n)
        queue.push(image, text, image_id, caption_id)
        expected.extend(zip(image[:, -1].tolist(), text[:, 0].tolist(), image_id.tolist(), caption_id.tolist()))
        first += n
        assert contents(queue) == sorted(expected)


def test_queue_continues_from_its_state_dict() -> None:
    """Bug: the write position or fill count is not in the checkpoint, so a resumed queue overwrites other slots."""
    straight, before = FeatureQueue(5, WIDTH), FeatureQueue(5, WIDTH)
    for queue in (straight, before):
        queue.push(*samples(0, 3))
    after = FeatureQueue(5, WIDTH)
    after.load_state_dict(before.state_dict())
    for queue in (straight, after):
        queue.push(*samples(3, 4))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_queue_holds_no_graph_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    """Bug: features pushed with their graph keep every past step in memory; a bf16 push changes the buffer's type."""
    queue = FeatureQueue(4, WIDTH)
    feature = torch.ones(2, WIDTH, dtype=dtype, requires_grad=True)
    queue.push(feature * 2, feature * 3, torch.arange(2), torch.arange(2))
    assert not queue.image_feature.requires_grad
    assert not queue.text_feature.requires_grad
    assert queue.image_feature.dtype == torch.float32
    assert queue.image_feature[:2].eq(2).all()
