"""Named evaluation protocols: fixed settings, so that two numbers of one name are comparable.

A protocol replaces `data` and `evaluation` of the checkpoint's config. The image size, the text length, the tokenizer
and the batch size are kept, as they belong to the model and the machine, unless the protocol fixes the image size.
A setting that a protocol leaves open and that decides a number is a part of the name (`pairs-zeroshot-k32`), as are the
conventions of the weights, and the teacher where it is evaluated. One that is compared with published numbers fixes the
published rules.
"""

import difflib
import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mamo.config.schema import ItemScore, RunConfig
from mamo.config.values import Values, flatten, merge
from mamo.data.pairs_reader import read_lines, read_pairs
from mamo.evaluation.fine_grained import RULES, SCORE_STATES, SETS, places

_KEPT = ("image_size_px", "text_max_tokens", "tokenizer", "bad_samples", "workers")
_INPUTS = ("data.image_size_px", "data.text_max_tokens", "data.tokenizer", "training.precision")
"""What the checkpoint fixes of the network's inputs and arithmetic; another value gives another number."""
SHARED_IMAGES = "vqa.shared_images"
"""Whether questions about training images may be evaluated on."""
EVALUATION_KEYS = tuple(
    f"evaluation.{name}"
    for name in (
        "network",
        "retrieval_items",
        "near_duplicates",
        "rerank_k",
        "retrieval_folds",
        "probe_items",
        "grounding_heat",
        "itm_score",
        "heat_resize",
        "repeated_captions",
        "batch_size",
        "rankings_depth",
        "corrected",
        "items_files",
        "items_scores",
    )
)
OVERRIDES = (
    *_INPUTS,
    SHARED_IMAGES,
    "data.difficulty",
    "data.eval_file",
    "data.eval_split",
    "data.eval_caption_keys",
    "data.statements_file",
    "data.bad_samples.policy",
    "data.bad_samples.budget",
    *EVALUATION_KEYS,
)
"""Keys that an evaluation can set."""
CUSTOM = "-custom"
ROOT = "data"
"""Folder of data sets, where `data.root` names no other."""
_FLICKR = "data/flickr30k/test.jsonl"
_COCO = "data/coco/test.jsonl"
SCENES_RERANK_K = 32
ANSWERS_K = 128
PUBLIC_SIZE_PX = 384
_SCENES_RULES = {"itm_score": "difference", "repeated_captions": "merged"}
Lineage = Literal["any", "not-coco", "coco", "coco-or-raw", "flickr30k", "flickr30k-named"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """Settings of one evaluation.

    `values` override the config; `split` names the evaluated data; `states` describes the rest in one sentence.
    `n_records` is the number of lines of the split's official file; `lineage` is the required last training data of the
    checkpoint. `named` are the keys of `evaluation` that it leaves to the checkpoint's config and has in its name.
    """

    values: Values
    split: str
    states: str
    n_records: int | None = None
    lineage: Lineage = "any"
    named: tuple[str, ...] = ()


def _scenes(difficulty: str, near_duplicates: bool) -> Protocol:
    evaluation = {"retrieval_items": 1000, "probe_items": 1000, "rerank_k": SCENES_RERANK_K, **_SCENES_RULES}
    gallery = "500 held-out scenes and a near duplicate of each" if near_duplicates else "1,000 held-out scenes"
    return Protocol(
        {
            "task": "pretrain",
            "data": {"source": "scenes", "difficulty": difficulty},
            "evaluation": {
                **evaluation,
                "near_duplicates": near_duplicates,
                "patch_scenes": 0,
                "grounding_heat": "fusion",
            },
        },
        "test",
        f"{gallery} ({difficulty}), one identifying caption each, ITM re-ranks ITC's {SCENES_RERANK_K} best; probes",
    )


def _scenes_task(task: str, difficulty: str, states: str, **evaluation: int | str) -> Protocol:
    data = {"source": "scenes", "difficulty": difficulty}
    rules = _SCENES_RULES if task == "grounding" else {}
    values = {"task": task, "data": data, "evaluation": {"probe_items": 1000, **rules, **evaluation}}
    return Protocol(values, "test", f"{states} ({difficulty})")


def _retrieval(file: str, n_images: int, k: int, lineage: Lineage, states: str, folds: int = 1) -> Protocol:
    data = {"source": "pairs", "eval_file": file, "image_size_px": PUBLIC_SIZE_PX}
    evaluation = {"rerank_k": k, "retrieval_folds": folds, "repeated_captions": "separate", "itm_score": "match"}
    values = {"task": "pretrain", "data": data, "evaluation": evaluation}
    rule = f"each caption is an item; ITM's match logit re-ranks ITC's {k} best"
    return Protocol(values, "test", f"{states}; {rule}", n_images, lineage)


def _corrected() -> Protocol:
    """Return COCO 5K with the false negatives of its captions corrected, whatever the network was trained on."""
    plain = _retrieval(_COCO, 5000, 256, "any", "COCO 5K test; R-precision and mAP@R of ECCV Caption, recalls of CxC")
    return replace(plain, values=merge(plain.values, {"evaluation": {"rankings_depth": 100, "corrected": True}}))


def _items(files: list[str], score: ItemScore, states: str, n_items: int | None = None) -> Protocol:
    return Protocol(
        {
            "task": "pretrain",
            "data": {"source": "pairs"},
            "training": {"precision": "fp32"},
            "evaluation": {"items_files": files, "items_scores": [score]},
        },
        "test",
        f"{states}; {SCORE_STATES[score]}; {RULES}",
        n_items,
    )


def _records(
    task: str, file: str, n_records: int | None, states: str, lineage: Lineage = "any", **evaluation: int | str
) -> Protocol:
    data = {"source": "records", "eval_file": file, "image_size_px": PUBLIC_SIZE_PX}
    values = {"task": task, "data": data, "evaluation": evaluation}
    return Protocol(values, Path(file).stem, states, n_records, lineage)


_HEATS = {
    "fusion": "Grad-CAM of ITM in fusion",
    "image_encoder": "Grad-CAM of ITM in the image encoder",
    "occlusion": "loss of the ITM logit under occlusion",
}
_SCENES_HEAT = {"easy": "image_encoder", "full": "fusion"}  # the best source for a pre-training on each
_LABEL = "the raw pre-trained model is named flickr30k-zeroshot-raw"

PROTOCOLS: dict[str, Protocol] = {
    "scenes-easy-zeroshot": _scenes("easy", near_duplicates=False),
    "scenes-full-zeroshot": _scenes("full", near_duplicates=False),
    "scenes-easy-retrieval": _scenes("easy", near_duplicates=True),
    "scenes-full-retrieval": _scenes("full", near_duplicates=True),
    **{
        f"scenes-{difficulty}-{name}": _scenes_task(task, difficulty, states, **evaluation)
        for difficulty in ("easy", "full")
        for name, task, states, evaluation in (
            ("vqa", "vqa", "1,000 questions, official accuracy, and with blank images", {"rerank_k": ANSWERS_K}),
            ("nlvr2", "reasoning", "1,000 statements about pairs, each sentence once true and once false", {}),
            ("entailment", "entailment", "1,000 statements about scenes with one cell covered, three labels", {}),
            (
                "grounding",
                "grounding",
                f"1,000 expressions, {_HEATS[_SCENES_HEAT[difficulty]]} to proposals, IoU 0.5",
                {"grounding_heat": _SCENES_HEAT[difficulty]},
            ),
            ("mlim", "mlim", "masked words and filled-in images of 1,000 scenes, masked as in training", {}),
            ("matching", "matching", "1,000 pairs of listings, half of them near misses, PR AUC", {}),
        )
    },
    "coco5k-zeroshot": _retrieval(_COCO, 5000, 256, "not-coco", "COCO 5K test, no fine-tuning on COCO"),
    "coco5k-finetuned": _retrieval(_COCO, 5000, 256, "coco", "COCO 5K test, fine-tuned on COCO"),
    "coco1k-finetuned": _retrieval(_COCO, 5000, 256, "coco", "the same in five folds of 1,000 images, averaged", 5),
    "coco5k-corrected": _corrected(),
    "flickr30k-zeroshot": _retrieval(
        _FLICKR, 1000, 128, "coco-or-raw", f"Flickr30k 1K test by the COCO-fine-tuned model, as is usual; {_LABEL}"
    ),
    "flickr30k-finetuned": _retrieval(_FLICKR, 1000, 128, "flickr30k", "Flickr30k 1K test, fine-tuned on Flickr30k"),
    "vqa2-val": _records("vqa", "data/vqa2/val.jsonl", 214_354, "VQA v2 validation, local", rerank_k=ANSWERS_K),
    "vqa2-testdev": _records(
        "vqa",
        "data/vqa2/test.jsonl",
        447_793,
        "VQA v2 test2015: the file to submit (test-dev and -std)",
        rerank_k=ANSWERS_K,
    ),
    "nlvr2-dev": _records("reasoning", "data/nlvr2/dev.jsonl", 6982, "NLVR2 development"),
    "nlvr2-testp": _records("reasoning", "data/nlvr2/test-p.jsonl", 6967, "NLVR2 public test, with its subsets"),
    **{
        f"snli-ve-{split}": _records(
            "entailment",
            f"data/snli_ve/{split}.jsonl",
            n_records,
            f"SNLI-VE {split}, three-way accuracy; a checkpoint that was also trained on Flickr30k, whose captions are "
            f"SNLI-VE's premises, is named snli-ve-{split}-flickr30k",
            "flickr30k-named",
        )
        for split, n_records in (("dev", 17_858), ("test", 17_901))
    },
    "refcocop-weak": _records(
        "grounding",
        "data/refcoco+/val.jsonl",
        None,
        "RefCOCO+ without boxes in training: Grad-CAM of the match logit in the third of six fusion layers, resized "
        "uncut, the proposal with the most heat for the root of its area, IoU 0.5; data.eval_file names val, testA or "
        "testB",
        grounding_heat="fusion",
        itm_score="match",
        heat_resize="uncut",
    ),
    "pairs-zeroshot": Protocol(
        {"task": "pretrain", "data": {"source": "pairs"}, "evaluation": {"retrieval_folds": 1}},
        "all of data.eval_file",
        "all images and captions of data.eval_file, and the statements of data.statements_file; results are named "
        "pairs-zeroshot-kK, where ITM re-ranks ITC's K best (evaluation.rerank_k, by default the checkpoint's), and "
        "-match or -separate where evaluation.itm_score or repeated_captions is that",
        named=("rerank_k", "itm_score", "repeated_captions"),
    ),
    **{
        f"records-{task}": Protocol(
            {"task": task, "data": {"source": "records"}},
            "all of data.eval_file",
            f"all records of data.eval_file ({task}){states}",
            named=named,
        )
        for task, named, states in (
            ("vqa", ("rerank_k",), "; results are named records-vqa-kK, K answers shortlisted by their first token"),
            ("reasoning", (), ""),
            ("entailment", (), ""),
            (
                "grounding",
                ("grounding_heat", "itm_score", "heat_resize"),
                "; results are named records-grounding-HEAT by evaluation.grounding_heat, and -match or -uncut where "
                "evaluation.itm_score or heat_resize is that",
            ),
        )
    },
    **{
        f"{name}-{score}": _items([str(places(Path(ROOT), name)[0])], score, fixed.states, fixed.n_items)
        for name, fixed in SETS.items()
        for score in fixed.scores
    },
    **{
        f"items-{score}": _items([], score, "the items of evaluation.items_files (mamo/data/README.md)")
        for score in SCORE_STATES
    },
}
FINE_GRAINED = "fine-grained"
"""Name of the evaluation of all sets that lie in a folder; its results are named by each set's own protocol."""


def apply_protocol(protocol: str, values: Values, is_compatible: Callable[[str, str], bool]) -> Values:
    """Return the plain config `values` of a checkpoint with the settings that `protocol` fixes.

    Raises ValueError for an unknown name, listing the known ones, and for a checkpoint of another task.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; use one of: {', '.join(PROTOCOLS)}")
    wanted, found = PROTOCOLS[protocol].values["task"], values.get("task", "pretrain")
    if not is_compatible(wanted, found):
        raise ValueError(
            f"protocol {protocol} needs a checkpoint of task {wanted}, this one is of {found}; fine-tune it first"
        )
    data = {key: value for key, value in values["data"].items() if key in _KEPT}
    kept = ("batch_size", "network", *PROTOCOLS[protocol].named)
    evaluation = {"enabled": True} | {key: values["evaluation"][key] for key in kept if key in values["evaluation"]}
    changed = merge({**values, "data": data, "evaluation": evaluation}, PROTOCOLS[protocol].values)
    if changed["data"]["source"] != "scenes":
        changed["data"].setdefault("train_file", "none")  # never read: nothing is trained
    return changed


def protocol_of(config: RunConfig, scenes_name: str) -> str:
    """Return the protocol of a run's own evaluation; `NAME-custom` where the config differs from what it fixes.

    Args:
        config: of the run.
        scenes_name: last part of the task's protocols in the embedded world; empty for a task without any, whose
            evaluations are named by the task and the source of its data.
    """
    data = config.data
    if not scenes_name:
        return f"{config.task}-{data.source}"
    if data.source == "records":
        return protocol_name(f"records-{config.task}", config)
    if data.source == "pairs":
        return protocol_name("pairs-zeroshot", config)
    if scenes_name == "zeroshot" and config.evaluation.near_duplicates:
        scenes_name = "retrieval"
    return protocol_name(f"scenes-{data.difficulty}-{scenes_name}", config)


def protocol_name(protocol: str, config: RunConfig, is_own: bool = True) -> str:
    """Return `protocol` with the settings that it leaves open, and `-custom` where the config differs from the rest.

    The locations of files do not count; their number of records and their split do.

    Args:
        protocol: a name of `PROTOCOLS`.
        config: of the evaluation.
        is_own: whether the network's inputs are those of its checkpoint (`has_own_inputs`).
    """
    fixed = PROTOCOLS[protocol]
    values = config.model_dump()
    held = all(
        values[section][key] == value
        for section in ("data", "evaluation")
        for key, value in fixed.values.get(section, {}).items()
        if key not in ("eval_file", "image_size_px", "items_files")
    )
    size = fixed.values["data"].get("image_size_px")
    held = held and is_own and (size is None or config.data.image_size == (size, size))
    named = "".join(_label(key, values["evaluation"][key]) for key in (*fixed.named, "network"))
    return f"{protocol}{named}" if held and _is_whole(fixed, config) else f"{protocol}{named}{CUSTOM}"


_USUAL = {"network": "student", "itm_score": "difference", "heat_resize": "cut", "repeated_captions": "merged"}
"""Values of settings in names that are left out of them."""


def _label(key: str, value: int | str) -> str:
    if value == _USUAL.get(key):
        return ""
    return f"-k{value}" if key == "rerank_k" else f"-{str(value).replace('_', '-')}"


def _is_whole(fixed: Protocol, config: RunConfig) -> bool:
    """Return whether `data.eval_file` has as many records as the official file of the split; shards are no such file.

    Raises ValueError where it cannot be read, or is no text.
    """
    file, split = config.data.eval_path, config.data.eval_split
    if config.evaluation.items_files and "items_files" in fixed.values.get("evaluation", {}):
        (file, *others) = config.evaluation.items_files
        if others and fixed.values["evaluation"]["items_files"]:
            return False  # the protocol of one set
        if not Path(file).is_file():
            return True  # the reader of the items raises
    if fixed.n_records is None or file is None:
        return True
    if len(config.data.eval_files) > 1:
        return False
    if split is not None:
        return split == fixed.split and len(read_pairs(Path(file), split)) == fixed.n_records
    if Path(file).is_dir() or Path(file).suffix == ".tar" or (glob.has_magic(file) and not Path(file).exists()):
        return False  # the reader of the task takes or refuses them
    return sum(1 for line in read_lines(Path(file)) if line.strip()) == fixed.n_records


def has_own_inputs(before: Values, after: Values) -> bool:
    """Return whether two configs' plain values agree in what the checkpoint fixes.

    It is the image size, the text length, the tokenizer, the precision, and whether training images may be shared.
    """
    return all(_read_input(before, key) == _read_input(after, key) for key in (*_INPUTS, SHARED_IMAGES))


def _read_input(values: Values, key: str) -> Any:
    section, _, name = key.partition(".")
    value = values.get(section, {}).get(name)
    if key == "data.image_size_px" and isinstance(value, int):
        return [value, value]
    return "fp32" if value == "auto" and key == "training.precision" else value


def check_overrides(protocol: str, overrides: Sequence[str], known: Values) -> None:
    """Refuse `section.key=value` of what belongs to the checkpoint, of the task, and of what an evaluation never reads.

    Args:
        protocol: a name of `PROTOCOLS`.
        overrides: of the evaluation.
        known: plain values of the checkpoint's config.

    Raises:
        ValueError: names every such key.
    """
    stated = [override for override in overrides if override.lower() != "evaluation.enabled=true"]  # it is
    keys = [override.partition("=")[0] for override in stated]
    flat = flatten(known)
    problems = [f"{key}: {_refusal(key, protocol, flat)}" for key in keys if key not in OVERRIDES]
    if "items_files" not in PROTOCOLS[protocol].values.get("evaluation", {}):
        unread = [key for key in keys if key in ("evaluation.items_files", "evaluation.items_scores")]
        problems += [f"{key}: not read under {protocol}; use a protocol of items, such as items-itm" for key in unread]
    else:
        unread = [key for key in keys if key in ("data.eval_file", "data.eval_split", "data.statements_file")]
        problems += [f"{key}: not read under {protocol}; name the items by evaluation.items_files" for key in unread]
        if not PROTOCOLS[protocol].values["evaluation"]["items_files"] and "evaluation.items_files" not in keys:
            problems.append(f"evaluation.items_files: needed under {protocol}; name one or several files of items")
    if problems:
        raise ValueError(f"evaluation under {protocol}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))


def _refusal(key: str, protocol: str, known: Values) -> str:
    section = key.partition(".")[0]
    if section == "task":
        return (
            f"protocol {protocol} is of task {PROTOCOLS[protocol].values['task']}; remove it, or use another protocol"
        )
    if any(name.startswith(f"{key}.") for name in known):
        return "a section; set one key of it, section.key=value"
    if section == "model":
        return "the network is the checkpoint's; remove it, and train a network with another value to evaluate that"
    if key == "data.source":
        return f"protocol {protocol} fixes it; remove it, or use another protocol"
    if key in known:
        return "an evaluation does not read it, or takes it from the checkpoint; remove it"
    near = difflib.get_close_matches(key, OVERRIDES, n=1)
    return "unknown key; " + (f"did you mean `{near[0]}`?" if near else f"an evaluation takes {', '.join(OVERRIDES)}")


def current_name(entry: Mapping[str, Any]) -> str:
    """Return the protocol of an entry of `results.json`.

    Entries of earlier versions have k in `rerank_k` only; here it is in their name too.
    """
    name, k = str(entry["protocol"]), entry.get("rerank_k")
    for protocol in (name for name, fixed in PROTOCOLS.items() if "rerank_k" in fixed.named):
        rest = name.removeprefix(protocol)
        if name.startswith(protocol) and not re.match(r"-k\d", rest) and k is not None:
            return f"{protocol}-k{k}{rest}"
    return name


def check_lineage(protocol: str, lineage: Sequence[Mapping[str, Any]]) -> str:
    """Check a protocol against the training data of the checkpoint (last) and its ancestors; return the result's name.

    Raises ValueError where the checkpoint was not trained as the protocol requires.
    """
    wanted = PROTOCOLS[protocol].lineage
    if wanted == "any":
        return protocol
    seen: list[list[str]] = [link.get("data_sets", []) for link in lineage]
    last = seen[-1]
    trained_on = " -> ".join(" + ".join(names) or "unknown data" for names in seen)
    if wanted == "coco-or-raw":
        if any("flickr30k" in names for names in seen):
            raise ValueError(
                f"{protocol}: the checkpoint was trained on Flickr30k ({trained_on}); use flickr30k-finetuned"
            )
        return protocol if last == ["coco"] else f"{protocol}-raw"
    if wanted == "flickr30k-named":
        return f"{protocol}-flickr30k" if any("flickr30k" in names for names in seen) else protocol
    if wanted == "not-coco" and last == ["coco"]:
        raise ValueError(f"{protocol}: the checkpoint was fine-tuned on COCO ({trained_on}); use coco5k-finetuned")
    if wanted in ("coco", "flickr30k") and last != [wanted]:
        raise ValueError(
            f"{protocol}: the checkpoint was not fine-tuned on {wanted} ({trained_on}); fine-tune it first"
        )
    return protocol


def split_of(protocol: str, config: RunConfig) -> str:
    """Return the evaluated split: the stem of a public data set's file (val, testA, ...), else the protocol's split."""
    names = [name for name in PROTOCOLS if protocol == name or protocol.startswith(f"{name}-")]
    split = PROTOCOLS[names[0]].split if names else "test"
    files = config.data.eval_files
    return split if not files or split.startswith("all") else "+".join(Path(file).stem for file in files)
