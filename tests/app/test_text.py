"""The gateway's ids against those of transformers: its BertTokenizer, and the one written in Python alone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from app.errors import InvalidValueError
from app.manifest import ManifestError, Text, check_hashes, read_entry
from app.text import MAX_CHARACTERS, PhraseTokenizer, phrase_tokenizer
from export.bert_tokenizer import train_tokenizer
from export.phrases import difficult_phrases, grounding_phrases
from tests.repository import add_entry, artifact

LENGTH = 20


@pytest.fixture(scope="module")
def library() -> BertTokenizer:
    return train_tokenizer(grounding_phrases(), 900)


@pytest.fixture(scope="module")
def file(library: BertTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.backend_tokenizer.save(str(path))
    return path


def text(file: Path, **fields: object) -> Text:
    return Text.model_validate({"tokenizer": artifact(file), "length": LENGTH} | fields)


def test_truncated_phrases_have_the_ids_of_the_library(file: Path, library: BertTokenizer) -> None:
    tokenizer, phrases = PhraseTokenizer(file, text(file, too_long="truncate")), difficult_phrases()
    expected = library(list(phrases), truncation=True, max_length=LENGTH, padding="max_length")
    ours = [tokenizer.encode(phrase) for phrase in phrases]
    assert len(ours) >= 1000
    np.testing.assert_array_equal([one.input_ids for one in ours], expected["input_ids"])
    np.testing.assert_array_equal([one.attention_mask for one in ours], expected["attention_mask"])
    full = [len(ids) for ids in library(list(phrases))["input_ids"]]
    assert [one.truncated for one in ours] == [count > LENGTH for count in full]
    assert 100 < sum(one.truncated for one in ours) < 1400
    assert len({tuple(one.input_ids) for one in ours}) > 1000
    assert np.mean([library.unk_token_id in one.input_ids for one in ours]) < 0.5


def test_ids_are_those_of_the_tokenizer_written_in_python(file: Path, library: BertTokenizer, tmp_path: Path) -> None:
    """It shares no code with the gateway's; they only disagree on a capital sigma that ends a word."""
    vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in vocabulary), encoding="utf-8")
    written = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    tokenizer = PhraseTokenizer(file, text(file, too_long="truncate"))
    for phrase in (phrase for phrase in difficult_phrases() if not _ends_in_sigma(phrase)):
        expected = written(phrase, truncation=True, max_length=LENGTH, padding="max_length")["input_ids"]
        assert tokenizer.encode(phrase).input_ids.tolist() == expected, phrase


def _ends_in_sigma(phrase: str) -> bool:
    return phrase.lower() != "".join(map(str.lower, phrase))


def test_too_long_a_phrase_is_refused_with_the_limit(file: Path, library: BertTokenizer) -> None:
    tokenizer, limit = PhraseTokenizer(file, text(file)), LENGTH - 2
    assert tokenizer.encode("the " * limit).attention_mask.all()
    with pytest.raises(InvalidValueError, match=rf"makes {LENGTH + 1} tokens, the model takes {LENGTH},") as caught:
        tokenizer.encode("the " * (limit + 1))
    assert caught.value.field == "phrase"
    for phrase in difficult_phrases():
        ids = library(phrase)["input_ids"]
        if len(ids) <= LENGTH:
            assert tokenizer.encode(phrase).input_ids.tolist() == ids + [0] * (LENGTH - len(ids)), phrase


@pytest.mark.parametrize("phrase", ["", " ", "\t\n", "\x00\x01", "\u200b", "\u3000"], ids=ascii)
def test_a_phrase_of_nothing_is_refused(file: Path, phrase: str) -> None:
    with pytest.raises(InvalidValueError, match="empty"):
        PhraseTokenizer(file, text(file)).encode(phrase)


def test_half_a_surrogate_pair_is_refused(file: Path) -> None:
    with pytest.raises(InvalidValueError, match="surrogate"):
        PhraseTokenizer(file, text(file)).encode("the \ud83d face")


def test_a_book_is_not_read(file: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"10001 characters"):
        PhraseTokenizer(file, text(file, too_long="truncate")).encode("x" * (MAX_CHARACTERS + 1))


def test_what_the_file_says_of_padding_and_truncation_does_not_count(file: Path, tmp_path: Path) -> None:
    document = json.loads(file.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fixed = {"strategy": {"Fixed": 7}, "direction": "Left", "pad_to_multiple_of": None}
    document["padding"] = fixed | {"pad_id": 1, "pad_type_id": 0, "pad_token": "[UNK]"}
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(document))
    phrase = "the small red circle left of the big blue square"
    ours, plain = (PhraseTokenizer(path, text(path)).encode(phrase) for path in (other, file))
    assert ours.input_ids.tolist() == plain.input_ids.tolist()
    assert ours.attention_mask.tolist() == plain.attention_mask.tolist()


def test_another_padding(file: Path, library: BertTokenizer) -> None:
    ours = PhraseTokenizer(file, text(file, padding_id=4)).encode("the dog")
    assert ours.input_ids.tolist() == library("the dog")["input_ids"] + [4] * (LENGTH - 4)


@pytest.mark.parametrize(
    ("content", "fields", "reason"),
    [("{}", {}, "can be read"), ("not json", {}, "can be read"), (None, {"padding_id": 9999}, "no token of the id 9999")],
)
def test_a_file_that_is_no_tokenizer(
    file: Path, tmp_path: Path, content: str | None, fields: dict[str, object], reason: str
) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text(file.read_text() if content is None else content)
    with pytest.raises(ManifestError, match=reason):
        PhraseTokenizer(broken, text(broken, **fields))


def test_the_tokenizer_of_an_entry_is_read_once_and_checked(file: Path, tmp_path: Path) -> None:
    entry = add_entry(tmp_path)
    with pytest.raises(ManifestError, match="takes no phrases"):
        phrase_tokenizer(entry)
    held = entry.path / "tokenizer.json"
    held.write_bytes(file.read_bytes())
    (entry.path / "manifest.json").write_text(entry.manifest.model_copy(update={"text": text(held)}).model_dump_json())
    entry = read_entry(entry.path)
    check_hashes(entry)
    assert phrase_tokenizer(entry) is phrase_tokenizer(read_entry(entry.path))
    held.write_bytes(file.read_bytes().replace(b"[UNK]", b"[unk]"))
    with pytest.raises(ManifestError, match=r"tokenizer.json does not match its SHA-256"):
        check_hashes(entry)
    os.truncate(held, 10)
    with pytest.raises(ManifestError, match="10 bytes"):
        read_entry(entry.path)
    held.unlink()
    with pytest.raises(ManifestError, match=r"tokenizer.json is missing"):
        read_entry(entry.path)
