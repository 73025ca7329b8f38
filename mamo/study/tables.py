"""Generate the tables of the READMEs from committed results, configs and code.

In a Markdown file a table is between `<!-- table: NAME -->` and `<!-- /table -->`; `TABLES` lists the names.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from mamo.benchmark.scale import LAUNCH_S, PAPER, Links, run_hours, step_seconds
from mamo.config.presets import PRESETS
from mamo.config.reference import config_table
from mamo.config.values import Values
from mamo.evaluation.fine_grained import RULES, SETS
from mamo.evaluation.protocols import PROTOCOLS
from mamo.study.pipeline import ROWS, table_of
from mamo.study.published import published_table
from mamo.study.results import latest_results
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
    """Tabulate the fine-tunings of the hour that were run, against random weights."""
    results = json.loads((root / REFERENCE / "chain/results.json").read_text("utf-8"))
    return table_of(results, [row for row in ROWS if row.task in results])


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


_MEASURES: tuple[tuple[str, str, float, str], ...] = (
    ("ALBEF's config, fp32: GFLOP an image", "step/{}/albef/gflop_per_image", 1, ".2f"),
    ("share of the matrix rate, %", "step/{}/albef/share_of_matrix_rate", 100, ".0f"),
    ("**time over the textbook's**", "step/{}/albef/over_textbook", 1, ".2f"),
    ("five losses, fp32: GFLOP an image", "step/{}/fp32/gflop_per_image", 1, ".2f"),
    ("share of the matrix rate, %", "step/{}/fp32/share_of_matrix_rate", 100, ".0f"),
    ("**time over the textbook's three losses**", "step/{}/fp32/over_textbook", 1, ".2f"),
    ("re-ranking, concatenating, fp32: MFLOP a pair", "reranking/{}/fp32/mflop_per_pair", 1, ".0f"),
    ("share of the matrix rate, %", "reranking/{}/fp32/share_of_matrix_rate", 100, ".0f"),
    ("**time over the textbook's**", "reranking/{}/fp32/over_textbook", 1, ".2f"),
    ("re-ranking, cross-attention, fp32: MFLOP a pair", "reranking/{}/fp32/albef/mflop_per_pair", 1, ".0f"),
    ("share of the matrix rate, %", "reranking/{}/fp32/albef/share_of_matrix_rate", 100, ".0f"),
    ("**time over the textbook's**", "reranking/{}/fp32/albef/over_textbook", 1, ".2f"),
    ("speed kept next to one busy program", "neighbour/{}/share_of_lone_speed", 1, ".2f"),
    ("memory by `--plan`, MiB", "memory/{}/predicted_mib", 1, ",.0f"),
    ("memory of the process, MiB", "memory/{}/peak_mib", 1, ",.0f"),
)  # fmt: skip
"""Rows of the speed table: what, its key, factor and format."""


def speed_table(root: Path) -> str:
    """Tabulate the benchmark by size: operations, share of the matrix rate, ratio to the textbook with its spread."""
    files = {size: _benchmark(root, size) for size in PRESETS if _is_measured(root, size)}
    rows = []
    for what, key, factor, form in _MEASURES:
        cells = []
        for size, found in files.items():
            name = key.format(size)
            value: float | None = found.get(name)
            is_ratio = key.endswith(("over_textbook", "lone_speed"))
            half = "" if value is None or not is_ratio else f" ± {found[f'{name}_spread'] * value / 2:.2f}"
            cells.append("—" if value is None else format(factor * value, form) + half)
        rows.append((what, *cells))
    return _table(("what", *(f"[`{size}`](../../{REFERENCE}/benchmark/{size}.json)" for size in files)), rows)


def scale_table(root: Path) -> str:
    """Tabulate the paper's run on one CPU and on 1, 8 and 64 GPUs, by the formula of `mamo.benchmark.scale`."""
    base = _benchmark(root, "base")
    cpu_s = 1 / base["step/base/fp32/samples_per_s"]
    gpu_s = base["step/base/fp32/gflop_per_image"] / 445e3
    machines = [("two CPU cores", cpu_s, 1, 0.0, "measured"), ("1 GPU", gpu_s, 1, LAUNCH_S, "predicted")]
    machines += [(f"{n} GPUs", gpu_s, n, LAUNCH_S, "predicted") for n in (8, 64)]
    rows = []
    for name, pair_s, n, launch_s, how in machines:
        step_s, hours = (work(PAPER, pair_s, n, Links(), launch_s) for work in (step_seconds, run_hours))
        efficiency = pair_s * PAPER.batch_size_global / (n * step_s)
        shown = f"{hours:.3g}" if hours < 1000 else f"{hours:,.0f}"
        rows.append((name, f"{1000 * pair_s:.2f} ms, {how}", f"{step_s:.3g}", shown, f"{100 * efficiency:.0f} %"))
    return _table(("devices", "a pair on one device", "seconds a step", "hours", "efficiency"), rows)


def study_table(root: Path) -> str:
    """Tabulate the papers' differences and those of the studies."""
    return published_table(root / STUDIES / "published.yaml", latest_results(root / STUDIES / "results"))


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


def _is_measured(root: Path, size: str) -> bool:
    """Say whether the benchmark of a size is committed with its ratio to the textbook step."""
    is_there = (root / REFERENCE / f"benchmark/{size}.json").is_file()
    return is_there and f"step/{size}/albef/over_textbook" in _benchmark(root, size)


def _benchmark(root: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((root / REFERENCE / f"benchmark/{name}.json").read_text("utf-8"))
    return found


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
