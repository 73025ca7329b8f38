"""Generate the tables of the READMEs from committed results, configs and code.

In a Markdown file a table is between `<!-- table: NAME -->` and `<!-- /table -->`; `TABLES` lists the names.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from mamo.benchmark.scale import PAPER, Links, run_hours, step_seconds
from mamo.config.presets import PRESETS
from mamo.config.reference import config_table
from mamo.config.values import Values
from mamo.evaluation.fine_grained import RULES, SETS
from mamo.evaluation.protocols import PROTOCOLS
from mamo.study.pipeline import ROWS, table_of
from mamo.study.published import published_table
from mamo.tasks.registry import CONFIG_TYPES

REFERENCE = Path("configs/reference")
STUDIES = Path("configs/studies")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_BEGIN = re.compile(r"<!-- table: (.*?) -->")

SIX = {
    "rerank/i2t_r1": ("image to text R@1, re-ranked by ITM", "0.1"),
    "rerank/t2i_r1": ("text to image R@1, re-ranked by ITM", "0.1"),
    "masked_word/colour": ("masked colour words", "12.5"),
    "probe/attribute_swap/itm": ("caption above its attribute-swapped foil", "50"),
    "probe/relation_swap/itm": ("caption above its relation-swapped foil", "50"),
    "grounding/proposal": ("grounding without boxes, IoU ≥ 0.5", "grounding/random_proposal"),
}
"""Metrics of the first page: what each is, and chance in percent or the metric that measures it."""
AIMS = {
    "rerank/i2t_r1": ("60", "85"),
    "rerank/t2i_r1": ("60", "85"),
    "masked_word/colour": ("90", "—"),
    "probe/attribute_replacement/itm": ("85", "—"),
    "probe/attribute_swap/itm": ("75", "80"),
    "probe/relation_swap/itm": ("—", "80"),
}
"""Metric -> aim of the quick start and of the hour, set before they ran."""


def fill(text: str, root: Path) -> str:
    """Return `text` with every marked table generated anew.

    Args:
        root: folder of the repository.

    Raises:
        ValueError: a table without an end marker, or of an unknown name.
    """
    found = [match[2] for match in _MARKED.finditer(text)]
    if found != _BEGIN.findall(text):
        raise ValueError("a table has no <!-- /table -->")
    unknown = sorted(set(found) - TABLES.keys())
    if unknown:
        raise ValueError(f"table {unknown[0]!r} is unknown; use one of: {', '.join(TABLES)}")
    return _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](root)}\n{match[4]}", text)


def readmes(root: Path) -> list[Path]:
    """List the Markdown files that people write; reports of studies and model cards are generated whole."""
    folders = ("mamo", "configs", "scripts", "tests", ".github")
    found = [root / "README.md", *(file for folder in folders for file in (root / folder).rglob("*.md"))]
    generated = {root / STUDIES / "results", root / "tests/fixtures/version_0_1/exported"}
    return sorted(file for file in found if not generated & set(file.parents))


def results_table(root: Path) -> str:
    """Tabulate six metrics of the two pre-trainings on the embedded world."""
    quick, hour = (_metrics(root / REFERENCE / run / "results.json") for run in ("scenes", "scenes_1h"))
    rows = []
    for name, (what, chance) in SIX.items():
        by_chance = f"{quick[chance]:.1f}, {hour[chance]:.1f}" if chance in quick else chance
        rows.append((f"`{name}`", what, f"{quick[name]:.1f}", f"{hour[name]:.1f}", by_chance))
    return _table(("metric", "what", "quick start", "one hour", "chance"), rows)


def reference_table(root: Path) -> str:
    """Tabulate every metric of the two pre-trainings and its aim."""
    quick, hour = (_metrics(root / REFERENCE / run / "results.json") for run in ("scenes", "scenes_1h"))
    rows = []
    for name in dict.fromkeys([*quick, *hour]):
        found = [f"{run[name]:.1f}" if name in run else "—" for run in (quick, hour)]
        aims = AIMS.get(name, ("—", "—"))
        rows.append((f"`{name}`", found[0], aims[0], found[1], aims[1]))
    return _table(("metric", "quick start", "aim", "one hour", "aim"), rows)


def optimizers_table(root: Path) -> str:
    """Tabulate the quick start by optimizer and learning rate."""
    names = ("rerank/i2t_r1", "rerank/t2i_r1", "probe/attribute_swap/itm")
    rows = []
    for file in sorted((root / REFERENCE / "scenes/optimizers").glob("*.json")):
        metrics = _metrics(file)
        run = file.stem.replace("_", " ").replace("adamw", "AdamW").replace("muon", "Muon")
        rows.append((f"[{run}](scenes/optimizers/{file.name})", *(f"{metrics[name]:.1f}" for name in names)))
    return _table(("optimizer, learning rate", *(f"`{name}`" for name in names)), rows)


def pipeline_table(root: Path) -> str:
    """Tabulate the four fine-tunings of the hour, against random weights."""
    return table_of(json.loads((root / REFERENCE / "chain/results.json").read_text("utf-8")), ROWS)


def nlvr_table(root: Path) -> str:
    """Tabulate the accuracy on NLVR's held-out directories."""
    runs = {
        "results": "ITM of the pre-training on NLVR",
        "judged_from_nlvr": "fine-tuned from the pre-training on NLVR",
        "judged_from_scenes": "fine-tuned from the hour on scenes",
        "judged_from_scratch": "fine-tuned from random weights",
    }
    rows = []
    for file, what in runs.items():
        metrics = _metrics(root / REFERENCE / f"nlvr/{file}.json")
        prefix = "statements" if file == "results" else "reasoning"
        accuracy, low, high, majority = (
            f"{metrics[f'{prefix}/{name}']:.1f}" for name in ("accuracy", "interval_low", "interval_high", "majority")
        )
        rows.append((f"[{what}](nlvr/{file}.json)", accuracy, f"{low} to {high}", majority))
    return _table(("true or false", "% right", "95 % interval", "majority class"), rows)


