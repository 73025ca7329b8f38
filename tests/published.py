"""Tiny text encoders with random weights in the layouts of publication, and tokenizers of their kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

CAPTIONS = [
    f"a {size} {colour} {shape} is {relation} the {other}"
    for size in ("small", "large")
    for colour in ("red", "green", "Blue")
    for shape in ("circle", "square", "triangle")
    for relation in ("above", "below")
    for other in ("yellow star", "don't-care box")
]
WIDTH, LAYERS, HEADS, MLP, POSITIONS = 32, 3, 4, 48, 40
_BERT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": MLP}
_STD = {"initializer_range": 0.2}  # ten times the usual: weights that matter at this small size
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VISION = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
VISION |= {"image_size": 16, "patch_size": 8}


def bert_model(size: int) -> Any:
    """Build a BERT of so many words."""
    return BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=POSITIONS, **_BERT, **_STD))


def roberta_model(size: int) -> Any:
    """Build a RoBERTa."""
    places = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=size, pad_token_id=1, **places, **_BERT, **_STD))


def xlm_roberta_model(size: int) -> Any:
    """Build an XLM-R."""
    places = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return XLMRobertaForMaskedLM(XLMRobertaConfig(vocab_size=size, pad_token_id=1, **places, **_BERT, **_STD))


def distilbert_model(size: int) -> Any:
    """Build a DistilBERT."""
    sizes = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": MLP}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=size, max_position_embeddings=POSITIONS, **sizes, **_STD))


def modernbert_model(size: int) -> Any:
    """Build a ModernBERT whose windows are shorter than its texts."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = ModernBertConfig(
        vocab_size=size, max_position_embeddings=POSITIONS, local_attention=4, **ids, **_BERT, **_STD
    )
    return ModernBertForMaskedLM(config)


def clip_model(size: int, end: int | None = None) -> Any:
    """Build a CLIP; its text ends with token `end`, by default the last."""
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1 if end is None else end}
    text = CLIPTextConfig(vocab_size=size, max_position_embeddings=POSITIONS, projection_dim=16, **_BERT, **ids)
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    return spread(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)))


def siglip_model(size: int, pad: int = 1) -> Any:
    """Build a SigLIP that pads with token `pad`."""
    text = SiglipTextConfig(vocab_size=size, max_position_embeddings=POSITIONS, pad_token_id=pad, **_BERT)
    config = SiglipConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**VISION).to_dict())
    return spread(SiglipModel(config))


def spread(model: Any) -> Any:
    """Draw matrices and embeddings large enough that each of them matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.ndim and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def wordpiece() -> PreTrainedTokenizerFast:
    """Train a cased WordPiece tokenizer."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=BERT_TOKENS))
    return _framed(backend, "[CLS]", "[SEP]", dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT_TOKENS)))


def byte_level(tokens: list[str], start: str, end: str, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, in which the space before a word is a part of it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, initial_alphabet=alphabet)
    backend.train_from_iterator(CAPTIONS, trainer)
    return _framed(backend, start, end, names)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of RoBERTa's kind."""
    names = dict(zip(("cls", "pad", "sep", "unk", "mask"), ROBERTA_TOKENS))
    return byte_level(ROBERTA_TOKENS, "<s>", "</s>", names)


def modernbert_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of ModernBERT's kind."""
    return byte_level(BERT_TOKENS, "[CLS]", "[SEP]", dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT_TOKENS)))


def xlm_roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of XLM-R's kind."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=ROBERTA_TOKENS, unk_token="<unk>")
    backend.train_from_iterator(CAPTIONS, trainer)
    return _framed(backend, "<s>", "</s>", dict(zip(("cls", "pad", "sep", "unk", "mask"), ROBERTA_TOKENS)))


def clip_tokenizer() -> CLIPTokenizer:
    """Train a tokenizer of CLIP's kind, without [CLS], [SEP] and [MASK]; its end of text pads."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), backend.pre_tokenizer])
    backend.train_from_iterator(CAPTIONS, trainer)
    learned = backend.get_vocab()
    tokens = sorted(
        {*learned, *alphabet, *(f"{letter}</w>" for letter in alphabet)}, key=lambda t: (t not in alphabet, t)
    )
    merges = _merges(backend)
    vocabulary = {token: number for number, token in enumerate([*tokens, start, end])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of SigLIP's kind: no start, and the end of a text pads."""
    tokens = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=tokens, unk_token="<unk>")
    backend.train_from_iterator(CAPTIONS, trainer)
    ends = [("</s>", backend.token_to_id("</s>"))]
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def _framed(backend: Tokenizer, start: str, end: str, names: dict[str, str]) -> PreTrainedTokenizerFast:
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{kind}_token": name for kind, name in names.items()})


KINDS: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "bert": (wordpiece, bert_model),
    "roberta": (roberta_tokenizer, roberta_model),
    "xlm-roberta": (xlm_roberta_tokenizer, xlm_roberta_model),
    "distilbert": (wordpiece, distilbert_model),
    "modernbert": (modernbert_tokenizer, modernbert_model),
    "clip": (clip_tokenizer, clip_model),
    "siglip": (siglip_tokenizer, siglip_model),
}
"""`model_type` -> its tokenizer, and its model by the number of words."""


def save_published(kind: str, folder: Path) -> Any:
    """Write tokenizer, configuration and weights of a kind into a folder; return the model."""
    make_tokenizer, make_model = KINDS[kind]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make_model(len(tokenizer)).eval()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model
