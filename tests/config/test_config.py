"""Configuration: strict, early, all problems at once; whatever is accepted is read."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mamo.config import load
from mamo.config.objective import LossWeights
from mamo.config.presets import PRESETS
from mamo.config.schema import RunConfig
from mamo.config.unused import all_defaults, defaults, non_defaults
from mamo.config.values import merge
from mamo.tasks.mlim.pretrain import LOSSES as MLIM_LOSSES
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.losses import LOSSES as MAMO_LOSSES
from mamo.tasks.registry import CONFIG_TYPES, build_config, load_config
from mamo.training.run_dir import dump

ROOT = Path(__file__).parents[2]
CONFIG_FILES = [*(ROOT / "mamo/config").glob("*.py"), *(ROOT / "mamo/tasks").glob("*/config.py")]
STUDIES = ROOT / "configs" / "studies"
FILES = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if STUDIES not in path.parents or path.stem.startswith("base_")  # studies have a test of their own
)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    """The one message that a faulty file must end in."""
    with pytest.raises(ValueError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def leaves(section: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The dotted path of every key that a file may hold."""
    found = []
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += leaves(kind, (*path, name)) if is_section else [(*path, name)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_loads(path: Path) -> None:
    """Bug: a file that ships with the project does not pass its own validation."""
    assert load_config(path).output_dir


def test_there_are_config_files() -> None:
    """Bug: the test above runs over nothing."""
    assert ROOT / "configs" / "pretrain" / "scenes.yaml" in FILES


def test_an_unknown_key_names_its_nearest(tmp_path: Path) -> None:
    """Bug: a misspelt key is ignored and its default trains in silence."""
    text = message(tmp_path, "output_dir: x\ntraining: {warmup_step: 5}\nmaskin: {}\nmodel: {text: {layer: 2}}\n")
    assert "training.warmup_step: unknown key; did you mean `warmup_steps`?" in text
    assert "maskin: unknown key; did you mean `masking`?" in text
    assert "model.text.layer: unknown key; did you mean `layers`?" in text


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    """Bug: a person learns of ten mistakes in ten runs."""
    text = message(
        tmp_path,
        "masking: {image_ratio: 1.5, mode: both}\ntraining: {total_steps: 0, learning_rate: fast, nonsense: 1}\n",
    )
    for path in ("output_dir", "masking.image_ratio", "masking.mode", "training.total_steps", "training.learning_rate"):
        assert f"\n  {path}: " in text, path
    assert "training.nonsense: unknown key" in text
    assert "6 problem(s)" in text
    assert "1.5" in text
    assert "'both'" in text


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("training: {learning_rate: true}", "training.learning_rate"),
        ("training: {total_steps: true}", "training.total_steps"),
        ("training: {total_steps: 10.5}", "training.total_steps"),
        ("training: {total_steps: '10'}", "training.total_steps"),
        ("training: {learning_rate: '1e-4'}", "training.learning_rate"),
        ("training: {learning_rate: .inf}", "training.learning_rate"),
        ("training: {learning_rate: .nan}", "training.learning_rate"),
        ("training: {learning_rate: -1e-4}", "training.learning_rate"),
        ("training: {compile: 1}", "training.compile"),
        ("training: {compile: 'yes'}", "training.compile"),
        ("seed: -1", "seed"),
        ("masking: {text_ratio: 0}", "masking.text_ratio"),
        ("masking: {image_ratio: 1}", "masking.image_ratio"),
        ("losses: {weights: {itc: -1}}", "losses.weights.itc"),
        ("teacher: {momentum: 1.01}", "teacher.momentum"),
        ("data: {image_size_px: true}", "data.image_size_px"),
        ("data: {image_size_px: [64]}", "data.image_size_px"),
        ("data: {image_size_px: [64, -8]}", "data.image_size_px"),
        ("model: {preset: huge}", "model.preset"),
        ("data: []", "data"),
        ("data:", "data"),
        ("model: 3", "model"),
    ],
)
def test_wrong_values_are_refused_by_path(tmp_path: Path, line: str, path: str) -> None:
    """Bug: `true` becomes 1, `10.5` becomes 10, an infinite rate trains to NaN; or the message does not say where."""
    assert f"\n  {path}" in message(tmp_path, f"output_dir: x\n{line}\n")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1.e-4", ".1e-3", "+1e-4", "1e-04"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    """Bug: PyYAML's YAML 1.1 reads `1e-4` as a string."""
    config = load_config(write(tmp_path, f"output_dir: x\ntraining: {{learning_rate: {text}}}\n"))
    assert config.training.learning_rate == 1e-4
    assert load_config(write(tmp_path, "output_dir: x"), [f"training.learning_rate={text}"]) == config


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    """Bug: the resolver for `1e-4` also takes folder names such as `e5` or `1e-4x`."""
    for name in ("e5", "1e-4x", "v1e5"):
        assert load_config(write(tmp_path, f"output_dir: {name}\n")).output_dir == name


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("data: {source: pairs}\nevaluation: {enabled: false}", "data.train_file"),
        ("data: {source: pairs, train_file: a.jsonl}", "data.eval_file"),
        ("data: {train_file: a.jsonl}", "data.train_file"),
        ("losses: {weights: {itc: 0, itm: 0, mlm: 0, mim: 0, mrm_image: 0, mrm_text: 0}}", "losses.weights"),
        ("losses: {itc_candidates: batch, queue_size: 64}", "losses.queue_size"),
        ("losses: {itc_candidates: batch, itc_soft_target_alpha: 0.4}", "losses.itc_soft_target_alpha"),
        ("losses: {weights: {mlm: 0}, mlm_soft_target_alpha: 0.4}", "losses.mlm_soft_target_alpha"),
        ("losses: {weights: {itc: 0}, itc_soft_target_alpha: 0.4}", "losses.itc_soft_target_alpha"),
        ("losses: {weights: {mim: 0}, mim_target: pixels}", "losses.mim_target"),
        (
            "model: {fusion_type: cross}",
            "model.fusion_type",
        ),
        ("model: {fusion_type: cross}\nlosses: {weights: {mim: 0}}", "model.fusion_type"),
        ("model: {fusion_type: cross}\ntask: reasoning", "model.fusion_type"),
        ("training: {total_steps: 10, warmup_steps: 11}", "training.warmup_steps"),
        ("training: {learning_rate: 1e-4, learning_rate_min: 1e-3}", "training.learning_rate_min"),
        ("training: {micro_batch_size: 48}\nlosses: {itm_pool_size: 16}", "training.micro_batch_size"),
        ("training: {batch_size_global: 64, micro_batch_size: 128}", "training.micro_batch_size"),
        ("training: {batch_size_global: 48}", "losses.itm_pool_size"),
        ("losses: {itm_uniform_steps: 5, weights: {itm: 0}}", "losses.itm_uniform_steps"),
        ("losses: {itm_uniform_steps: 5, itm_negatives: foils}", "losses.itm_uniform_steps"),
        (
            "evaluation: {enabled: false, patch_scenes: 5}\ndata: {source: pairs, train_file: a}",
            "evaluation.patch_scenes",
        ),
        ("losses: {itc_candidates: batch}\ntraining: {micro_batch_size: 32}", "losses.itc_candidates"),
        ("model: {text: {weights: bert}}", "model.text.bert"),
        ("data: {curriculum_scenes: [64, 3]}", "data.curriculum_scenes"),
        ("data: {curriculum_scenes: [64, 64], train_scenes: 100}", "data.curriculum_scenes"),
        ("data: {curriculum_scenes: [64]}\ntask: vqa", "data.curriculum_scenes"),
        ("data: {augmentation: {shift_max: 0.1}}", "data.augmentation.shift_max"),
        ("data: {augmentation: {tag_subsets: true}}", "data.augmentation.tag_subsets"),
        (
            "data: {source: records, train_file: a, eval_file: b, augmentation: {word_dropout: 0.1}}\ntask: vqa",
            "data.augmentation.word_dropout",
        ),
        (
            "data: {source: pairs, train_file: a, eval_file: b, augmentation: {fill: 255}}",
            "data.augmentation.fill",
        ),
        (
            "data: {source: pairs, train_file: a, eval_file: b, augmentation: {randaugment: true, fill: [1, 2]}}",
            "data.augmentation.fill",
        ),
        ("data: {source: pairs, train_file: a, eval_file: [x/b.jsonl, y/b.jsonl]}", "data.eval_file"),
        ("model: {image: {stem: convolutions, weights: timm}}", "model.image.stem"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, lines: str, path: str) -> None:
    """Bug: keys that cannot hold together are found out hours later, or one of them is ignored."""
    text = message(tmp_path, f"output_dir: x\n{lines}\n")
    assert f"\n  {path}: " in text
    assert "1 problem(s)" in text