def speed_table(root: Path) -> str:
    """Tabulate the benchmark at the size `tiny`, with ALBEF's own code and the aims."""
    found = _benchmark(root, "tiny")
    saved = ", ".join(
        f"{found[f'shortcuts/tiny/{way}/speedup']:.2f}"
        for way in ("clean_encodings", "last_layer_restriction", "visible_only")
    )
    per_image = [found[f"step/tiny/{kind}/gflop_equivalents_per_image"] for kind in ("bf16", "fp32", "albef")]
    per_pair = [found[f"reranking/tiny/{kind}mflop_equivalents_per_pair"] for kind in ("", "albef/")]
    memory = ", ".join(f"{found[f'memory/tiny/{kind}_mib']:.0f}" for kind in ("predicted", "peak"))
    rows = [
        (
            "five-loss step in bf16: share of the matrix rate at its own shapes",
            f"{100 * found['step/tiny/bf16/share_of_matrix_rate']:.0f} %",
            "—",
            "55 %",
        ),
        (
            "the same step, equivalents an image, bf16 / fp32",
            f"{per_image[0]:.1f} / {per_image[1]:.1f} GFLOP",
            "5.1 GFLOP, three losses",
            "5.1",
        ),
        ("ALBEF's config, fp32, equivalents an image", f"{per_image[2]:.1f} GFLOP", "5.1 GFLOP", "3.6: missed"),
        ("re-ranking, equivalents a pair", f"{per_pair[0]:.0f} MFLOP", "152 MFLOP", "152"),
        ("re-ranking by cross-attention, equivalents a pair", f"{per_pair[1]:.0f} MFLOP", "152 MFLOP", "51: missed"),
        (
            "re-ranking against encoding the image again for each pair",
            f"{found['reranking/tiny/speedup_over_encoding_again']:.1f} ×",
            "—",
            "2.5 ×",
        ),
        (
            "JPEGs with the full augmentation, images/s a core",
            f"{found['loading/jpeg_folder_samples_per_core_s']:.0f}",
            "—",
            "400",
        ),
        (
            "time saved: clean sides encoded once; last layer where read; only visible patches",
            f"{saved} ×",
            "—",
            "same losses",
        ),
        (
            "two gloo processes of one thread each against one of two, samples/s",
            f"{found['growth/tiny/processes_2/over_one_process']:.2f} ×",
            "—",
            "0.9 ×",
        ),
        ("memory: `--plan` counts living tensors; the process takes", f"{memory} MiB", "—", "within 15 %: missed"),
    ]
    return _table(("what", "mamo", "ALBEF's own code", "aim"), rows)


