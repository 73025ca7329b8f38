"""Alarms: raised when a loss sits on its trivial value or the teacher collapses, and not otherwise."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mamo.config.schema import RunConfig
from mamo.trainer import EXAMPLES, TrainingRun
from mamo.training.metric_logger import MetricLogger
from mamo.training.monitors import COLLAPSED_SPREAD, ITM_CLASS_PRIOR, WINDOW_STEPS, LossMonitor, unigram_entropy


def feed(alarms: LossMonitor, values: list[dict[str, float]]) -> list[tuple[int, str]]:
    """(step, line) of every alarm."""
    return [(step, line) for step, row in enumerate(values, start=1) for line in alarms.check(step, row)]


def test_class_prior_is_the_entropy_of_one_match_in_three() -> None:
    """Bug: an alarm at log 2, which a model that answers the class frequencies is already below."""
    logits = torch.tensor([[math.log(2), 0.0]]).expand(3, 2)  # (mismatch, match) = (2/3, 1/3)
    expected = functional.cross_entropy(logits, torch.tensor([1, 0, 0]))
    assert pytest.approx(float(expected), abs=1e-6) == ITM_CLASS_PRIOR


def test_a_stuck_loss_raises_once_after_a_full_window() -> None:
    """Bug: silence at the trivial value, an alarm from the first noisy steps, or one line a step for ever after."""
    alarms = LossMonitor({"loss/itm": ITM_CLASS_PRIOR, "loss/itc": math.log(64)})
    rows = [{"loss/itm": 0.6365, "loss/itc": 2.0, "gradient_norm": 1.0}] * (2 * WINDOW_STEPS)
    raised = feed(alarms, rows)
    assert [step for step, _ in raised] == [WINDOW_STEPS]
    assert "loss/itm" in raised[0][1]


def test_a_falling_loss_raises_nothing() -> None:
    """Bug: alarms that cry wolf in a healthy run, or average over the whole run instead of the window."""
    alarms = LossMonitor({"loss/mlm": 3.0})
    assert feed(alarms, [{"loss/mlm": 3.0 * 0.995**step} for step in range(3 * WINDOW_STEPS)]) == []


def test_a_loss_that_returns_to_its_trivial_value_raises() -> None:
    """Bug: a mean over the whole run, in which a late collapse drowns."""
    alarms = LossMonitor({"loss/itc": 4.0})
    rows = [{"loss/itc": 0.1}] * (3 * WINDOW_STEPS) + [{"loss/itc": 4.1}] * (2 * WINDOW_STEPS)
    assert len(feed(alarms, rows)) == 1


def test_collapsed_features_raise_and_spread_ones_do_not() -> None:
    """Bug: the spread compared the wrong way round, so that healthy features alarm and collapsed ones do not."""
    rows = [{"teacher_spread/image": 0.9, "teacher_spread/text": COLLAPSED_SPREAD / 5}] * WINDOW_STEPS
    raised = feed(LossMonitor({}), rows)
    assert [line.split()[0] for _, line in raised] == ["teacher_spread/text"]


def test_a_run_knows_its_trivial_values(tiny: Callable[..., RunConfig]) -> None:
    """Bug: candidates of the batch or of the queue left out of log N, padding counted as words, a wrong key."""
    run = TrainingRun(tiny())
    batch = run.example_batch(min(EXAMPLES, 50))
    words = [
        word for row, n in zip(batch.input_ids.tolist(), batch.is_valid.sum(1).tolist()) for word in row[1 : n - 1]
    ]
    shares = [words.count(word) / len(words) for word in set(words)]
    expected = {
        "loss/itc": math.log(8 + 24),
        "loss/itm": ITM_CLASS_PRIOR,
        "loss/mlm": -sum(p * math.log(p) for p in shares),
    }
    assert run.trivial_losses() == pytest.approx(expected, abs=1e-6)
    assert expected.keys() <= run.loop([]).backward(run.example_batch(8), 0)[1].keys()


def test_a_resumed_run_goes_on_watching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a run that is often resumed never fills the window, or says the same alarm after each start."""
    row = {"loss/itm": ITM_CLASS_PRIOR}

    def steps(start: int, end: int) -> int:
        log = MetricLogger(tmp_path, [], LossMonitor({"loss/itm": ITM_CLASS_PRIOR}), start, 1000)
        for step in range(start + 1, end + 1):
            log.write(step, row, {"samples_per_s": 1.0})
        log.close()
        return capsys.readouterr().err.count("alarm: loss/itm")

    assert steps(0, WINDOW_STEPS - 50) == 0
    assert steps(WINDOW_STEPS - 50, WINDOW_STEPS + 10) == 1
    assert steps(WINDOW_STEPS + 10, 2 * WINDOW_STEPS) == 0


def test_unigram_entropy() -> None:
    """Bug: log base 2, unnormalised counts, or a crash on a count of zero."""
    assert unigram_entropy({7: 5, 8: 5, 9: 5, 10: 5}) == pytest.approx(math.log(4))
    assert unigram_entropy({1: 3, 2: 1, 3: 0}) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
