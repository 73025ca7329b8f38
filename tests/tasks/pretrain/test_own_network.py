"""Pre-training of a network of one's own: sizes are the network's, and disagreements are named."""

import numpy as np
import pytest

from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import build_config
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import values_of


def test_sizes_come_from_the_network() -> None:
    """Bug: the queue, the masks or the heads have the sizes of the config, next to a network of other sizes."""
    tokenizer = scenes_tokenizer()
    wide = build_config({"output_dir": "x", **values_of(model={"itc_width": 24})})
    network = PretrainTask(wide, tokenizer).network
    narrow = build_config({"output_dir": "x", **values_of(model={"itc_width": 8})})
    task = PretrainTask(narrow, tokenizer, network=network)
    assert task.network is network
    assert task.queue.image_feature.shape[1] == 24
    dataset = task.train_dataset()
    batch = task.collator([(0, dataset.load(k, np.random.default_rng(k))) for k in range(8)])
    targets, _ = task.compute_targets(batch, 8, 0)
    losses, _ = task.losses(batch, targets, 0)
    sum(losses.values()).backward()
    task.on_optimizer_step(batch, targets, 0)
    assert int(task.queue.filled) == min(8, task.queue.size)


def test_every_disagreement_is_named() -> None:
    """Bug: a shape error in the first step, or only the first of several mistakes."""
    tokenizer = scenes_tokenizer()
    weights = {"mim": 0.0, "mrm_image": 0.0}
    network = PretrainTask(
        build_config({"output_dir": "x", **values_of(losses={"weights": weights})}), tokenizer
    ).network
    other = build_config({"output_dir": "x", **values_of(data={"image_size_px": 32})})
    with pytest.raises(ValueError, match="the network does not fit the config") as caught:
        PretrainTask(other, tokenizer, network=network)
    for part in ("losses.weights.mim: the network has no head 'mim'", "data.image_size_px: (32, 32)", "(16, 16)"):
        assert part in str(caught.value)
