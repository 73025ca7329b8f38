"""Cleaning of texts before they are tokenized: our own, or that of the public ALBEF implementation (Li et al. 2021)."""

import re
from collections.abc import Callable
from typing import Literal

from mamo.data.pairs_reader import MAX_CAPTION_CHARS, clean_caption

Cleaning = Literal["plain", "albef"]
"""`plain`: `clean_caption`; `albef`: `albef_caption` and `albef_question`."""
Clean = Callable[[str], str]

MAX_WORDS = 30
_TABLE = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_SPACES = re.compile(r"\s{2,}")


def albef_caption(text: str) -> str:
    """Clean a caption, an expression or a statement as ALBEF does, and cut it to `MAX_WORDS` words.

    It becomes lower case without the marks `, . ' ! ? " ( ) * # : ; ~`; hyphens and slashes become spaces, several
    spaces one, `<person>` a word. Other characters stay as they are: Unicode is not normalised.
    """
    return _cut(_whole_caption(text))


def _whole_caption(text: str) -> str:
    text = _SPACES.sub(" ", _lowered(text).replace("<person>", "person"))
    return text.rstrip("\n").strip(" ")


def is_cut(text: str, cleaning: Cleaning) -> bool:
    """Say whether cleaning shortens a caption to `MAX_WORDS` words or `MAX_CAPTION_CHARS` characters."""
    if cleaning == "plain":
        return len(" ".join(text.split())) > MAX_CAPTION_CHARS
    whole = _whole_caption(text)
    return len(whole) > MAX_CAPTION_CHARS or whole.count(" ") >= MAX_WORDS


def albef_question(text: str) -> str:
    """Clean a question as ALBEF does: as a caption, but several spaces stay and count as words between them."""
    return _cut(_lowered(text).rstrip(" "))


def cleaner(cleaning: Cleaning, is_question: bool = False) -> Clean:
    """Return the function that cleans captions, expressions and statements, or questions."""
    if cleaning == "plain":
        return clean_caption
    return albef_question if is_question else albef_caption


def _lowered(text: str) -> str:
    """Drop and replace marks of a text, of which no more is read than of any caption; lone surrogates are dropped."""
    return text[: 4 * MAX_CAPTION_CHARS].encode("utf-8", "ignore").decode("utf-8").lower().translate(_TABLE)


def _cut(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])[:MAX_CAPTION_CHARS]
