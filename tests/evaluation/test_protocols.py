"""Protocols: what they fix, and that nothing else goes by their name."""

import json
import os
import tarfile

import pytest

from mamo.evaluation.protocols import (
    PROTOCOLS,
    apply_protocol,
    check_lineage,
    protocol_name,
    protocol_of,
    split_of,
)
from mamo.tasks.registry import build_config, is_same_network, task_class

MLIM = {
    "masking": {"mode": "modality_aware"},
    "losses": {"weights": {"itc": 0, "mim": 0, "mrm_image": 0, "mrm_text": 0}},
}


def values_of(**over):
    """The plain values of a resolved config, as a checkpoint holds them."""
    config = build_config({"output_dir": "x", "data": {"image_size_px": 64, "text_max_tokens": 20}, **over})
    return config.model_dump(mode="json")


def applied(name, values):
    return apply_protocol(name, values, is_same_network)


def name_of(config):
    return protocol_of(config, task_class(config.task).scenes_protocol)


@pytest.mark.parametrize(
    "name", [name for name in PROTOCOLS if name.endswith(("-zeroshot", "-retrieval")) and "scenes" in name]
)
def test_a_protocol_replaces_what_the_checkpoint_said(name):
    """Would catch a gallery, a k or a difficulty that comes from the training config."""
    trained = values_of(evaluation={"retrieval_items": 7, "rerank_k": 3, "enabled": False, "batch_size": 9})
    config = build_config(applied(name, trained))
    assert name_of(config) == name
    assert config.evaluation.enabled
    assert (config.evaluation.retrieval_items, config.evaluation.rerank_k) == (1000, 32)
    assert (config.evaluation.batch_size, config.data.image_size, config.data.text_max_tokens) == (9, (64, 64), 20)


def test_pairs_lose_the_training_files():
    """Would catch a checkpoint that can be evaluated only where its training data lies."""
    data = {"source": "pairs", "train_file": "gone.jsonl", "eval_file": "gone_too.jsonl"}
    assert "gone" not in str(applied("scenes-easy-zeroshot", values_of(data=data))["data"])
    config = build_config(applied("scenes-easy-zeroshot", values_of(data=data)))
    assert config.data.source == "scenes"


def test_other_numbers_go_by_another_name():
    """Would catch a result on 100 items that looks like one on 1,000."""
    values = applied("scenes-full-retrieval", values_of())
    values["evaluation"]["retrieval_items"] = 100
    assert name_of(build_config(values)) == "scenes-full-retrieval-custom"


def test_an_unknown_name_lists_the_known():
    """Would catch a KeyError."""
    with pytest.raises(ValueError, match=r"'coco' is unknown; use one of: scenes-easy-zeroshot"):
        applied("coco", values_of())


PUBLIC = [
    "coco5k-finetuned", "coco5k-zeroshot", "flickr30k-zeroshot", "flickr30k-finetuned", "vqa2-val", "vqa2-testdev",
    "nlvr2-dev", "nlvr2-testp", "refcocop-weak", "snli-ve-dev", "snli-ve-test",
]  # fmt: skip


@pytest.mark.parametrize("name", [*PUBLIC, *(name for name in PROTOCOLS if name not in PUBLIC)])
def test_every_protocol_gives_a_valid_config_from_a_checkpoint_of_its_task(name, tmp_path):
    """Would catch a protocol that cannot be run, and one that any other number of records goes by."""
    kind = PROTOCOLS[name].values["task"]
    values = applied(name, values_of(task=kind, **(MLIM if kind == "mlim" else {})))
    file = tmp_path / "testA.jsonl"
    n_records = PROTOCOLS[name].n_records or 1
    file.write_text("{}\n" * n_records)
    is_file = values["data"]["source"] != "scenes"
    if "items_files" in PROTOCOLS[name].values.get("evaluation", {}):
        values["evaluation"]["items_files"] = [str(file)]
    elif is_file:
        values["data"]["eval_file"] = str(file)
    config = build_config(values)
    assert config.task == kind
    open_setting = {"pairs-zeroshot": "-k16", "records-vqa": "-k16", "records-grounding": "-fusion"}.get(name, "")
    assert protocol_name(name, config) == name + open_setting
    assert split_of(name, config) == PROTOCOLS[name].split or (is_file and split_of(name, config) == "testA")
    task = object.__new__(task_class(config.task))
    task.config = config
    assert task.describe_scorer()
    if PROTOCOLS[name].n_records:
        file.write_text("{}\n" * (n_records - 1))
        assert protocol_name(name, config) == f"{name}-custom"
    if name in PUBLIC:
        assert config.data.image_size == (384, 384)
        assert config.evaluation.rerank_k == {"coco": 256, "flic": 128, "vqa2": 128}.get(name[:4], 16)


