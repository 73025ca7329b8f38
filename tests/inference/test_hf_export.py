"""A model as a folder in Hugging Face's layout: written, read without a network, and refused where it is not whole."""

import contextlib
import doctest
import importlib
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig

import mamo
from mamo.config.schema import RunConfig
from mamo.data.records import EntailmentRecord, ReasoningRecord, VqaRecord
from mamo.models.text_encoder import TextEncoder
from mamo.tasks.entailment.evaluate import predict_entailment
from mamo.tasks.reasoning.evaluate import predict_reasoning
from mamo.tasks.registry import finetune_config
from mamo.tasks.sources import load_records
from mamo.tasks.vqa.batch import ANSWERS
from mamo.tasks.vqa.evaluate import Answerer, answer_all
from mamo.trainer import TrainingRun, train
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import TWO_STEPS, config_of, finetuning_values, spread_weights, write_config

TEXTS = ["a small red circle", "a large blue square is left of a green star"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the examples see it: `runs/scenes`, `a.jpg` and `b.jpg`."""
    import mamo.trainer

    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamo.trainer, "plot_curves", lambda *_: None)
        train(config_of(output_dir=str(folder / "runs/scenes"), training=TWO_STEPS), is_resume=False)
        for task in ("vqa", "reasoning", "entailment"):
            where = {"output_dir": str(folder / f"runs/{task}"), "checkpoint": str(folder / "runs/scenes")}
            write_config(folder / "task.yaml", finetuning_values(task, **where))
            train(finetune_config(folder / "task.yaml", [], False), is_resume=False)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / name)
    return folder


def documented(name: str) -> list[doctest.DocTest]:
    """The examples of a public name, its methods included."""
    found = getattr(mamo, name)
    module = importlib.import_module(found.__module__)
    return [test for test in doctest.DocTestFinder().find(found, name, module=module) if test.examples]


@pytest.mark.parametrize("name", mamo.__all__)
def test_every_public_name_has_an_example_that_runs(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an example that shows a call or a result that is not so."""
    monkeypatch.chdir(home)
    tests = documented(name)
    assert tests, f"{name} shows no example"
    for test in tests:
        said: list[str] = []
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append).failed == 0, "".join(said)
    if name == "Model":
        shown = {test.name.rpartition(".")[2] for test in tests}
        calls = {"encode_image", "encode_text", "similarity", "match", "ground", "fill_mask", "answer", "reason"}
        assert calls <= shown


