"""Phrases for networks that read: those a random vocabulary is trained on, and those that tokenizers are compared on."""

import html
import itertools
import random
import unicodedata
from collections.abc import Iterator

_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "grey", "orange", "purple", "brown", "pink", "dark", "striped")
_SIZES = ("small", "large", "big", "tiny", "tall", "short", "largest", "smallest", "middle", "second", "third", "leftmost")
_THINGS = (
    *("man", "woman", "child", "boy", "girl", "person", "player", "dog", "cat", "horse", "bird", "cow", "sheep", "elephant"),
    *("car", "bus", "truck", "train", "bicycle", "boat", "plane", "table", "chair", "bench", "couch", "bed", "umbrella", "bag"),
    *("cup", "bottle", "bowl", "plate", "pizza", "cake", "sandwich", "banana", "apple", "circle", "square", "triangle", "star"),
    *("ring", "cross", "shirt", "jacket", "hat", "glasses", "laptop", "keyboard", "book", "clock", "vase", "window", "door"),
)
_RELATIONS = (
    *("left of", "right of", "above", "below", "next to", "behind", "in front of", "under", "on top of", "between", "holding"),
    *("wearing", "closest to", "touching", "facing"),
)
_PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle", "in the corner", "in the background")
_ELSEWHERE = (
    "der kleine rote Kreis über dem größten Würfel; weiße Straße, Ärger, Öl",
    "le deuxième garçon à côté de la fenêtre, déjà vu, cœur naïf",
    "la niña pequeña del vestido rojo, mañana, ¿dónde está?",
    "żółta łódź przy brzegu, święto, źródło",
    "маленький красный круг слева от большого дома",
    "ο μικρός κόκκινος κύκλος αριστερά, Σίσυφος",
    "الدائرة الحمراء الصغيرة على اليسار",
    "העיגול האדום הקטן משמאל",
    "बाईं ओर छोटा लाल वृत्त १२३",
    "วงกลมสีแดงเล็กทางด้านซ้าย",
    "左边的小红色圆圈 漢字",
    "左側の小さな赤い円 カタカナ ｶﾅ",
    "왼쪽에 있는 작은 빨간 원",
    "İstanbul'da küçük kırmızı daire, ığdır",
    "vòng tròn nhỏ màu đỏ bên trái",
)
_TROUBLE = (
    *("🙂 the smiling face", "👩‍👩‍👧‍👦 family", "🇩🇪 flag", "a ❤️ heart", "♥♦♣♠"),
    *("the &lt;b&gt;bold&lt;/b&gt; &amp; the &#233;", "&nbsp;&quot;quoted&quot;", "<a href='x'>link</a>"),
    *("e\u0301 and \u00e9", "cafe\u0301", "\ufb01sh \u2460 \u00bd \u00b2", "\u01c5 \u1e9e \u00df", "A\u030angstro\u0308m"),
    *(
        "zero\u200bwidth soft\u00adhyphen",
        "\ufeffmark",
        "tab\tnew\nline\rreturn\x0bfeed\x0c",
        "\u2028\u2029\x85",
        "nul\x00bell\x07",
    ),
    *("\u3000wide\u2003space\u00a0", "\ue000 private", "replaced \ufffd", "\u061c\u202eright to left"),
    *("[CLS] begin [SEP] end [MASK] [PAD] [UNK]", "[sep]", "##ing", "don't-stop/it! (now?) #1 @ 50% $3.50", "...", "___", "\\n"),
    *("a", "x" * 99, "x" * 100, "x" * 101, "漢" * 60, "no" * 150, "the " * 70),
)


