"""Records that share any caption are never each other's negatives: in the batch, the queue and the pools of ITM."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamo.data.collate import caption_id_rows
from mamo.data.loader import collate_range
from mamo.data.pairs_reader import write_json_lines
from mamo.losses.itc import positives
from mamo.queue import FeatureQueue
from mamo.tasks.pretrain.losses import pool_positives
from mamo.tasks.registry import build_task
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of


@pytest.mark.parametrize("seed", range(5))
def test_sets_that_meet_are_positives(seed: int) -> None:
    """Bug: an id is found in another row's place, a shared second caption is not seen, or a filling is an id."""
    rng = np.random.default_rng(seed)
    sets = [rng.integers(0, 40, size=rng.integers(1, 5)).tolist() for _ in range(30)]
    ids = caption_id_rows([(texts[0], tuple(texts)) for texts in sets], 4)
    image = torch.from_numpy(rng.integers(0, 15, 30))
    found = positives(image[:12], ids[:12], image, ids)
    for (i, one), (j, two) in itertools.product(enumerate(sets[:12]), enumerate(sets)):
        assert found[i, j] == (bool({*one} & {*two}) or image[i] == image[j])
    single = positives(image, ids[:, 0], image, ids[:, 0])
    assert torch.equal(single, positives(image, ids[:, :1], image, ids[:, :1]))


CAPTIONS = [["red one", "blue"], ["green", "Blue"], ["star", "square"], ["square", "circle"], ["circle"], ["alone"]]
SHARED = {(0, 1), (2, 3), (3, 4)}


def test_any_caption_counts_whichever_is_drawn(tmp_path: Path) -> None:
    """Bug: of two pictures with a caption in common one is a hard negative where another caption was drawn; the queue
    forgets the captions that were not drawn.
    """
    for k in range(6):
        Image.new("RGB", (24, 24), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
    write_json_lines(
        tmp_path / "a.jsonl", [{"image": f"{k}.png", "caption": texts} for k, texts in enumerate(CAPTIONS)]
    )
    data = {"source": "pairs", "train_file": str(tmp_path / "a.jsonl")}
    sizes = {"queue_size": 5, "itm_pool_size": 6}
    config = config_of(data=data, losses=sizes, training={"batch_size_global": 6, "micro_batch_size": 6})
    task = build_task(config, scenes_tokenizer())
    source = task.train_dataset()
    expected = [[i == j or (i, j) in SHARED or (j, i) in SHARED for j in range(6)] for i in range(6)]
    drawn = set[tuple[int, ...]]()
    for start in range(3):
        batch = collate_range(source, task.collator, [(k + start) % 6 for k in range(6)])
        drawn.add(tuple(batch.caption_id.tolist()))
        order = [(k + start) % 6 for k in range(6)]
        wanted = torch.tensor([[expected[i][j] for j in order] for i in order])
        assert batch.caption_ids.shape == (6, 2)
        assert torch.equal(pool_positives(batch, 6)[0], wanted)
        features = torch.zeros(2, 6, task.queue.image_feature.shape[1])
        task.queue.push(*features, batch.image_id, batch.caption_ids)
        place = (torch.arange(1, 6) + int(task.queue.position) - 6) % 5  # the queue holds the last five
        queued = positives(batch.image_id, batch.caption_ids, task.queue.image_id, task.queue.caption_ids())
        assert torch.equal(queued[:, place], wanted[:, 1:])
    assert len(drawn) > 1
    targets, _ = task.compute_targets(batch, 6, 0)
    assert targets.fixed["itc"].caption_ids.shape == (6 + 5, 2)


def test_a_queue_of_an_earlier_version_is_loaded() -> None:
    """Bug: a run with several captions a picture, begun with one id a sample, cannot be resumed."""
    queue = FeatureQueue(3, 2)
    stored = torch.tensor([4, 5, 6])
    queue.widen(2)
    assert queue.caption_id.shape == (3, 2)
    assert torch.equal(queue.widened(stored), torch.tensor([[4, 4], [5, 5], [6, 6]]))
    assert queue.widened(torch.ones(3, 2)).shape == (3, 2)
    assert set(FeatureQueue(3, 2).state_dict()) == set(queue.state_dict())
