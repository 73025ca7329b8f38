"""Names of the metrics that the tasks' evaluations write into `results.json`."""

import difflib
import re
from collections.abc import Iterator, Set

from mamo.world.probes import PROBES

_RECALLS = r"(i2t|t2i)_r(1|5|10)|rsum"
_SHARES = "accuracy|majority|interval_low|interval_high"
_PATTERNS = {
    "itc": _RECALLS,
    "rerank": _RECALLS,
    "probe": f"({'|'.join(PROBES)})/(itc|itm)",
    "masked_word": "colour|number|pattern|place|relation|shape|size",
    "grounding": "pointing|proposal|random_proposal|upper_bound",
    "statements": _SHARES,
    "vqa": f"({_SHARES})(/.+)?",
    "question_only": f"({_SHARES})(/.+)?",
    "reasoning": rf"(.+/)?({_SHARES}|consistency)",
    "recon": "error|error_of_mean",
    "matching": "pr_auc/(both|image_only|text_only|random)",
}
"""First part of a name -> pattern of the rest."""
_OF_TASK = {
    "pretrain": ("itc", "rerank", "probe", "masked_word", "grounding", "statements"),
    "grounding": ("grounding",),
    "vqa": ("vqa", "question_only"),
    "reasoning": ("reasoning",),
    "mlim": ("masked_word", "recon"),
    "matching": ("matching",),
}


def unknown_metrics(names: list[str], tasks: Set[str]) -> Iterator[str]:
    """Yield a line for each name that no evaluation of these tasks writes; nothing with a task of another package."""
    if not tasks <= _OF_TASK.keys():
        return
    families = list(dict.fromkeys(family for task in sorted(tasks) for family in _OF_TASK[task]))
    for name in names:
        family, _, rest = name.partition("/")
        if family not in families:
            near = difflib.get_close_matches(family, families, n=1)
            hint = f"did you mean `{near[0]}/{rest}`?" if near else f"they begin with {'/, '.join(families)}/"
            yield f"metrics: no evaluation of {', '.join(sorted(tasks))} writes {name!r}; {hint}"
        elif not re.fullmatch(_PATTERNS[family], rest):
            yield f"metrics: no evaluation writes {name!r}; names are {family}/({_PATTERNS[family]})"
