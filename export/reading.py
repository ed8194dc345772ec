"""How verification compares what a gateway reads of phrases with what the library reads, and which phrases it asks about."""

import numpy as np

from app.errors import InvalidValueError
from app.manifest import Check, Text
from app.text import PhraseTokenizer
from export.agreement import at_most
from export.phrases import difficult_phrases, grounding_phrases
from export.spec import Vocabulary


def compare_ids(tokenizer: PhraseTokenizer, vocabulary: Vocabulary, text: Text) -> Check:
    """The gateway's ids of difficult strings; too long ones are cut or refused as the manifest says, and then by the library's
    count."""
    phrases = difficult_phrases()
    wrong = sum(not _reads_alike(phrase, tokenizer, vocabulary, text) for phrase in phrases)
    return at_most(f"tokenizer: other ids in {len(phrases):,} strings", wrong, 0, "strings")


def _reads_alike(phrase: str, tokenizer: PhraseTokenizer, vocabulary: Vocabulary, text: Text) -> bool:
    too_long = len(vocabulary.ids(phrase)) > text.length
    try:
        ours = tokenizer.encode(phrase)
    except InvalidValueError:
        return too_long and text.too_long == "refuse"
    ids, mask = vocabulary.rows([phrase], text.length)
    same = np.array_equal(ours.input_ids, ids[0]) and np.array_equal(ours.attention_mask, mask[0])
    return same and ours.truncated == too_long


def known_phrases(vocabulary: Vocabulary, length: int, count: int) -> tuple[str, ...]:
    """`count` different descriptions that fit into `length`, of those whose words the vocabulary knows best."""
    candidates = [phrase for phrase in dict.fromkeys(grounding_phrases()[:400]) if len(vocabulary.ids(phrase)) <= length]
    return tuple(sorted(candidates, key=lambda phrase: vocabulary.ids(phrase).count(vocabulary.unknown_id))[:count])


def short_phrases(vocabulary: Vocabulary, length: int, count: int) -> tuple[str, ...]:
    """`count` different pairs of words that fit into `length`, such as `red cup`."""
    pairs = (" ".join(phrase.split()[1:3]) for phrase in grounding_phrases())
    return tuple([pair for pair in dict.fromkeys(pairs) if len(vocabulary.ids(pair)) <= length][:count])