def test_overrides(tmp_path: Path) -> None:
    """Bug: an override is ignored, its value stays text, or it makes a section that the file lacks fail."""
    path = write(tmp_path, "output_dir: x\ntraining: {total_steps: 500}\n")
    config = load_config(
        path,
        ["training.total_steps=700", "evaluation.enabled=false", "data.image_size_px=[32, 48]", "output_dir=a=b",
         "model.image.depth=2", "losses.weights.mim=0"],
    )  # fmt: skip
    assert config.training.total_steps == 700
    assert config.evaluation.enabled is False
    assert config.data.image_size == (32, 48)
    assert config.output_dir == "a=b"
    assert config.model.image.depth == 2
    assert config.losses.weights.mim == 0


@pytest.mark.parametrize(
    "override", ["total_steps", "=3", "training..total_steps=3", "training.total_steps=[", "seed.x=3"]
)
def test_malformed_overrides_are_refused(tmp_path: Path, override: str) -> None:
    """Bug: a typing slip on the command line is dropped in silence or ends in a traceback."""
    assert f"override `{override}`" in message(tmp_path, "output_dir: x\nseed: 1\n", override)


def test_an_override_of_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """Bug: overrides go round the strict check."""
    assert "did you mean `total_steps`" in message(tmp_path, "output_dir: x", "training.total_step=3")


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\noutput_dir: x", "output_dir: x\ndata:\n  workers: 1\n  workers: 2\n"]
)
def test_a_repeated_key_is_refused(tmp_path: Path, text: str) -> None:
    """Bug: YAML takes the last of two values in silence."""
    assert "appears twice" in message(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- 1\n", "just text", "a: [", "a: !!python/object/apply:os.system [ls]"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """Bug: an empty or broken file ends in a traceback; a YAML tag runs code."""
    assert "config.yaml" in message(tmp_path, text)


@pytest.mark.parametrize("text", ["training: [1]", "training: 5", "model: tiny"])
def test_a_section_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    """Bug: a message in the words of the validating library."""
    section = text.partition(":")[0]
    assert f"{section}: expected keys and values" in message(tmp_path, f"output_dir: x\n{text}\n")


def test_a_config_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    """Bug: an editor's UTF-16 ends in a codec's message about YAML."""
    (tmp_path / "config.yaml").write_text("output_dir: x\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"config\.yaml: not UTF-8 text \(at byte 0\); convert it to UTF-8"):
        load_config(tmp_path / "config.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Bug: a traceback for a mistyped path."""
    with pytest.raises(ValueError, match=r"config file not found: .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_dumped_config_is_the_same_config(tmp_path: Path, path: Path) -> None:
    """Bug: the resolved file of a run loads to other values, since a preset or default is applied anew."""
    config = load_config(path)
    dump(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_round_trip(tmp_path: Path, preset: str) -> None:
    """Bug: a null of one preset (`patch_size_px` of the named model) comes back as another preset's number."""
    config = build_config({"output_dir": "x", "model": {"preset": preset}})
    dump(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.model.preset == preset


def test_presets_give_every_size_and_files_go_before_them() -> None:
    """Bug: a size that a preset forgets falls back to the default of `tiny`; or the preset beats the file."""
    sizes = {"image": {"name", "width", "depth", "heads"}, "text": {"width", "heads", "mlp_width", "layers"}}
    for preset, values in PRESETS.items():
        assert {"preset", "image", "text", "fusion_layers", "itc_width"} == values.keys()
        assert values["preset"] == preset
        assert all(keys <= values[section].keys() for section, keys in sizes.items())
    config = build_config({"output_dir": "x", "model": {"preset": "base", "text": {"layers": 4}}})
    assert (config.model.text.layers, config.model.text.width, config.model.fusion_layers) == (4, 768, 6)
    assert (
        build_config({"output_dir": "x"}).model == build_config({"output_dir": "x", "model": {"preset": "tiny"}}).model
    )


def test_a_config_cannot_be_changed() -> None:
    """Bug: a part of the program changes a setting, and the file in the output folder lies."""
    config = build_config({"output_dir": "x"})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def attributes(path: Path) -> set[tuple[str, str]]:
    """(what stands before the dot, attribute) of every attribute read in a file, such as ("training", "seed")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            found.add((owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node.attr))
    return found


def members() -> dict[str, set[str]]:
    """Properties of the config's classes -> the keys that they read."""
    found: dict[str, set[str]] = {}
    for file in CONFIG_FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                getattr(d, "id", "") == "property" for d in node.decorator_list
            ):
                keys = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
                found.setdefault(node.name, set()).update(keys)
    return found


def test_every_key_is_read_somewhere() -> None:
    """Bug: a setting that one can give, and that nothing obeys."""
    files = [*(ROOT / "mamo").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    files = [file for file in files if file not in CONFIG_FILES]
    read = set().union(*map(attributes, files))
    for name, keys in members().items():
        read |= {(owner, key) for owner, attribute in read if attribute == name for key in keys}
    read.add(("model", "preset"))  # what it stands for is filled in while the file is read
    paths = {path for config_type in CONFIG_TYPES.values() for path in leaves(config_type)}
    unread = {
        ".".join(path) for path in paths if not any((owner, path[-1]) in read for owner in ("config", *path[-2:-1]))
    }
    assert unread == {f"losses.weights.{loss.name}" for loss in (*MAMO_LOSSES, *MLIM_LOSSES)}  # read by the loss's name


def test_config_modules_are_light() -> None:
    """Bug: a mistake in a config is answered only after seconds of imports."""
    names = [str(file.relative_to(ROOT).with_suffix("")).replace("/", ".") for file in CONFIG_FILES]
    code = f"import sys, {', '.join(names)}; print([n for n in ('torch', 'numpy', 'timm') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(names) > 8
    assert done.stdout == "[]\n"


def filled(config_type: type[RunConfig], **over: Any) -> dict[str, Any]:
    """Every key of every task at its default, as version 0.1 wrote them into `config.yaml`, for one task."""
    own = {**defaults(config_type), "output_dir": "x", "model": PRESETS["tiny"], **over}
    return merge(all_defaults([*CONFIG_TYPES.values(), *reversed(CONFIG_TYPES.values())]), own)


@pytest.mark.parametrize("task", CONFIG_TYPES)
def test_defaults_of_other_tasks_are_dropped(task: str) -> None:
    """Bug: the config of an old run, which held the keys of all tasks, is refused; or they stay in its config."""
    values = filled(CONFIG_TYPES[task])
    if task == "mlim":  # version 0.1 refused other weights
        values["losses"]["weights"] = {**dict.fromkeys(LossWeights.model_fields, 0.0), "mlm": 1.0, "recon": 1.0}
    config = build_config(values)
    assert config == CONFIG_TYPES[task].model_validate(config.model_dump())
    sections = {name: {name} for name in ("vqa", "reasoning", "entailment", "matching")}
    sections["mlim"] = {"masking", "losses"}
    own = sections.get(task, {"masking", "losses", "teacher"})
    assert config.model_dump().keys() == {*RunConfig.model_fields, *own}
    assert ("image" in config.model_dump()["model"]) == (task not in ("mlim", "matching"))
    for section, key, other in (("teacher", "momentum", 0.5), ("vqa", "head", "classifier")):
        if section not in own:
            with pytest.raises(ValueError, match=rf"1 problem\(s\)\n  {section}: not used by task {task}; remove it"):
                build_config({**values, section: {**values[section], key: other}})


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_s_values_of_another_network_are_dropped(preset: str) -> None:
    """Bug: an old MLIM of another preset than `tiny` is refused, or a size that it gives is dropped in silence."""
    values = {"task": "mlim", "output_dir": "x", "model": merge(PRESETS[preset], {"itc_width": 256})}
    if preset == "tiny":
        with pytest.raises(
            ValueError, match=r"model\.itc_width: not used by task mlim \(only by pretrain, .*reasoning, entailment\)"
        ):
            build_config(values)
    else:
        model = build_config(values).model.model_dump()
        assert (model["preset"], model["text"]["width"]) == (preset, PRESETS[preset]["text"]["width"])
        assert "itc_width" not in model


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    """Bug: a traceback, or a message that does not say what there is."""
    assert "task: unknown task 'vqaa'; did you mean `vqa`?" in message(tmp_path, "output_dir: x\ntask: vqaa")
    assert "use one of pretrain, grounding, vqa," in message(tmp_path, "output_dir: x\ntask: 5x")
    assert "task: give the name of a task (found 3)" in message(tmp_path, "output_dir: x\ntask: 3")


def test_unused_keys_are_listed_with_all_other_problems(tmp_path: Path) -> None:
    """Bug: a person mends one kind of mistake only to learn of the next."""
    text = message(tmp_path, "task: vqa\nlosses: {queue_size: 3}\nvqa: {heads: 2}\nteacher:\ntraining: {seed: 1}")
    assert "5 problem(s)" in text
    for line in ("losses: not used", "teacher: not used", "vqa.heads: unknown key; did you mean `head`?",
                 "output_dir: missing", "training.seed: unknown key"):  # fmt: skip
        assert f"\n  {line}" in text


class FilipConfig(PretrainConfig):
    """Of a task that is not the program's."""

    task: str = "filip:Filip"
    scale: float = 2.0


def test_a_task_from_outside_has_a_config_type_too() -> None:
    """Bug: only the program's own tasks can have keys."""
    values = {"task": "filip:Filip", "output_dir": "x", "scale": 3.0, "vqa": {"head": "decoder"}}
    config = load.build_config(values, "config", lambda task: FilipConfig, CONFIG_TYPES)
    assert isinstance(config, FilipConfig)
    assert (config.task, config.scale) == ("filip:Filip", 3.0)
    with pytest.raises(ValueError, match="vqa: not used by task filip:Filip"):
        load.build_config({**values, "vqa": {"head": "classifier"}}, "config", lambda task: FilipConfig, CONFIG_TYPES)
    assert non_defaults(config, CONFIG_TYPES) == {
        "task": "filip:Filip", "output_dir": "x", "scale": 3.0, "model": non_defaults(build_config({"output_dir": "x"}),
        CONFIG_TYPES)["model"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 5000, "nested too deeply"),
        ("{" * 5000, "nested too deeply"),
        ("1" * 5000, "line 1: .* is no valid number or date"),
        ("2024-13-45", "line 1: `2024-13-45` is no valid number or date; quote a text"),
        (str(2**70), "seed: "),
        (str(2**63), "seed: "),
    ],
)
def test_hostile_values_are_one_short_error_with_their_place(tmp_path: Path, value: str, reason: str) -> None:
    """Bug: a nesting bomb is a RecursionError, a long integer or an odd date a message without its line or key."""
    for overrides in ((), (f"seed={value}",)):
        with pytest.raises(ValueError, match=reason) as caught:
            load_config(write(tmp_path, "output_dir: x\n" if overrides else f"seed: {value}\noutput_dir: x"), overrides)
        assert len(str(caught.value)) < 400
        assert "seed" in str(caught.value) or "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("output_dir=runs/exp #1", "` #` begins a comment in YAML; quote the value: 'output_dir=\"...\"'"),
        ("output_dir=#1", "` #` begins a comment"),
        ("output_dir='runs/exp' #1", "` #` begins a comment"),
        ("data.train_file=[a.jsonl, b.jsonl] # both", "` #` begins a comment"),
        ("output_dir=a\nb", "a line break is not kept"),
        ("checkpoint=", "has no value; write checkpoint=null for none"),
        ("checkpoint=  ", "has no value"),
        ("seed=010", "`010` would be the number 8; write that, or quote a text"),
        ("seed=-017", "`-017` would be the number -15"),
        ("output_dir=010", "`010` would be the number 8"),
        ("training.total_steps=1:30", "`1:30` would be the number 90"),
        ("training.total_steps=1:30:00", "`1:30:00` would be the number 5400"),
        ("training.learning_rate=1:30.5", "`1:30.5` would be the number 90.5"),
        ("data.image_size_px=[010, 48]", "`010` would be the number 8"),
        ("mine.yaml", "a config file is passed as --config FILE"),
    ],
)
def test_an_override_that_yaml_reads_otherwise_is_refused(tmp_path: Path, override: str, reason: str) -> None:
    """Bug: a part of a path is cut as a comment, `010` is 8, and an unset shell variable means the default."""
    text = message(tmp_path, "output_dir: x\n", override)
    assert text.startswith("override `")
    assert reason in text


@pytest.mark.parametrize("line", ["seed: 010", "training: {total_steps: 1:30}", "data: {image_size_px: [048, 017]}"])
def test_numbers_in_base_8_and_60_are_refused_in_a_file_too(tmp_path: Path, line: str) -> None:
    """Bug: `seed: 010` is 8."""
    assert "would be the number" in message(tmp_path, f"output_dir: x\n{line}\n")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('output_dir="runs/exp #1"', "runs/exp #1"),
        ("output_dir='a # b'", "a # b"),
        ("output_dir=runs/exp#1", "runs/exp#1"),
        ("output_dir='010'", "010"),
        ("output_dir=08", "08"),
        ("output_dir=2024-1", "2024-1"),
        ("output_dir=a:b", "a:b"),
    ],
)
def test_quoted_values_and_others_are_taken_whole(tmp_path: Path, override: str, value: str) -> None:
    """Bug: what is refused by mistake cannot be written at all."""
    assert load_config(write(tmp_path, "output_dir: x\n"), [override]).output_dir == value


