"""Measure the training step against the textbook step, in turns in one run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.products import Products
from mamo.benchmark.textbook import Textbook
from mamo.benchmark.timing import Rounds, seconds
from mamo.tasks.pretrain.task import PretrainTask
from mamo.training.precision import Precision


def measure_over_textbook(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure ALBEF's config in fp32, and the five losses in fp32 and in `precision`, over the textbook in fp32.

    Turns alternate in order. A ratio is taken within a turn; the median and its spread are reported.
    """
    found: dict[str, float] = {}
    ways: dict[str, tuple[Case, Precision]] = {"albef": (replace(case, method="albef"), "fp32"), "fp32": (case, "fp32")}
    ways[precision] = (case, precision)
    for name, (one, own_precision) in ways.items():
        found |= _over_textbook(one, own_precision, case, folder, device).summary(f"textbook/{case.preset}/{name}")
    return found


def _over_textbook(one: Case, precision: Precision, case: Case, folder: Path, device: torch.device) -> Rounds:
    _, loop, batch = build_case(one, folder, device, precision)
    run, _, _ = build_case(replace(case, method="albef"), folder, device, "fp32")
    assert isinstance(run.task, PretrainTask)
    book = Textbook(run.task)
    operations = Products(lambda: loop.backward(batch, 0), device).operations
    loop.task.network.zero_grad(set_to_none=True)
    ways: dict[str, Callable[[], object]] = {
        "step_s": lambda: loop.step(batch, 1),
        "textbook_s": lambda: book.step(batch),
    }
    rounds = Rounds()
    for turn in range(case.rounds + 1):
        order = list(ways)[:: 1 if turn % 2 else -1]
        spent = {name: seconds(ways[name], device) for name in order}
        if turn > 0:  # the first is a warm-up
            rounds.add(
                **spent,
                gflop_per_image=operations / len(batch) / 1e9,
                over_textbook=spent["step_s"] / spent["textbook_s"],
            )
    return rounds