def test_any_path_as_the_official_file_is_a_name_or_one_message(tmp_path):
    """Bug: counting the records waits for ever on a pipe, or ends in a decode error of a tar."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    tarfile.open(tmp_path / "a.tar", "w").close()
    (tmp_path / "latin.jsonl").write_bytes(b'{"caption": "caf\xe9"}\n')
    values = applied("coco5k-zeroshot", values_of())

    def name(file):
        values["data"]["eval_file"] = str(file)
        return protocol_name("coco5k-zeroshot", build_config(values))

    for shards in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        assert name(shards) == "coco5k-zeroshot-custom"
    for file, message in (
        ("pipe.jsonl", "cannot be read: not a regular file"),
        ("latin.jsonl", "not UTF-8 text"),
        ("gone.jsonl", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=f"{file}: {message}"):
            name(tmp_path / file)


def test_a_checkpoint_of_another_task_is_refused():
    """Would catch a traceback about a head that is not there."""
    with pytest.raises(ValueError, match="vqa2-val needs a checkpoint of task vqa, this one is of pretrain"):
        applied("vqa2-val", values_of())
    assert applied("refcocop-weak", values_of())["task"] == "grounding"  # the same network


def link(*dataset_names):
    """One checkpoint of an ancestry."""
    return {"checkpoint": "x", "step": 1, "data_sets": list(dataset_names)}


def test_lineage():
    """Would catch a Flickr30k "zero-shot" of a model that saw Flickr30k, or of the raw model under the usual name."""
    raw, coco, flickr = link("cc3m", "coco", "sbu", "vg"), link("coco"), link("flickr30k")
    assert check_lineage("flickr30k-zeroshot", [raw, coco]) == "flickr30k-zeroshot"
    assert check_lineage("flickr30k-zeroshot", [raw]) == "flickr30k-zeroshot-raw"
    assert check_lineage("flickr30k-zeroshot", [{"checkpoint": "old"}]) == "flickr30k-zeroshot-raw"
    assert check_lineage("coco5k-zeroshot", [raw]) == "coco5k-zeroshot"
    assert check_lineage("coco5k-finetuned", [raw, coco]) == "coco5k-finetuned"
    assert check_lineage("flickr30k-finetuned", [raw, coco, flickr]) == "flickr30k-finetuned"
    assert check_lineage("snli-ve-test", [raw, coco, link("records")]) == "snli-ve-test"
    assert check_lineage("snli-ve-test", [raw, flickr, link("records")]) == "snli-ve-test-flickr30k"
    for name, ancestry, message in (
        ("flickr30k-zeroshot", [raw, flickr, coco], r"trained on Flickr30k \(cc3m \+ coco .* -> flickr30k -> coco\)"),
        ("coco5k-zeroshot", [raw, coco], "fine-tuned on COCO"),
        ("coco5k-finetuned", [raw], "not fine-tuned on coco"),
        ("coco1k-finetuned", [{"checkpoint": "old"}], r"not fine-tuned on coco \(unknown data\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_lineage(name, ancestry)


def test_scenes_tasks_have_their_own_names():
    """Would catch questions reported as retrieval."""
    for task, name in (("vqa", "vqa"), ("reasoning", "nlvr2"), ("grounding", "grounding")):
        values = values_of(task=task, evaluation={"rerank_k": 128, "grounding_heat": "image_encoder"})
        assert name_of(build_config(values)) == f"scenes-easy-{name}"
        assert json.dumps(applied(f"scenes-full-{name}", values))
