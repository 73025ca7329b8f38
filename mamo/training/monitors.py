"""Alarms when a loss sits on its trivial baseline or the teacher collapses: learning that has not begun, said aloud."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

ITM_CLASS_PRIOR = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
"""0.6365 nats: the loss of answering the class frequencies, one match in three pairs."""
WINDOW_STEPS = 200
COLLAPSED_SPREAD = 0.05


class LossMonitor:
    """Compares the mean over the last `WINDOW_STEPS` steps with the loss of a model that has learned nothing.

    Args:
        baselines: metric name -> trivial value in nats (ITM at its class prior, ITC at log N, MLM at the unigram
            entropy).
    """

    def __init__(self, baselines: Mapping[str, float]) -> None:
        self.baselines = dict(baselines)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW_STEPS))
        self.raised: set[str] = set()

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in one step; returns a line for each alarm that begins at this step (each is raised once)."""
        lines = []
        for name, value in values.items():
            if name in self.baselines or name.startswith("teacher_spread/"):
                self.recent[name].append(value)
        for name, window in self.recent.items():
            if len(window) < WINDOW_STEPS or name in self.raised:
                continue
            mean = sum(window) / len(window)
            baseline = self.baselines.get(name)
            if baseline is not None and mean >= 0.98 * baseline:
                lines.append(f"{name} has stayed at {mean:.4f}, its trivial value is {baseline:.4f} (step {step})")
            elif baseline is None and mean < COLLAPSED_SPREAD:
                lines.append(f"{name} is {mean:.4f}: the teacher's features are collapsing (step {step})")
            else:
                continue
            self.raised.add(name)
        return lines


def word_entropy(tokenizer: Any, input_ids: Tensor, is_valid: Tensor) -> float:
    """`unigram_entropy` of the ordinary tokens among int64 [B, L] where bool [B, L] is True."""
    counts = Counter(input_ids[is_valid].tolist())
    for token in tokenizer.all_special_ids:
        counts.pop(token, None)
    return unigram_entropy(counts)


def class_entropy(is_positive: Tensor) -> float:
    """Entropy in nats of two classes, bool [B]: the loss of answering their frequencies."""
    share = is_positive.float().mean()
    return float(functional.binary_cross_entropy(share, share))


def unigram_entropy(counts: Mapping[int, int]) -> float:
    """Entropy in nats of the token frequencies: the MLM loss of a model that knows only how common each word is."""
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values() if n)
