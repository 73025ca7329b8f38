"""A short text for the masked picture, the long one for the whole picture, against passes written out one by one."""

from typing import Any

import pytest
import torch

from mamo.data.collate import MASK_STREAM, sample_rng
from mamo.data.loader import collate_range
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import PairDataset
from mamo.tasks.objective import compute_views
from mamo.tasks.pretrain.batch import ShortPairBatch
from mamo.tasks.registry import build_task
from mamo.world.captions import caption
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of, spread_weights

SHORT = {"masking": {"text_for_masked_image": "short"}}


def made(**over: Any) -> tuple[Any, Any]:
    task = build_task(config_of(**over), scenes_tokenizer())
    batch = collate_range(task.train_dataset(), task.collator, range(8))
    torch.manual_seed(0)
    spread_weights(task.network, std=0.2, least_ndim=2)
    return task, batch


def test_the_masked_picture_meets_the_short_text_and_nothing_else_does() -> None:
    """Bug: the long caption is fused with the masked picture, the short one's padding is read, or the other passes,
    the targets, the masks or the drawn captions change too.
    """
    (task, batch), (plain, same) = made(**SHORT), made()
    assert isinstance(batch, ShortPairBatch)
    assert not isinstance(same, ShortPairBatch)
    for name, tensor in same.tensors().items():
        assert torch.equal(tensor, getattr(batch, name)), name
    plain.network.load_state_dict(task.network.state_dict())
    for network in (task.network, plain.network):
        network.eval()  # without dropout
    with torch.no_grad():
        views = compute_views(task.network, batch, task.schedule)
        before = compute_views(plain.network, same, plain.schedule)
        for name in set(before) - {"fused_patches", "visible"}:
            torch.testing.assert_close(views[name], before[name])
        assert not torch.allclose(views["fused_patches"], before["fused_patches"])
        body = task.network.backbone
        for k in range(len(batch)):
            ids = batch.short_input_ids[k][batch.short_is_valid[k]][None]
            text = body.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool))
            visible = batch.visible_patches[k : k + 1]
            image = body.fusion.embed_image(body.image_encoder(batch.image[k : k + 1], visible), visible)
            fused = body.fusion(image, text, torch.ones(text.shape[:2], dtype=torch.bool))[0]
            wanted = fused[body.fusion.patch_positions(batch.masked_patches[k])]
            torch.testing.assert_close(views["fused_patches"][k], wanted, atol=1e-4, rtol=1e-4)
    targets, _ = task.compute_targets(batch, 8, 0)
    expected, _ = plain.compute_targets(same, 8, 0)
    assert targets.counts == expected.counts
    losses, _ = task.losses(batch, targets, 0)
    sum(losses.values()).backward()


def test_the_short_text_of_scenes_and_records() -> None:
    """Bug: the short text is the drawn one, an empty one, or a full description."""
    task, batch = made(**SHORT)
    source = task.train_dataset()
    for k in range(8):
        sample = source.load(k, sample_rng(0, 0, k, MASK_STREAM))
        shorts = {caption(source.world.scene("train", k), n).text for n in (2, 3, 4)}
        if k % 2 == 0:  # every second scene may be another's counterpart
            assert sample.short in shorts
    del batch
    records = [
        PairRecord("x", ("A long one. It has two sentences.",), "1", 1, "f"),
        PairRecord("x", ("a long caption", "short", " "), "2", 2, "f"),
    ]
    data = PairDataset(records, (4, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamo.data.pairs.load_image", lambda image: torch.zeros(3, 4, 4, dtype=torch.uint8))
        patch.setattr("mamo.data.pairs.draw_caption", lambda captions, weights, rng: captions[0])
        assert [data.load(k, sample_rng(0, 0, k, 0)).short for k in range(2)] == ["A long one.", "short"]


@pytest.mark.parametrize(
    ("task", "masking", "message"),
    [
        ("pretrain", {"mode": "joint"}, "masking.text_for_masked_image: short contradicts masking.mode: joint"),
        ("pretrain", {"plan": "x:Y"}, "masking.text_for_masked_image: contradicts masking.plan"),
        ("grounding", {}, "masking.text_for_masked_image: expressions have no short captions"),
    ],
)
def test_where_there_is_no_short_text(task: str, masking: dict[str, str], message: str) -> None:
    """Bug: the key is accepted where nothing reads it."""
    with pytest.raises(ValueError, match=message):
        config_of(task, masking={"text_for_masked_image": "short", **masking})
