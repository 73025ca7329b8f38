"""Warn when a loss stays at its trivial baseline or the teacher collapses."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

ITM_CLASS_PRIOR = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
"""0.6365 nats: ITM loss of a predictor of the class frequencies, one match in three pairs."""
WINDOW_STEPS = 200
COLLAPSED_SPREAD = 0.05


class LossMonitor:
    """Compare the mean over the last `WINDOW_STEPS` steps with the loss of a trivial predictor.

    Args:
        trivial_losses: metric name -> trivial value in nats (ITM: entropy of the class prior; ITC: log N; MLM: unigram
            entropy).
    """

    def __init__(self, trivial_losses: Mapping[str, float]) -> None:
        self.trivial_losses = dict(trivial_losses)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW_STEPS))
        self.raised: set[str] = set()

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Add one step; return a line for each alarm that begins at this step. Each alarm is raised once."""
        lines = []
        for name, value in values.items():
            if name in self.trivial_losses or name.startswith("teacher_spread/"):
                self.recent[name].append(value)
        for name, window in self.recent.items():
            if len(window) < WINDOW_STEPS or name in self.raised:
                continue
            mean = sum(window) / len(window)
            trivial = self.trivial_losses.get(name)
            if trivial is not None and mean >= 0.98 * trivial:
                lines.append(
                    f"{name} is not learning: mean {mean:.4f} over {WINDOW_STEPS} steps, trivial predictor "
                    f"{trivial:.4f} (step {step})"
                )
            elif trivial is None and mean < COLLAPSED_SPREAD:
                lines.append(f"{name} is {mean:.4f}: the teacher's features are collapsing (step {step})")
            else:
                continue
            self.raised.add(name)
        return lines


def word_entropy(tokenizer: PreTrainedTokenizerFast, input_ids: Tensor, is_valid: Tensor) -> float:
    """Compute the `unigram_entropy` of the ordinary tokens among int64 [B, L] where bool [B, L] is True."""
    counts = Counter(input_ids[is_valid].tolist())
    for token in tokenizer.all_special_ids:
        counts.pop(token, None)
    return unigram_entropy(counts)


def class_entropy(is_positive: Tensor) -> float:
    """Compute the entropy in nats of two classes, bool [B]: the loss of a predictor of their frequencies."""
    share = is_positive.float().mean()
    return float(functional.binary_cross_entropy(share, share))


def unigram_entropy(counts: Mapping[int, int]) -> float:
    """Compute the entropy in nats of token frequencies: the MLM loss of a unigram model."""
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values() if n)