def test_it_is_read_back_as_it_was(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: weights, tokenizer or sizes that differ after a round trip; a tied weight twice; a network call."""
    model = mamo.load(home / "runs/scenes", device="cpu")
    model.save_pretrained(tmp_path / "e")
    names = {path.name for path in (tmp_path / "e").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert len(load_file(tmp_path / "e/model.safetensors")) == len(model.network.state_dict()) - 1  # the decoder's
    card = (tmp_path / "e/README.md").read_text()
    assert card.startswith("---\nlibrary_name: mamo\n")
    assert "parameters" in card
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for again in (mamo.load(tmp_path / "e", device="cpu"), mamo.Model.from_pretrained(tmp_path / "e")):
        assert again.processor.image_size_px == (16, 16)
        assert again.processor.text_max_tokens == 24
        assert again.card == model.card
        assert torch.equal(again.similarity([home / "a.jpg"], TEXTS), model.similarity([home / "a.jpg"], TEXTS))
        again.save_pretrained(tmp_path / "twice")
        assert (tmp_path / "twice/README.md").read_text() == card
    assert AutoTokenizer.from_pretrained(tmp_path / "e").get_vocab() == scenes_tokenizer().get_vocab()


def stirred(folder: Path) -> mamo.Model:
    """A model with larger random weights: one of two steps says nearly the same of everything."""
    model = mamo.load(folder)
    torch.manual_seed(0)
    spread_weights(model.network, least_ndim=2)
    return model


@pytest.mark.parametrize("is_exported", [False, True])
def test_answers_are_the_evaluators(home: Path, tmp_path: Path, is_exported: bool) -> None:
    """Bug: another list, other pixels or another order of questions than in the evaluation; a list left out."""
    model = stirred(home / "runs/vqa")
    if is_exported:
        model.save_pretrained(tmp_path / "e")
        model = mamo.load(tmp_path / "e")
    records, load_image = load_records(model.config.data, VqaRecord, "test", 5)
    answerer = Answerer(model._predictor, json.loads(model.assets[ANSWERS]), 16)
    with torch.inference_mode():
        expected = answer_all(answerer, records, load_image, (16, 16), 3)
    given = model.answer([load_image(r.image) for r in records], [r.question for r in records])
    assert given == [expected[record.question_id] for record in records]
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        model.answer(["a.jpg"], ["x", "y"])
    with pytest.raises(mamo.MissingHeadError, match=r"without reasoning.*--config sentences"):
        model.reason([["a.jpg"]], ["x"])


def test_entailment_is_the_evaluators(home: Path, tmp_path: Path) -> None:
    """Bug: labels in another order, logits for probabilities, or a head that an export leaves out."""
    model = stirred(home / "runs/entailment")
    records, load_image = load_records(model.config.data, EntailmentRecord, "test", 4)
    with torch.inference_mode():
        expected = predict_entailment(model._predictor, records, load_image, 3)
    model.save_pretrained(tmp_path / "e")
    for again in (model, mamo.load(tmp_path / "e")):
        for record in records:
            found = again.entails(load_image(record.image), record.sentence)
            assert list(found) == ["contradiction", "neutral", "entailment"]
            assert tuple(found.values()) == pytest.approx(expected[record.pair_id], abs=1e-5)
    with pytest.raises(ValueError, match="entails: give one text, not"):
        model.entails("a.jpg", ["x"])
    with pytest.raises(mamo.MissingHeadError, match=r"without vqa.*--config questions"):
        model.answer(["a.jpg"], ["x"])
    with pytest.raises(mamo.MissingHeadError, match=r"without entailment.*--config entailment_scenes"):
        mamo.load(home / "runs/vqa").entails("a.jpg", "x")


def test_reasoning_is_the_evaluators(home: Path) -> None:
    """Bug: images of one sentence given to another, logits for probabilities, sides forgotten."""
    model = stirred(home / "runs/reasoning")
    records, load_image = load_records(model.config.data, ReasoningRecord, "test", 4)
    with torch.inference_mode():
        logits = predict_reasoning(model._predictor, records, load_image, 3)
    images = [[load_image(name) for name in record.images] for record in records]
    probability = model.reason(images, [record.sentence for record in records])
    expected = torch.tensor([logits[record.identifier] for record in records]).sigmoid()
    torch.testing.assert_close(probability, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one list of images per sentence"):
        model.reason(images, ["x"])
    with pytest.raises(mamo.MissingHeadError, match=r"without vqa.*--config questions"):
        model.answer(["a.jpg"], ["x"])


def test_bf16_is_close(home: Path) -> None:
    """Bug: a precision that is ignored, or scores that are no longer float32."""
    exact, coarse = (mamo.load(home / "runs/scenes", precision=p).encode_text(TEXTS) for p in ("fp32", "bf16"))
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    torch.testing.assert_close(coarse, exact, atol=0.03, rtol=0)


def test_what_is_not_ours_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: code that a downloaded folder brings is run, or a damaged one is half loaded."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "e"
    mamo.load(home / "runs/scenes").save_pretrained(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(kind: type[Exception], message: str, **files: bytes) -> None:
        for name, content in (whole | {name.replace("__", "."): value for name, value in files.items()}).items():
            (folder / name).write_bytes(content)
        for load in (mamo.load, mamo.Model.from_pretrained):
            with pytest.raises(kind, match=message):
                load(folder)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    weights, config = whole["model.safetensors"], json.loads(whole["config.json"])
    refused(mamo.CheckpointError, r"model\.safetensors cannot be read", model__safetensors=weights[:-9])
    refused(mamo.CheckpointError, r"model\.safetensors cannot be read", model__safetensors=pickle.dumps(Evil()))
    refused(mamo.CheckpointError, "another kind of model", config__json=b'{"model_type": "clip"}')
    refused(mamo.CheckpointError, "Expecting|Unterminated", config__json=whole["config.json"][:40])
    refused(mamo.CheckpointError, "another kind of model", config__json=b"[]")
    refused(mamo.CheckpointError, "another kind of model", config__json=b'{"mamo": null}')
    refused(mamo.CheckpointError, "not a model", tokenizer_config__json=b"[]")
    resized = {**config, "mamo": {**config["mamo"], "data": {**config["mamo"]["data"], "image_size_px": 48}}}
    refused(mamo.CheckpointError, "not a model|pos_embed|architecture", config__json=json.dumps(resized).encode())
    other = {**config, "mamo": {**config["mamo"], "colour": "red"}}
    refused(mamo.CheckpointError, "colour", config__json=json.dumps(other).encode())
    auto = {**json.loads(whole["tokenizer_config.json"]), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    code = b"import pathlib\npathlib.Path('executed').touch()\nclass Evil: pass\n"
    auto.pop("tokenizer_class", None)
    (folder / "evil.py").write_bytes(code)
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    with contextlib.suppress(mamo.CheckpointError):  # refused or read without the code: either is safe
        mamo.load(folder)
    assert not (tmp_path / "executed").exists()
    vocabulary = whole["tokenizer.json"].replace(b'"circle"', b'"elcric"')
    refused(mamo.TokenizerMismatchError, "differs from the one", tokenizer__json=vocabulary)
    cased = whole["tokenizer.json"].replace(b'"lowercase": true', b'"lowercase": false')
    assert cased != whole["tokenizer.json"]
    refused(mamo.TokenizerMismatchError, "differs from the one", tokenizer__json=cased)
    assert not (tmp_path / "executed").exists()
    for path in folder.iterdir():
        path.unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(mamo.CheckpointError, match="not a complete checkpoint"):
        mamo.load(folder)
    with pytest.raises(mamo.CheckpointError):
        mamo.load("nobody/nothing")
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("no_curves")
def test_a_named_berts_configuration_stays_with_the_weights(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a checkpoint, its resumption, its fine-tuning or its export that asks again for a BERT which is gone."""
    bert = tmp_path / "bert-somewhere"
    values = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=len(scenes_tokenizer()) + 7, layer_norm_eps=1e-5, hidden_act="relu", **values)
    config.save_pretrained(bert)
    steps = {"total_steps": 2, "warmup_steps": 1, "checkpoint_every_steps": 1}
    settings = tiny(training=steps, model={"text": {"bert": str(bert)}})
    train(settings, is_resume=False)
    expected = mamo.load(tmp_path / "run").encode_text(TEXTS)
    (bert / "config.json").rename(tmp_path / "gone.json")
    model = mamo.load(tmp_path / "run")
    inside: TextEncoder = model.network.backbone.text_encoder
    assert (inside.bert.config.layer_norm_eps, inside.bert.config.hidden_act) == (1e-5, "relu")
    assert torch.equal(model.encode_text(TEXTS), expected)
    model.save_pretrained(tmp_path / "exported")
    assert torch.equal(mamo.load(tmp_path / "exported").encode_text(TEXTS), expected)
    TrainingRun(settings, is_resume=True)
    over = tmp_path / "finetune.yaml"
    over.write_text(f"output_dir: {tmp_path / 'next'}\ncheckpoint: {tmp_path / 'run'}\n")
    tuned = TrainingRun(finetune_config(over, [], False)).task.network.backbone.text_encoder
    assert tuned.bert.config.layer_norm_eps == 1e-5