def textbook_table(root: Path) -> str:
    """Tabulate a `tiny` step against the textbook step, and next to a busy program."""
    found = _benchmark(root, "tiny_textbook")
    rows = []
    for what, name in (("ALBEF's config, fp32", "albef"), ("five losses, fp32", "fp32")):
        key = f"textbook/tiny/{name}"
        ratio, spread = found[f"{key}/over_textbook"], found[f"{key}/over_textbook_spread"]
        rows.append((what, f"{found[f'{key}/gflop_per_image']:.2f} GFLOP", f"{ratio:.2f}", f"{100 * spread:.0f} %"))
    key = "neighbour/tiny/share_of_lone_speed"
    share, spread = found[key], found[f"{key}_spread"]
    rows.append(("speed kept next to one busy program", "—", f"{share:.2f}", f"{100 * spread:.0f} %"))
    return _table(("what", "operations an image", "time over the textbook's; share", "spread"), rows)


_MACHINES = (
    ("tiny", "tiny", "AMX"),
    ("tiny_faster_products", "tiny", "AMX, faster products"),
    ("tiny_without_amx", "tiny", "no AMX"),
    ("small", "small", "AMX, faster products"),
    ("small_without_amx", "small", "no AMX"),
    ("base", "base", "AMX, faster products"),
)
"""Files of the benchmark, the preset of each and the processor."""
_MEASURES: tuple[tuple[str, str, float, str], ...] = (
    ("fp32 matrix rate, GFLOP/s", "step/{}/fp32/matrix_tflop_per_s", 1000, ".0f"),
    ("bf16 step, s", "step/{}/bf16/step_s", 1, ".2f"),
    ("bf16 step, % of the rate at its shapes (aim 55)", "step/{}/bf16/share_of_matrix_rate", 100, ".0f"),
    ("fp32 step, % of the rate at its shapes", "step/{}/fp32/share_of_matrix_rate", 100, ".0f"),
    ("bf16 step, GFLOP equivalents an image", "step/{}/bf16/gflop_equivalents_per_image", 1, ".1f"),
    ("fp32 step, GFLOP equivalents an image", "step/{}/fp32/gflop_equivalents_per_image", 1, ".1f"),
    ("bf16 step over ALBEF's three losses (aim 1.15; `base` 1.25)", "step/{}/bf16/over_albef", 1, ".2f"),
    ("ALBEF's config in fp32 over ALBEF's own code (aim 0.8)", "step/{}/albef/over_albef", 1, ".2f"),
    ("re-ranking, MFLOP equivalents a pair", "reranking/{}/mflop_equivalents_per_pair", 1, ".0f"),
    ("re-ranking, % of the matrix rate", "reranking/{}/share_of_matrix_rate", 100, ".0f"),
    ("re-ranking over ALBEF's own code (aim 1.9 at `small`)", "reranking/{}/over_albef", 1, ".2f"),
    ("re-ranking by cross-attention, MFLOP eq. a pair", "reranking/{}/albef/mflop_equivalents_per_pair", 1, ".0f"),
    ("re-ranking by cross-attention over ALBEF's own code (aim 0.33)", "reranking/{}/albef/over_albef", 1, ".2f"),
    ("trimming a batch to its longest caption, × faster", "shortcuts/{}/padding_removal/speedup", 1, ".2f"),
    ("memory by `--plan`, MiB", "memory/{}/predicted_mib", 1, ",.0f"),
    ("memory of the process, MiB", "memory/{}/peak_mib", 1, ",.0f"),
    ("JPEGs with the full augmentation, images/s a core (aim 400)", "loading/jpeg_folder_samples_per_core_s", 1, ".0f"),
)  # fmt: skip


def machines_table(root: Path) -> str:
    """Tabulate the benchmark by size and processor."""
    files = [_benchmark(root, file) for file, _, _ in _MACHINES]
    heads = [f"[`{size}`](../../{REFERENCE}/benchmark/{file}.json), {machine}" for file, size, machine in _MACHINES]
    rows = []
    for what, key, factor, form in _MEASURES:
        values = [found.get(key.format(size)) for found, (_, size, _) in zip(files, _MACHINES)]
        rows.append((what, *("—" if value is None else format(factor * value, form) for value in values)))
    return _table(("what", *heads), rows)


