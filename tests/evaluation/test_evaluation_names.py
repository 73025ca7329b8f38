"""What decides a number is in its name, refused, or without effect."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mamo.commands.evaluate import main
from mamo.config.values import flatten
from mamo.evaluation.protocols import OVERRIDES, PROTOCOLS, apply_protocol, current_name, protocol_name
from mamo.evaluator import evaluate
from mamo.tasks.registry import build_config, is_same_network
from mamo.trainer import train
from mamo.world.export import export_scenes
from mamo.world.scene import SceneWorld
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import TWO_STEPS, config_of

SCENES = "scenes-easy-zeroshot"
SIZES = ["evaluation.retrieval_items=12", "evaluation.probe_items=6"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of the embedded world as files."""
    return export_scenes(SceneWorld("easy", 0), "val", 12, (16, 16), tmp_path_factory.mktemp("pairs"), "pairs")


@pytest.fixture(scope="module")
def on_pairs(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that is trained and evaluated on pairs; k is 5."""
    folder = tmp_path_factory.mktemp("pairs-run") / "run"
    train_file = export_scenes(SceneWorld("easy", 0), "train", 12, (16, 16), folder.parent / "train", "pairs")
    data = {"source": "pairs", "train_file": str(train_file), "eval_file": str(pairs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamo.trainer.plot_curves", lambda *_: None)
        train(
            config_of(
                output_dir=str(folder), training=TWO_STEPS, data=data, evaluation={"enabled": True, "rerank_k": 5}
            ),
            is_resume=False,
        )
    return folder


def at_the_end(run: Path) -> dict[str, Any]:
    """The entry of a run's own evaluation."""
    entry: dict[str, Any] = json.loads((run / "results.json").read_text())["evaluations"][-1]
    return entry


def test_k_comes_from_the_checkpoint_and_is_in_the_name(on_pairs: Path, pairs: Path, tmp_path: Path) -> None:
    """Bug: `pairs-zeroshot` re-ranks another k at the end of training than in `evaluate`: one name, two numbers."""
    own = at_the_end(on_pairs)
    assert own["protocol"] == "pairs-zeroshot-k5"
    file = f"data.eval_file={pairs}"
    later = evaluate(on_pairs, "pairs-zeroshot", [file], tmp_path)
    assert (later["protocol"], later["metrics"]) == (own["protocol"], own["metrics"])
    other = evaluate(on_pairs, "pairs-zeroshot", [file, "evaluation.rerank_k=2"], tmp_path)
    assert other["protocol"] == "pairs-zeroshot-k2"
    folds = evaluate(on_pairs, "pairs-zeroshot", [file, "evaluation.retrieval_folds=2"], tmp_path)
    assert folds["protocol"] == "pairs-zeroshot-k5-custom"


def test_what_was_trained_on_is_no_evaluation(on_pairs: Path, pairs: Path, tmp_path: Path) -> None:
    """Bug: recalls on the training pairs of a run, or of the run that it started from, pass as held out."""
    train_file = next(on_pairs.parent.glob("train/**/*.jsonl"))
    refused = pytest.raises(ValueError, match=r"data\.eval_file: .* has the content of the training file")
    with refused:
        evaluate(on_pairs, "pairs-zeroshot", [f"data.eval_file={train_file}"], tmp_path)
    for trained, held_out, start in ((pairs, pairs, None), (pairs, train_file, str(on_pairs))):
        data = {"source": "pairs", "train_file": str(trained), "eval_file": str(held_out)}
        folder = tmp_path / f"from-{start is not None}"
        settings = {"training": TWO_STEPS, "data": data, "checkpoint": start, "evaluation": {"enabled": True}}
        with refused:
            train(config_of(output_dir=str(folder), **settings), is_resume=False)
        assert not (folder / "checkpoints").exists()


def test_gallery_k_chance_and_ties_are_everywhere(
    on_pairs: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a recall whose gallery, k and chance are nowhere, or that ties decide."""
    settings = [
        f"checkpoint={on_pairs}",
        "protocol=pairs-zeroshot",
        f"data.eval_file={pairs}",
        f"output_dir={tmp_path}",
    ]
    main([*settings, "--pictures"])
    facts = at_the_end(tmp_path)["facts"]
    n_texts = facts["gallery_texts"]
    assert (facts["gallery_images"], facts["rerank_k"], facts["skipped"]) == (12, 5, 0)
    assert facts["chance/i2t_r1"] == pytest.approx(100 * 5 / n_texts)  # five captions an image
    assert facts["chance/t2i_r1"] == pytest.approx(100 / 12)
    assert {"ties/itc/i2t", "ties/itc/t2i", "ties/rerank/i2t", "ties/rerank/t2i"} <= facts.keys()
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "gallery images 12; " in printed
    assert "rerank k 5" in printed
    for name in ("gallery_images", "rerank_k", "chance/i2t_r1", "ties/itc/i2t"):
        assert f"<td>{name}</td>" in page


def test_skipped_images_show_in_the_name(on_pairs: Path, pairs: Path, tmp_path: Path) -> None:
    """Bug: a gallery that lost its unreadable images goes by the name of the whole one."""
    broken = tmp_path / "broken"
    shutil.copytree(pairs.parent, broken)
    next((broken / "images").iterdir()).write_bytes(b"no image")
    file = f"data.eval_file={broken / pairs.name}"
    entry = evaluate(on_pairs, "pairs-zeroshot", [file, "data.bad_samples.policy=skip"], tmp_path / "out")
    assert (entry["protocol"], entry["facts"]["skipped"]) == ("pairs-zeroshot-k5-custom", 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.text.heads=4", "the network is the checkpoint's"),
        ("model.image.name=deit_tiny_patch16_224", "the network is the checkpoint's"),
        ("model.dropout=0.5", "the network is the checkpoint's"),
        ("model={preset: small}", "a section"),
        ("task=grounding", "is of task pretrain"),
        ("seed=5", "an evaluation does not read it"),
        ("training.total_steps=9", "an evaluation does not read it"),
        ("training.device=cuda", "an evaluation does not read it"),
        ("data.workers=4", "an evaluation does not read it"),
        ("data.train_file=x.jsonl", "an evaluation does not read it"),
        ("data.source=pairs", "fixes it"),
        ("data={image_size_px: 24}", "a section; set one key of it"),
        ("data.bad_samples={policy: skip}", "a section; set one key of it"),
        ("evaluation={rerank_k: 3}", "a section; set one key of it"),
        ("evaluation.enabled=false", "an evaluation does not read it"),
        ("evaluation.every_steps=3", "an evaluation does not read it"),
        ("evaluation.rerank=3", "did you mean `evaluation.rerank_k`?"),
        ("checkpoints=x", "unknown key"),
        ("losses.weights.itm=0", "an evaluation does not read it"),
        ("masking.image_ratio=0.5", "an evaluation does not read it"),
        ("data.tokenizer=/nowhere", "/nowhere"),
    ],
)
def test_overrides_that_make_another_network_or_do_nothing_are_refused(
    override: str, message: str, pretrained: Path, tmp_path: Path, fails: Callable[[Callable[[], None]], str]
) -> None:
    """Bug: other heads, another task or a typing error are taken in silence, and the plain name is printed."""
    given = [f"checkpoint={pretrained}", f"protocol={SCENES}", f"output_dir={tmp_path / 'out'}", override]
    error = fails(lambda: main(given))
    assert message in error
    assert override.partition("=")[0].rpartition(".")[2] in error
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_of_the_same_words_is_custom(pretrained: Path, tmp_path: Path) -> None:
    """Bug: the override of the tokenizer is ignored, or accepted with other words than the network knows."""
    scenes_tokenizer().save_pretrained(tmp_path / "same")
    entry = evaluate(pretrained, SCENES, [*SIZES, f"data.tokenizer={tmp_path / 'same'}"], tmp_path / "out")
    assert entry["protocol"] == f"{SCENES}-custom"
    other = json.loads((tmp_path / "same/tokenizer.json").read_text())
    words = other["model"]["vocab"]
    first, second = [word for word in words if word.isalpha()][:2]
    words[first], words[second] = words[second], words[first]
    (tmp_path / "same/tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*another vocabulary"):
        evaluate(pretrained, SCENES, [*SIZES, f"data.tokenizer={tmp_path / 'same'}"], tmp_path / "out")


VALUES = st.one_of(
    st.integers(1, 64).map(str),
    st.floats(0.01, 0.99).map(str),
    st.sampled_from(["true", "false", "null", "bf16", "fp32", "auto", "[8, 16]", "skip", "easy", "full", "occlusion"]),
    st.sampled_from(["fusion", "image_encoder", "muon", "cross", "base", "scenes", "grounding", "pairs", "{}", "[]"]),
)


@pytest.fixture(scope="module")
def evaluated(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[str, Any]]]:
    """`evaluated(override)` returns the name and the numbers of a tiny evaluation."""
    folder, whole = tmp_path_factory.mktemp("evaluated"), PROTOCOLS[SCENES]
    few = {**whole.values["evaluation"], "retrieval_items": 12, "probe_items": 40, "rerank_k": 4}

    @cache
    def run(override: str) -> tuple[str, Any]:
        entry = evaluate(pretrained, SCENES, [override] if override else [], folder)
        return entry["protocol"], entry["metrics"]

    with mock.patch.dict(PROTOCOLS, {SCENES: replace(whole, values={**whole.values, "evaluation": few})}):
        yield run


KEYS = sorted({*flatten(config_of().model_dump()), *OVERRIDES, "vqa.head", "model", "data", "nothing"})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key="evaluation.rerank_k", value="2")
@example(key="data.text_max_tokens", value="5")
@example(key="data.image_size_px", value="24")
@example(key="training.precision", value="bf16")
@example(key="evaluation.grounding_heat", value="image_encoder")
def test_every_override_is_named_refused_or_without_effect(
    evaluated: Callable[[str], tuple[str, Any]], key: str, value: str
) -> None:
    """Bug: a key, perhaps one of tomorrow, that changes a number under the protocol's plain name."""
    plain, numbers = evaluated("")
    assert plain == SCENES
    with contextlib.suppress(ValueError):  # refused
        name, found = evaluated(f"{key}={value}")
        assert name != plain or found == pytest.approx(numbers, abs=1e-3)


def test_old_entries_are_read_with_their_k() -> None:
    """Bug: results of an earlier version do not compare with those of the same k."""
    for entry, name in (
        ({"protocol": "pairs-zeroshot", "rerank_k": 32}, "pairs-zeroshot-k32"),
        ({"protocol": "pairs-zeroshot-custom", "rerank_k": 8}, "pairs-zeroshot-k8-custom"),
        ({"protocol": "pairs-zeroshot-k32", "rerank_k": 32}, "pairs-zeroshot-k32"),
        ({"protocol": "pairs-zeroshot-k16-folds"}, "pairs-zeroshot-k16-folds"),
        ({"protocol": "records-vqa", "rerank_k": 128}, "records-vqa-k128"),
        ({"protocol": "scenes-easy-zeroshot", "rerank_k": 32}, "scenes-easy-zeroshot"),
        ({"protocol": "records-reasoning", "rerank_k": 16}, "records-reasoning"),
    ):
        assert current_name(entry) == name


def test_a_split_of_a_whole_file_is_counted(tmp_path: Path) -> None:
    """Bug: any split of a Karpathy file goes by the name of the test split."""
    sentences = {"sentences": [{"raw": "a circle"}]}
    images = [{"filename": f"{k}.jpg", "split": split, **sentences} for k, split in enumerate(["test", "val"] * 1000)]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    values = apply_protocol("flickr30k-finetuned", config_of().model_dump(mode="json"), is_same_network)
    for split, name in (("test", "flickr30k-finetuned"), ("val", "flickr30k-finetuned-custom")):
        values["data"] |= {"eval_file": str(tmp_path / "k.json"), "eval_split": split}
        assert protocol_name("flickr30k-finetuned", build_config(values)) == name


READ = {
    ("pretrain", "scenes"): {
        "retrieval_items",
        "near_duplicates",
        "rerank_k",
        "probe_items",
        "patch_scenes",
        "grounding_heat",
    },
    ("pretrain", "pairs"): {"rerank_k", "retrieval_folds"},
    ("vqa", "scenes"): {"rerank_k", "probe_items"},
    ("vqa", "records"): {"rerank_k"},
    ("reasoning", "scenes"): {"probe_items"},
    ("entailment", "scenes"): {"probe_items"},
    ("grounding", "scenes"): {"probe_items", "grounding_heat"},
    ("grounding", "records"): {"grounding_heat"},
    ("mlim", "scenes"): {"probe_items"},
    ("matching", "scenes"): {"probe_items"},
}
"""Keys of `evaluation` that decide a number, by task and source."""


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_what_an_evaluation_reads_is_fixed_or_named(name: str) -> None:
    """Bug: a protocol leaves a key to the config of the run, so that one name has two numbers."""
    protocol = PROTOCOLS[name]
    if "items_files" in protocol.values.get("evaluation", {}):
        assert "items_scores" in protocol.values["evaluation"]
        assert protocol.values["training"] == {"precision": "fp32"}
        return
    read = READ.get((protocol.values["task"], protocol.values["data"]["source"]), set())
    assert read <= {*protocol.values.get("evaluation", {}), *protocol.named}


def test_an_evaluation_keeps_the_others_and_the_runs_own(on_pairs: Path, pairs: Path, tmp_path: Path) -> None:
    """Bug: a second evaluation replaces the first one of another file, or the results of the training."""
    file = f"data.eval_file={pairs}"
    again = Path(shutil.copy(pairs, pairs.parent / "other.jsonl"))
    for override in (file, f"data.eval_file={again}", file):
        evaluate(on_pairs, "pairs-zeroshot", [override], tmp_path)
    entries = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert [entry["eval_file"] for entry in entries] == [str(again), str(pairs)]
    before = (on_pairs / "results.json").read_bytes()
    with pytest.raises(ValueError, match="is the folder of a run"):
        evaluate(on_pairs, "pairs-zeroshot", [file], on_pairs)
    assert (on_pairs / "results.json").read_bytes() == before
    step = shutil.copytree((on_pairs / "checkpoints/last").resolve(), tmp_path / "zz/models/best")
    evaluate(step, "pairs-zeroshot", [file])
    assert (step / "evaluations/pairs-zeroshot/results.json").exists()
    assert not (tmp_path / "zz/evaluations").exists()