PATH_KEYS = ("output_dir", "checkpoint", "data.train_file", "data.eval_file", "data.tokenizer", "model.image.weights",
             "model.text.bert")  # fmt: skip


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_home_and_variables_are_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Bug: `~/runs` and `$HOME/runs` make folders named `~` and `$HOME`, whose removal is fatal."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    base = "output_dir: x\ndata: {source: pairs, train_file: a, eval_file: b}\n"

    def value(text: str) -> object:
        config: Any = load_config(write(tmp_path, base), [f"{key}={text}"])
        for part in key.split("."):
            config = getattr(config, part)
        return config

    for text, expanded in (
        ("~/x", "/home/me/x"),
        ('"~"', "/home/me"),
        ("$DATA/x", "/data/x"),
        ("${DATA}x/$DATA", "/datax//data"),
        ("a~/b", "a~/b"),
        ("a$", "a$"),
    ):
        assert value(text) == expanded
    for text, reason in (
        ("$UNSET/x", "the environment variable $UNSET is not set"),
        ("${UNSET}", "the environment variable ${UNSET} is not set"),
        ("$EMPTY/x", "the environment variable $EMPTY is not set"),
        ("~nobody_of_this_name/x", "there is no such user"),
        ('""', "give a path, or leave the key out"),
    ):
        found = message(tmp_path, base, f"{key}={text}")
        assert reason in found
        assert key in found