def scale_table(root: Path) -> str:
    """Tabulate the paper's run on one CPU and on 1, 8 and 64 GPUs, by the formula of `mamo.benchmark.scale`."""
    base = _benchmark(root, "base")
    cpu_s = 1 / base["step/base/bf16/samples_per_s"]
    gpu_s = base["step/base/bf16/gflop_per_image"] / 445e3
    machines = [("two CPU cores", cpu_s, 1, "measured"), ("1 GPU", gpu_s, 1, "predicted")]
    machines += [(f"{n} GPUs", gpu_s, n, "predicted") for n in (8, 64)]
    rows = []
    for name, pair_s, n, how in machines:
        step_s, hours = (work(PAPER, pair_s, n, Links()) for work in (step_seconds, run_hours))
        efficiency = pair_s * PAPER.batch_size_global / (n * step_s)
        shown = f"{hours:.3g}" if hours < 1000 else f"{hours:,.0f}"
        rows.append((name, f"{1000 * pair_s:.2f} ms, {how}", f"{step_s:.3g}", shown, f"{100 * efficiency:.0f} %"))
    return _table(("devices", "a pair on one device", "seconds a step", "hours", "efficiency"), rows)


def study_table(root: Path) -> str:
    """Tabulate the papers' differences and those of the studies."""
    return published_table(root / STUDIES / "published.yaml", root / STUDIES / "results")


def protocols_table(root: Path) -> str:
    """Tabulate every protocol: task, split and fixed settings."""
    items = {f"{name}-{score}" for name, fixed in SETS.items() for score in fixed.scores}
    rows = [(f"`{name}`", p.values["task"], p.split, p.states) for name, p in PROTOCOLS.items() if name not in items]
    for name, fixed in SETS.items():
        scores = ", ".join(f"`-{score}`" for score in fixed.scores[1:])
        named = f"`{name}-{fixed.scores[0]}`" + (f", {scores}" if scores else "")
        rows.append((named, "pretrain", "test", f"{fixed.states}; {RULES}"))
    return _table(("protocol", "task", "split", "what it fixes"), rows)


def recipes_table(root: Path) -> str:
    """Return size, patch, steps and learning rate of every shipped training config."""
    rows = []
    folders = (root / "configs/pretrain", root / "configs/finetune")
    for file in (file for folder in folders for file in sorted(folder.glob("*.yaml"))):
        values: Values = yaml.safe_load(file.read_text("utf-8"))
        data, training = values["data"], values["training"]
        is_pretraining = file.parent.name == "pretrain"
        size = data.get("image_size_px", "checkpoint's")
        steps, batch = training["total_steps"], training["batch_size_global"]
        rows.append(
            (
                f"[`{file.stem}`]({file.parent.name}/{file.name})",
                values.get("task", "pretrain"),
                f"{data['source']}, {data['difficulty']}" if data["source"] == "scenes" else data["source"],
                "×".join(map(str, size)) if isinstance(size, list) else str(size),
                str(_patch_px(values)) if is_pretraining else "checkpoint's",
                f"{steps:,} × {batch}",
                f"{training.get('optimizer', 'adamw')} {float(training['learning_rate']):g}",
            )
        )
    heads = ("config", "task", "data", "image, px", "patch, px", "steps × batch", "optimizer, learning rate")
    return _table(heads, rows)


def keys_table(root: Path) -> str:
    """Tabulate every key of a config file."""
    return config_table(CONFIG_TYPES)


TABLES: dict[str, Callable[[Path], str]] = {
    "results": results_table,
    "reference": reference_table,
    "optimizers": optimizers_table,
    "pipeline": pipeline_table,
    "nlvr": nlvr_table,
    "speed": speed_table,
    "machines": machines_table,
    "textbook": textbook_table,
    "scale": scale_table,
    "published": study_table,
    "protocols": protocols_table,
    "recipes": recipes_table,
    "keys": keys_table,
}


def _patch_px(values: Values) -> int:
    """Return the side of a patch: MLIM's convolutions halve the image, a ViT's name ends in it."""
    model = values.get("model", {})
    if values.get("task") == "mlim":
        return int(2 ** model["embedder_layers"])
    image = PRESETS[model.get("preset", "tiny")]["image"] | model.get("image", {})
    named = re.search(r"patch(\d+)", image["name"])
    return int(image.get("patch_size_px") or (named[1] if named else 0))


def _metrics(file: Path) -> dict[str, float]:
    (evaluation,) = json.loads(file.read_text("utf-8"))["evaluations"]
    metrics: dict[str, float] = evaluation["metrics"]
    return metrics


def _benchmark(root: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((root / REFERENCE / f"benchmark/{name}.json").read_text("utf-8"))
    return found


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
