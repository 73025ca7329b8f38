"""The benchmark at its smallest size: its numbers exist and cannot contradict each other or a closed form."""

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from mamo.benchmark import cases, memory, processes, scale, shortcuts, step, suite
from mamo.benchmark.cases import Case
from mamo.benchmark.loading import measure_loading, measure_waiting
from mamo.benchmark.neighbour import measure_neighbour
from mamo.benchmark.products import Products
from mamo.benchmark.sections import SectionName
from mamo.benchmark.timing import Rounds
from mamo.cli import main
from mamo.config.presets import PRESETS
from mamo.estimate import count_operations
from mamo.models.fusion import FusionLayer
from mamo.tasks.registry import load_config

SMALLEST = Case(
    "tiny", 32, batch_size=4, vocabulary_size=100, queue_size=8, rounds=1, text_tokens=8, pairs=32, square_side=64
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamo.benchmark.products.SHORTEST_S", 0.0)
    monkeypatch.setattr("mamo.benchmark.growth.ROUNDS", 1)
    monkeypatch.setattr("mamo.benchmark.loading.WAIT_STEPS", 2)
    sizes = {
        "image": {"name": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2},
        "text": {"width": 32, "heads": 2, "mlp_width": 64, "layers": 1},
    }
    monkeypatch.setitem(PRESETS, "tiny", {"preset": "tiny", **sizes, "fusion_layers": 2, "itc_width": 16})


def test_products_of_a_layer_equal_the_closed_form() -> None:
    """Bug: a product, the attention or the backward pass is left out, or one is counted or timed twice."""
    batch, tokens, width, heads, mlp = 3, 10, 16, 2, 40
    layer = FusionLayer(width, heads, mlp)
    x = torch.randn(batch, tokens, width, requires_grad=True)
    linear = batch * tokens * (width * 3 * width + width * width + 2 * width * mlp)
    attention = 2 * batch * tokens * tokens * width
    forward = Products(lambda: layer(x, None), CPU)
    both = Products(lambda: layer(x, None).sum().backward(), CPU)
    assert forward.operations == 2 * (linear + attention)
    assert both.operations == 6 * (linear + attention)
    assert both.operations == count_operations(lambda: layer(x, None).sum().backward())
    assert sum(forward.calls.values()) == 6  # qkv, scores, mix, out, fc1, fc2
    assert sum(both.calls.values()) == 18
    with torch.inference_mode():  # where linear layers arrive whole
        assert Products(lambda: layer(x, None), CPU).operations == forward.operations


def test_the_floor_runs_each_product_as_often_as_it_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a product that occurs twelve times is counted once, so that the floor is a fraction of what it is."""
    layer = nn.Linear(4, 4)
    work = Products(lambda: [layer(torch.ones(2, 4)) for _ in range(12)], CPU)
    monkeypatch.setattr("mamo.benchmark.products.seconds", lambda work, device, repeats=1: 0.5)
    assert len(work.calls) == 1
    assert work.seconds() == 6.0


def test_step_is_never_faster_than_its_floor(tmp_path: Path) -> None:
    """Bug: shares over 1, a missing key, a ratio upside down, or operations that differ from those of `--plan`."""
    found = step.measure_step(SMALLEST, tmp_path, CPU, "bf16")
    for prefix in ("step/tiny", "step/tiny/fp32", "step/tiny/bf16"):
        assert 0 < found[f"{prefix}/share_of_matrix_rate"] < 1
        assert found[f"{prefix}/floor_s"] < found[f"{prefix}/step_s"]
        assert found[f"{prefix}/samples_per_s"] == pytest.approx(4 / found[f"{prefix}/step_s"])
    assert found["step/tiny/step_s"] == found["step/tiny/bf16/step_s"]
    _, loop, batch = cases.build_case(SMALLEST, tmp_path, CPU, "fp32")
    operations = count_operations(lambda: loop.backward(batch, 0))
    assert found["step/tiny/fp32/gflop_per_image"] == pytest.approx(operations / 4e9)
    assert found["step/tiny/bf16/gflop_per_image"] == pytest.approx(operations / 4e9)
    book = found["step/tiny/bf16/textbook_fp32_s"], found["step/tiny/bf16/textbook_bf16_s"]
    step_s = found["step/tiny/bf16/step_s"]  # one round, whose ratio is the ratio of its times
    assert found["step/tiny/albef/gflop_per_image"] < found["step/tiny/fp32/gflop_per_image"]
    assert found["step/tiny/bf16/over_textbook"] == pytest.approx(step_s / book[0])
    assert found["step/tiny/bf16/over_textbook_in_this_precision"] == pytest.approx(step_s / book[1])


def test_the_baseline_that_is_timed_is_the_one_that_ships(tmp_path: Path) -> None:
    """Bug: the timed ALBEF does less work than its config says: another fusion, no dropout, fewer losses or targets."""
    shipped = load_config(Path(__file__).parents[2] / "configs/pretrain/albef.yaml")
    timed = replace(cases.CASES["tiny"], method="albef").config(tmp_path, "cpu", "fp32")
    assert timed.masking == shipped.masking
    assert timed.losses.weights == shipped.losses.weights
    for name in ("fusion_type", "dropout"):
        assert getattr(timed.model, name) == getattr(shipped.model, name)
    for name in ("itc_soft_target_alpha", "mlm_soft_target_alpha", "itc_candidates"):
        assert getattr(timed.losses, name) == getattr(shipped.losses, name)
    _, loop, batch = cases.build_case(replace(SMALLEST, method="albef"), tmp_path, CPU, "fp32")
    values = loop.backward(batch, 0)[1]
    assert {name for name in values if name.startswith("loss/")} == {"loss/itc", "loss/itm", "loss/mlm"}


def test_shares_add_up(tmp_path: Path) -> None:
    """Bug: a pass or module is left out, or measuring it leaves hooks or other weights of losses behind."""
    found = step.measure_passes(SMALLEST, tmp_path, CPU, "fp32")
    for kind in ("passes", "modules"):
        assert sum(value for key, value in found.items() if key.startswith(kind)) == pytest.approx(1)
    assert all(value > 0 for key, value in found.items() if key.startswith("modules") and "other" not in key)
    assert {f"modules/tiny/share/{part}_{way}" for part in ("image_encoder", "text_encoder", "fusion", "heads")
            for way in ("forward", "backward")} < found.keys()  # fmt: skip
    _, loop, batch = cases.build_case(SMALLEST, tmp_path, CPU, "fp32")
    weights = loop.task.weights
    step._three_parts(loop, batch, {"itc": 1.0})
    assert loop.task.weights is weights
    spent: dict[str, float] = {}
    with step.timing_modules(step.module_groups(loop.task.network), CPU, spent):
        loop.backward(batch, 0)
    assert not any(module._forward_hooks or module._backward_hooks for module in loop.task.network.modules())


def test_shortcuts_change_nothing(tmp_path: Path) -> None:
    """Bug: what is timed against a shortcut computes something else; or it is not switched off, or not on again."""
    run, loop, _ = cases.build_case(SMALLEST, tmp_path, CPU, "fp32")
    batch = cases.synthetic_batch(run, 4, (5, 2, 4, 3))
    plain = Products(lambda: loop.backward(batch, 0), CPU).operations
    for name, (without, work) in shortcuts.shortcut_variants(run, loop, batch).items():
        assert shortcuts._largest_difference(loop, batch, without, work) < 2e-6, name  # a wrong patch moves MIM by 1e-5
        with without():
            assert Products(work, CPU).operations > 1.02 * plain, name
        assert Products(lambda: loop.backward(batch, 0), CPU).operations == plain, name


def test_rest_of_the_suite(tmp_path: Path) -> None:
    """Bug: a section fails, or names its numbers as no one expects them."""
    found = suite.machine(CPU)
    for part in suite.run_benchmark([SMALLEST], CPU, ["reranking", "checkpoint", "growth"]):
        found |= part
    assert found["reranking/tiny/speedup_over_encoding_again"] > 0
    assert 0 < found["reranking/tiny/share_of_matrix_rate"] < 1
    assert {f"growth/tiny/{name}/sample_s" for name in ("batch_2", "batch_4", "batch_8", "image_64_px")} < found.keys()
    assert found["checkpoint/tiny/save_s"] > 0
    assert found["checkpoint/tiny/resume_s"] > 0
    suite.write_json(found, tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text()) == found
    lines = list(suite.table(found))
    assert any(line.startswith("| `reranking/tiny/pairs_per_s` | ") for line in lines)
    assert all(line.count("|") == 4 for line in lines)


def test_every_name_of_the_command_is_measured() -> None:
    """Bug: a section or preset that the command line does not offer, or offers in vain."""
    assert list(suite.SECTIONS) == list(get_args(SectionName))
    assert list(cases.CASES) == list(PRESETS)


def test_numbers_are_kept_when_a_later_section_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the file is written at the end alone, and an hour of measurements is lost with the last of them."""

    def fails(*arguments: object) -> dict[str, float]:
        raise ValueError("out of room")

    monkeypatch.setattr(suite, "SECTIONS", {"step": lambda *arguments: {"step/tiny/step_s": 0.5}, "passes": fails})
    monkeypatch.setattr(suite, "faster_precision", lambda *arguments: "fp32")
    file = tmp_path / "numbers.json"
    sections = ["--preset", "tiny", "--only", "step", "--only", "passes"]
    same = ["--device", "cpu", "--threads", str(torch.get_num_threads())]  # what the script sets outlives the test
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *sections, *same, "--json", str(file)])
    assert stopped.value.code == 2
    assert json.loads(file.read_text())["step/tiny/step_s"] == 0.5


