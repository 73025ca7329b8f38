"""Protocols: what they fix, and that nothing else goes by their name."""

import pytest

from mamo.config import build_config
from mamo.evaluation.protocols import PROTOCOLS, protocol_of, under


def values_of(**over):
    """The plain values of a resolved config, as a checkpoint holds them."""
    config = build_config({"output_dir": "x", "data": {"image_size_px": 64, "text_max_tokens": 20}, **over})
    return config.model_dump(mode="json")


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("scenes")])
def test_a_protocol_replaces_what_the_checkpoint_said(name):
    """Would catch a gallery, a k or a difficulty that comes from the training config."""
    trained = values_of(evaluation={"retrieval_items": 7, "rerank_k": 3, "enabled": False, "batch_size": 9})
    config = build_config(under(name, trained))
    assert protocol_of(config) == name
    assert config.evaluation.enabled
    assert (config.evaluation.retrieval_items, config.evaluation.rerank_k) == (1000, 32)
    assert (config.evaluation.batch_size, config.data.image_size, config.data.text_max_tokens) == (9, (64, 64), 20)


def test_pairs_lose_the_training_files():
    """Would catch a checkpoint that can be evaluated only where its training data lies."""
    data = {"source": "pairs", "train_file": "gone.jsonl", "eval_file": "gone_too.jsonl"}
    assert "gone" not in str(under("scenes-easy-zeroshot", values_of(data=data))["data"])
    config = build_config(under("scenes-easy-zeroshot", values_of(data=data)))
    assert config.data.source == "scenes"


def test_other_numbers_go_by_another_name():
    """Would catch a result on 100 items that looks like one on 1,000."""
    values = under("scenes-full-retrieval", values_of())
    values["evaluation"]["retrieval_items"] = 100
    assert protocol_of(build_config(values)) == "scenes-full-retrieval-custom"


def test_an_unknown_name_lists_the_known():
    """Would catch a KeyError."""
    with pytest.raises(ValueError, match=r"'coco' is unknown; use one of: scenes-easy-zeroshot"):
        under("coco", values_of())