def grounding_phrases() -> tuple[str, ...]:
    """2,000 descriptions of things in pictures and a few lines in other languages: a corpus for a vocabulary."""
    draw = random.Random(0)  # noqa: S311 -- seeded on purpose

    def one() -> str:
        thing = f"{draw.choice(_SIZES)} {draw.choice(_COLOURS)} {draw.choice(_THINGS)}"
        other = f"{draw.choice(_COLOURS)} {draw.choice(_THINGS)}"
        return draw.choice(
            (f"the {thing}", f"{thing} {draw.choice(_PLACES)}", f"the {thing} {draw.choice(_RELATIONS)} the {other}")
        )

    return (*(one() for _ in range(2000)), *_ELSEWHERE)


def difficult_phrases() -> tuple[str, ...]:
    """1,500 strings for a comparison of tokenizers: other scripts, emoji, HTML entities, control characters, over-long ones, and
    mixtures of their words. None is empty."""
    words = [word for line in (*_ELSEWHERE, *_TROUBLE, *grounding_phrases()[:200]) for word in line.split(" ") if word]
    whole = [*_ELSEWHERE, *_TROUBLE, *(line.upper() for line in _ELSEWHERE), *_scripts()]
    draw = random.Random(1)  # noqa: S311 -- seeded on purpose
    mixed = (draw.choice((" ", "", "  ", "-")).join(draw.choices(words, k=draw.randint(1, 14))) for _ in itertools.count())
    return tuple(itertools.islice(filter(_says_something, itertools.chain(whole, mixed)), 1500))


def broken_texts() -> tuple[str, ...]:
    """400 more strings as the web has them: decoded wrongly, once or twice, with entities, curly quotes, ligatures, full-width
    letters, contractions, and special tokens of CLIP spelled out."""
    lines = [*_ELSEWHERE, *_TROUBLE[:20], *grounding_phrases()[:40]]
    wrongly = [line.encode().decode(code, "replace") for line in lines for code in ("latin-1", "cp1252", "cp437")]
    twice = [line.encode().decode("latin-1").encode().decode("latin-1") for line in lines[:20]]
    escaped = [html.escape(f"<i>{line}</i> & “{line}”") for line in lines]
    whole = [
        *(
            "I’m sure it's the dogs' & she'll've DON'T we'd",
            "‘single’ “double” ﬁne ﬂow ﬆ",
            "ＦＵＬＬ　ｗｉｄｔｈ １２３",
            "a\u0301\u0327 q\u0308",
        ),
        *("<start_of_text>", "<END_OF_TEXT> after", "x<start_of_text>y", "!!<end_of_text>!!", "<start_of_text><end_of_text>"),
        *(
            "100% of 3.14159 in 2024-01-31, 10:45",
            "snake_case and CamelCase_words __init__",
            "e-mail@host.example/path?x=1&amp;y=2",
        ),
        *("&amp;amp;lt;b&amp;gt;", "&#128512; &#x1F600;", "\x1b[31mred\x1b[0m", "tab\tnew\nline", "ſ 'ſ 'S 'T K Å", "ǅ İ ı ẞ"),
    ]
    return tuple(
        filter(_says_something, itertools.islice(itertools.chain(whole, wrongly, twice, map(html.escape, escaped), escaped), 400))
    )


def _says_something(phrase: str) -> bool:
    """Whether there is a letter, figure, mark or symbol in it."""
    return any(unicodedata.category(character)[0] in "LNPS" for character in phrase)


def _scripts() -> Iterator[str]:
    """Eight neighbours of each of many letters, from Latin to the emoji."""
    for first in (*range(0xA1, 0x180, 8), *range(0x391, 0x3C8, 8), *range(0x410, 0x450, 8), 0x531, 0x5D0, 0x627, 0x905, 0x985):
        yield "".join(map(chr, range(first, first + 8)))
    for first in (0xE01, 0x10D0, 0x1100, 0x1E00, 0x1F00, 0x2070, 0x2100, 0x2190, 0x2460, 0x3041, 0x30A1, 0x4E00, 0xAC00, 0xF900):
        yield "".join(map(chr, range(first, first + 8)))
    for first in (0xFB00, 0xFF01, 0x10330, 0x1D400, 0x1F600, 0x20000):
        yield "".join(map(chr, range(first, first + 6)))
