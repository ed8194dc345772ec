"""CLIP's tokenizer as transformers has it, read from a directory or made here; the reference of the ids that the gateway gives."""

from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPTokenizer

from export.spec import ExportError, Vocabulary

_FILES = ("tokenizer.json", "vocab.json")


def make_tokenizer() -> CLIPTokenizer:
    """Letter by letter: all 256 bytes within and at the end of a word, and no merges. It is for random weights."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, [], pad_token=pieces[0])


def read_tokenizer(directory: str) -> CLIPTokenizer:
    """That of a directory or of the hub.

    Raises:
        ExportError: there is none, or it is not CLIP's.
    """
    if Path(directory).is_dir() and not any((Path(directory) / file).exists() for file in _FILES):
        raise ExportError(f"{directory} has neither a {' nor a '.join(_FILES)}; the network reads phrases and needs its tokenizer.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise ExportError(f"The tokenizer of {directory} cannot be read: {error}") from error
    if not isinstance(tokenizer, CLIPTokenizer):
        raise ExportError(f"The tokenizer of {directory} is a {type(tokenizer).__name__}; the network reads CLIP's.")
    return tokenizer


def vocabulary_of(tokenizer: CLIPTokenizer) -> Vocabulary:
    """What an export takes along of a tokenizer."""

    def ids(phrase: str) -> list[int]:
        found: list[int] = tokenizer(phrase, verbose=False)["input_ids"]
        return found

    file = tokenizer.backend_tokenizer.to_str(pretty=False).encode()
    return Vocabulary(file, len(tokenizer), tokenizer.pad_token_id, tokenizer.unk_token_id, ids)