@pytest.mark.slow
def test_two_processes_are_measured_beside_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the processes work alone, one does the work of both, or a pool of negatives straddles two."""
    monkeypatch.setattr(processes, "ROUNDS", 1)
    monkeypatch.setattr(processes, "STEPS", 1)
    found = processes.measure_processes(SMALLEST, tmp_path, CPU, "bf16")
    one, two = (found[f"growth/tiny/processes_{count}/samples_per_s"] for count in (1, 2))
    assert found["growth/tiny/processes_2/over_one_process"] == two / one > 0
    both = replace(SMALLEST, batch_size=8, processes=2)
    assert both.config(tmp_path, "cpu", "bf16").losses.itm_pool_size == 4
    assert len(cases.build_case(both, tmp_path, CPU, "bf16")[2]) == 4


@pytest.mark.slow
def test_memory_is_that_of_the_steps(tmp_path: Path) -> None:
    """Bug: the libraries, or what the measuring process holds besides, count as memory of the step."""
    found = memory.measure_memory(SMALLEST, tmp_path, CPU, "fp32")
    assert 0 < found["memory/tiny/peak_mib"] < 300
    assert found["memory/tiny/checkpointing/predicted_mib"] < found["memory/tiny/predicted_mib"]
    assert found["memory/tiny/predicted_over_peak"] == pytest.approx(
        found["memory/tiny/predicted_mib"] / found["memory/tiny/peak_mib"]
    )


def test_waiting_is_a_share(tmp_path: Path) -> None:
    """Bug: the steps count as waiting."""
    found = measure_waiting(SMALLEST, tmp_path, CPU, "fp32", workers=0)
    assert 0 < found["loading/tiny/wait_share"] < 0.9


def test_loading_rates(tmp_path: Path) -> None:
    """Bug: a source that is not measured, or shards that hold other pictures than the folder."""
    found = measure_loading(tmp_path, 1, n_stored=4, side_px=32)
    for source in ("scenes", "jpeg_folder", "jpeg_shards", "jpeg_no_augmentation"):
        assert found[f"loading/{source}_samples_per_core_s"] > 0
    names = [path.name for path in (tmp_path / "jpeg").glob("*.jpg")]
    assert len(names) == 4
    assert found["loading/jpeg_bytes"] == sum((tmp_path / "jpeg" / name).stat().st_size for name in names) / 4


def test_speed_next_to_a_busy_program(tmp_path: Path) -> None:
    """Bug: a ratio upside down, or a program that goes on being busy after its measurement."""
    found = measure_neighbour(SMALLEST, tmp_path, CPU, "fp32")
    share = found["neighbour/tiny/alone_s"] / found["neighbour/tiny/beside_s"]
    assert found["neighbour/tiny/share_of_lone_speed"] == pytest.approx(share)
    assert not subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "while True: pass"], capture_output=True).stdout


def test_medians_and_spreads() -> None:
    """Bug: the mean, which one disturbed round moves, or a spread in seconds instead of a share."""
    rounds = Rounds()
    for value in (1.0, 2.0, 3.0, 4.0, 100.0):
        rounds.add(x=value)
    assert rounds.summary("a") == {"a/x": 3.0, "a/x_spread": 2 / 3}


def test_scale_plan_in_its_limits() -> None:
    """Bug: the batch is not divided, gradients are not counted in both directions, or overlap makes time negative."""
    links = scale.Links(latency_s=0.0)
    recipe = scale.Recipe(pairs=512_000, batch_size_global=512, parameters=10**8, feature_width=256)
    assert scale.step_seconds(recipe, 0.01, 1, links) == pytest.approx(5.12)
    assert scale.run_hours(recipe, 0.01, 1, links) == pytest.approx(1000 * 5.12 / 3600)
    gather = 63 / 64 * 512 * (2 * 4 * 256 + 16) / links.between_bytes_per_s
    # slow arithmetic hides the gradients; with none, 2 * 63/64 * 400 MB cross the slowest link
    assert scale.step_seconds(recipe, 0.01, 64, links) == pytest.approx(5.12 / 64 + gather)
    assert scale.step_seconds(recipe, 0.0, 64, links) == pytest.approx(2 * 63 / 64 * 4e8 / 40e9 + gather)
    assert scale.step_seconds(recipe, 0.0, 8, links) < scale.step_seconds(recipe, 0.0, 9, links)
    assert scale.step_seconds(recipe, 0.0, 1, links, 1e-5) == pytest.approx(scale.LAUNCHES * 1e-5)  # the host alone
    halves = replace(recipe, micro_batches=2)  # of which the gradients of the second are sent while it runs
    late = scale.step_seconds(halves, 0.01, 64, links) - scale.step_seconds(recipe, 0.01, 64, links)
    assert late == pytest.approx(max(0.0, 2 * 63 / 64 * 4e8 / 40e9 - 0.25 * 0.08))
    plan = scale.scale_plan(0.01, "cuda")
    assert plan["scale/cuda_64/hours"] < plan["scale/cuda_8/hours"] < plan["scale/cuda_1/hours"]
    assert all(0 < value <= 1 + 1e-9 for key, value in plan.items() if key.endswith("efficiency"))
    assert math.isclose(plan["scale/cuda_1/efficiency"], 1)
