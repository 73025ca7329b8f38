"""The vocabulary of the embedded world and its tokenizer."""

from transformers import PreTrainedTokenizerFast

from mamo.data.tokenizer import ASCII, base_tokens, build_tokenizer
from mamo.world.grammar import NOUNS, RELATION_WORDINGS, WORD_CLASSES, plural


def _vocabulary() -> tuple[str, ...]:
    words = {"a", "the", "there", "is", "are", "we", "see", "exactly", "with", "and", "of", "them", "number", ":", ","}
    words |= {"what", "how", "many", "more", "in", "total", "both", "image", "images", "show", "shows", "pattern", "?"}
    words |= {word for group in WORD_CLASSES.values() for word in group}
    words |= {word for wordings in RELATION_WORDINGS.values() for wording in wordings for word in wording.split()}
    words |= {word for noun in NOUNS for word in (noun, plural(noun))}
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Words and punctuation marks of the captions, questions and statements of both difficulties, in lower case."""


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the embedded world. Its vocabulary follows from the grammar; nothing is trained."""
    return build_tokenizer((*base_tokens(ASCII), *VOCABULARY))