def test_paths_in_a_file_and_in_lists_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: only overrides are expanded, or only the first of several files; a folder of that name is passed over."""
    monkeypatch.setenv("HOME", "/home/me")
    data = "data: {source: pairs, train_file: [~/a.jsonl, b.jsonl], eval_file: $HOME/c}"
    config = load_config(write(tmp_path, f"output_dir: ~/runs\n{data}\n"))
    assert config.output_dir == "/home/me/runs"
    assert config.data.train_files == ["/home/me/a.jsonl", "b.jsonl"]
    assert config.data.eval_file == "/home/me/c"
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    assert load_config(write(tmp_path, "output_dir: '~'\n")).output_dir == "~"


def test_messages_are_bounded(tmp_path: Path) -> None:
    """Bug: a value of megabytes, as of YAML's anchors, is printed whole; so are 20,000 problems."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh")
    )
    for text in (
        bomb + "output_dir: *h\n",
        bomb + "output_dir: x\nseed: *h\n",
        f"output_dir: x\nseed: {'9' * 3000}x\n",
        f"output_dir: x\n{'k' * 100_000}: 3\n",
        "output_dir: x\n" + "".join(f"k{i}: 1\n" for i in range(20_000)),
        "output_dir: x\ndata: {source: pairs, train_file: [" + ", ".join(["3"] * 20_000) + "]}\n",
    ):
        found = message(tmp_path, text)
        assert len(found) < 25_000
        assert max(map(len, found.splitlines())) < 1000


def test_a_key_without_its_section_is_found(tmp_path: Path) -> None:
    """Bug: `learning_rate=1e-3` is an unknown key without a hint; `workers: -1` is two problems."""
    text = "output_dir: x\n"
    assert "learning_rate: unknown key; did you mean `training.learning_rate`?" in message(
        tmp_path, text, "learning_rate=1"
    )
    found = message(tmp_path, text, "data.workers=-1")
    assert "1 problem(s)\n  data.workers: " in found
    assert "(found -1)" in found