def test_text_past_the_limit_is_told_once(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: cut in silence, or told for each batch."""
    model = mamo.load(home / "runs/scenes")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.encode_text(["red " * 50])
    assert caplog.text.count("texts are cut to 24 tokens; the longest has 52 (logged once)") == 1


def test_the_content_of_an_export_is_checked(home: Path, tmp_path: Path) -> None:
    """Bug: an export with a flipped bit in its weights, a changed setting or a lost file loads without a word."""
    folder = tmp_path / "e"
    mamo.load(home / "runs/scenes").save_pretrained(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights, config = whole["model.safetensors"], json.loads(whole["config.json"])
    start = 8 + int.from_bytes(weights[:8], "little")
    for place in (start, (start + len(weights)) // 2, len(weights) - 1):
        flipped = bytearray(weights)
        flipped[place] ^= 1
        (folder / "model.safetensors").write_bytes(flipped)
        with pytest.raises(mamo.CheckpointError, match=r"the content of model\.safetensors has changed"):
            mamo.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for key, value in (("text_max_tokens", 5), ("difficulty", "full")):
        data = {**config["mamo"]["data"], key: value}
        (folder / "config.json").write_text(json.dumps({**config, "mamo": {**config["mamo"], "data": data}}))
        with pytest.raises(mamo.CheckpointError, match=r"the content of `mamo` in config\.json has changed"):
            mamo.load(folder)
    old = {name: value for name, value in config.items() if name != "sha256"}
    (folder / "config.json").write_text(json.dumps(old))  # as earlier versions wrote it
    mamo.load(folder)


def test_an_export_imports_no_module_of_the_current_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a config.json with `task: evil:Task` runs any module of the current directory, or of the export by a path
    around it."""
    folder = tmp_path / "here" / "e"
    mamo.load(home / "runs/scenes").save_pretrained(folder)
    whole = json.loads((folder / "config.json").read_text())
    for file in (tmp_path / "here" / "evil.py", folder / "inside.py", tmp_path / "elsewhere" / "known.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n")
    monkeypatch.chdir(tmp_path / "here")
    for entry in ("", ".", str(tmp_path / "here"), str(tmp_path), str(folder), str(tmp_path / "elsewhere")):
        monkeypatch.syspath_prepend(entry)

    def refusal(key: str, path: str) -> str:
        values = json.loads(json.dumps(whole))
        section = values["mamo"]
        for name in key.split(".")[:-1]:
            section = section[name]
        section[key.split(".")[-1]] = [path] if key.endswith("extra") else path
        (folder / "config.json").write_text(json.dumps(values))
        messages = set()
        for load in (mamo.load, mamo.Model.from_pretrained):
            with pytest.raises(mamo.CheckpointError) as caught:
                load(folder)
            messages.add(str(caught.value))
        (message,) = messages
        assert "\n" not in message
        return message

    for key in ("task", "model.image.name", "model.text.name", "losses.extra", "masking.plan"):
        for path in ("evil:Task", "inside:Task", "e.inside:Task", "here.e.inside:Task"):
            assert "weights bring no code: import the module before loading them" in refusal(key, path)
    assert not (tmp_path / "executed").exists()
    assert "has no 'Task'" in refusal("task", "known:Task")
    assert (tmp_path / "executed").exists()
