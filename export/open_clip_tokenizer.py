"""open_clip's tokenizers: each as a `tokenizer.json` that the gateway runs, and as open_clip itself has it for comparison."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from app.clean import Cleaning
from export.spec import CleanedVocabulary, ExportError

_SUFFIX = "</w>"
_WORDS = r"(?i)<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_TRAINED = 4000


def simple_vocabulary(length: int, arguments: dict[str, Any]) -> CleanedVocabulary:
    """CLIP's byte pairs, which open_clip brings along.

    Raises:
        ExportError: a tokenizer that drops words at random, or has other special tokens.
    """
    clean = _cleaning(arguments, "lower")
    tokenizer = SimpleTokenizer(context_length=length, clean=clean)

    def count(text: str) -> int:
        return len(tokenizer.encode(text)) + 2

    file = _byte_pairs(tokenizer).to_str().encode()
    return CleanedVocabulary(file, tokenizer.vocab_size, 0, clean, _rows(tokenizer), count)


def read_vocabulary(directory: Path | str, length: int, arguments: dict[str, Any]) -> CleanedVocabulary:
    """A tokenizer of transformers, from a directory or the hub, as SigLIP has it.

    Raises:
        ExportError: it cannot be read, or is one whose ids are changed afterwards.
    """
    clean = _cleaning(arguments, "whitespace")
    try:
        tokenizer = HFTokenizer(str(directory), context_length=length, clean=clean)
        inner = tokenizer.tokenizer
        file = inner.backend_tokenizer
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"The tokenizer {directory} cannot be read ({reason}); give --tokenizer DIRECTORY.") from error
    if inner.pad_token_id is None:
        raise ExportError(f"The tokenizer {directory} has no token to pad with.")

    def count(text: str) -> int:
        return len(inner(tokenizer.clean_fn(text), verbose=False)["input_ids"])

    plain = Tokenizer.from_str(file.to_str())
    plain.no_truncation()
    plain.no_padding()
    return CleanedVocabulary(plain.to_str().encode(), len(inner), inner.pad_token_id, clean, _rows(tokenizer), count)


def train_vocabulary(lines: Iterable[str], length: int, arguments: dict[str, Any]) -> CleanedVocabulary:
    """One in the manner of SigLIP's, made of `lines`: letters and frequent words, padded with the token of the end."""
    words = Counter(word for line in lines for word in line.lower().split())
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*special, "\u2581", *letters, *(f"\u2581{word}" for word in frequent)][:_TRAINED]
    scores = [(piece, 0.0 if piece in special else -1.0 - 0.001 * place) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")  # noqa: S106
    with TemporaryDirectory() as directory:
        fast.save_pretrained(directory)
        return read_vocabulary(directory, length, arguments)


def _cleaning(arguments: dict[str, Any], default: Cleaning) -> Cleaning:
    foreign = {name: value for name, value in arguments.items() if name != "clean" and value}
    clean = arguments.get("clean", default)
    if foreign or clean not in get_args(Cleaning):
        raise ExportError(f"A tokenizer with {json.dumps(arguments)} is not served; only `clean` is known.")
    found: Cleaning = clean
    return found


def _rows(tokenizer: Any) -> Any:
    def rows(texts: Sequence[str]) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = tokenizer(list(texts)).numpy()
        return ids

    return rows


def _byte_pairs(simple: SimpleTokenizer) -> Tokenizer:
    """The same ids from `tokenizers`, for a text that is cleaned.

    A text may spell a special token out. open_clip makes it one where its expression finds it whole; here merges behind all others
    put its pieces together, which no other word has beside one another.
    """
    vocabulary, merges = dict(simple.encoder), list(simple.bpe_ranks)
    for special in ("<start_of_text>", "<end_of_text>"):
        pieces = _pieces(special, simple)
        joined = pieces[0]
        for piece in pieces[1:]:
            merges.append((joined, piece))
            joined += piece
            vocabulary.setdefault(joined, len(vocabulary))
        vocabulary[joined] = simple.encoder[special]
        vocabulary.pop(special)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_SUFFIX))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = [("<start_of_text>", simple.sot_token_id), ("<end_of_text>", simple.eot_token_id)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start_of_text> $A <end_of_text>", special_tokens=ends)
    return tokenizer


def _pieces(word: str, simple: SimpleTokenizer) -> list[str]:
    """What byte pairs alone make of a word."""
    pieces = [*word[:-1], word[-1] + _SUFFIX]
    while True:
        ranked = [(simple.bpe_ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in simple.bpe_ranks]
        if not ranked:
            return pieces
        at = min(ranked)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
