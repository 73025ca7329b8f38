"""One image with its captions, and the mistakes found on the way to it."""

from dataclasses import dataclass
from pathlib import Path

from mamo.data.shard_index import ShardMember

_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class PairRecord:
    """One row: a picture and its captions (at least one; an empty caption is left to the bad-sample policy).

    `image` is an absolute path or a member of a tar; `line` is the 1-based line, list entry or pair of the tar in
    `source`.
    """

    image: str | ShardMember
    captions: tuple[str, ...]
    image_id: str
    line: int
    source: str
    directory: str | None = None


class ErrorCollector:
    """Collects every mistake of one file, so that the user sees them all at once."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, text: str) -> None:
        """Note a mistake of a line."""
        self.found.append((line, f"{self.source}:{line}: {text}"))

    def raise_if_any(self) -> None:
        """Raises ValueError with the first ten mistakes and how many more there are."""
        if self.found:
            hidden = len(self.found) - _MAX_LISTED
            listed = [text for _, text in sorted(self.found)[:_MAX_LISTED]]
            more = f"; and {hidden} more" if hidden > 0 else ""
            raise ValueError(f"{len(self.found)} bad rows: " + "; ".join(listed) + more)
