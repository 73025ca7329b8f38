"""Collection of the errors in a file, so that one message lists them."""

from pathlib import Path

_MAX_LISTED = 10


class ErrorCollector:
    """The errors of one file, by line."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, text: str) -> None:
        """Add an error of a line (1-based)."""
        self.found.append((line, f"{self.source}:{line}: {text}"))

    def raise_if_any(self) -> None:
        """Raise ValueError with the first ten errors by line, and the number of the others."""
        if self.found:
            hidden = len(self.found) - _MAX_LISTED
            listed = [text for _, text in sorted(self.found, key=lambda error: error[0])[:_MAX_LISTED]]
            more = f"; and {hidden} more" if hidden > 0 else ""
            raise ValueError(f"{len(self.found)} problem(s): " + "; ".join(listed) + more)
