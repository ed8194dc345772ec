"""BERT's tokenizer as transformers has it: trained here or read from a file; the reference of the ids that the gateway gives."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer

from export.spec import ExportError, Vocabulary

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(lines: Iterable[str], size: int) -> BertTokenizer:
    """A lower-casing vocabulary of all letters of `lines`, at and behind the beginning of a word, and of the most frequent words,
    `size` tokens in all where the letters leave room.

    It is the same for the same lines; the trainers of `tokenizers` break ties in another order each time.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words = Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    letters = sorted({letter for word in words for letter in word})
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    pieces += frequent[: max(0, size - len(pieces))]
    return _make({piece: number for number, piece in enumerate(pieces)}, lower=True)


def read_tokenizer(path: Path) -> BertTokenizer:
    """That of a `vocab.txt` (lower-casing, as BERT uncased), of a `tokenizer.json`, or of a directory with one of them.

    Raises:
        ExportError: there is none, or it is not BERT's.
    """
    files = [path] if path.is_file() else [file for name in ("tokenizer.json", "vocab.txt") if (file := path / name).is_file()]
    if not files:
        raise ExportError(f"There is no tokenizer.json or vocab.txt at {path}; give --tokenizer FILE.")
    try:
        content = files[0].read_text(encoding="utf-8")
        if files[0].suffix != ".json":
            words = content.removesuffix("\n").split("\n")
            return _make({word: number for number, word in enumerate(words)}, lower=True)
        document = json.loads(content)
        model, normalizer = document["model"], document["normalizer"]
        known = model["type"] == "WordPiece" and normalizer["type"] == "BertNormalizer"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"The tokenizer {files[0]} cannot be read: {error}.") from error
    if not known:
        raise ExportError(f"{files[0]} is not BERT's tokenizer (WordPiece behind a BertNormalizer), which the network reads.")
    return _make(model["vocab"], lower=normalizer["lowercase"])


def vocabulary_of(tokenizer: BertTokenizer) -> Vocabulary:
    """What an export takes along of a tokenizer."""

    def ids(phrase: str) -> list[int]:
        found: list[int] = tokenizer(phrase, verbose=False)["input_ids"]
        return found

    file = tokenizer.backend_tokenizer.to_str(pretty=False).encode()
    return Vocabulary(file, len(tokenizer), tokenizer.pad_token_id, tokenizer.unk_token_id, ids)


def _make(vocabulary: dict[str, int], *, lower: bool) -> BertTokenizer:
    missing = [token for token in SPECIAL if token not in vocabulary]
    if missing:
        raise ExportError(f"The vocabulary has no {', '.join(missing)}.")
    return BertTokenizer(dict(sorted(vocabulary.items(), key=lambda item: item[1])), do_lower_case=lower)
