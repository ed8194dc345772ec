"""Keys as they are made, written down and recognised."""

from hashlib import sha256
from pathlib import Path

import pytest

from app.keys import MOST_CHARACTERS, PREFIX, ApiKey, Keyring, make_key, parse_keys, read_keys

HEX = sha256(b"one").hexdigest()
OTHER = sha256(b"two").hexdigest()


def test_a_key_is_told_once_and_only_its_digest_is_kept() -> None:
    key, known = make_key("photos", rate="100/minute")
    assert key.startswith(PREFIX)
    assert len(key) == len(PREFIX) + 43, "256 bits in base64"
    assert known == ApiKey("photos", sha256(key.encode()).digest(), "client", "100/minute")
    assert key.removeprefix(PREFIX) not in str(known)
    assert make_key("photos")[0] != key
    assert Keyring([known]).find(key) == known


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (f"photos sha256:{HEX}", ApiKey("photos", bytes.fromhex(HEX))),
        (f"photos sha256:{HEX} client", ApiKey("photos", bytes.fromhex(HEX))),
        (f"ops.eu-1 sha256:{HEX} admin", ApiKey("ops.eu-1", bytes.fromhex(HEX), "admin")),
        (f"scrape sha256:{HEX} monitor 5/second", ApiKey("scrape", bytes.fromhex(HEX), "monitor", "5/second")),
        (f"  a   sha256:{HEX}  1000/5minutes # whose it is", ApiKey("a", bytes.fromhex(HEX), rate="1000/5minutes")),
    ],
)
def test_lines(line: str, key: ApiKey) -> None:
    assert parse_keys(line) == (key,)
    assert parse_keys(str(key)) == (key,)


def test_several_lines_or_one_with_commas() -> None:
    separate = parse_keys(f"# keys\n\na sha256:{HEX}\r\na sha256:{OTHER} admin\n")
    assert separate == parse_keys(f"a sha256:{HEX}, a sha256:{OTHER} admin,")
    assert [key.name for key in separate] == ["a", "a"]
    assert parse_keys("") == parse_keys("# nobody") == ()


@pytest.mark.parametrize(
    "line",
    [
        "vitrine_pasted-by-mistake",
        "photos vitrine_pasted-by-mistake",
        f"photos sha256:{HEX[:-1]}",
        f"photos sha256:{HEX.upper()}",
        f"photos sha512:{HEX}",
        f"sha256:{HEX}",
        f"two words sha256:{HEX}",
        f"{'n' * 65} sha256:{HEX}",
        f"photos sha256:{HEX} root",
        f"photos sha256:{HEX} admin client",
        f"photos sha256:{HEX} 10",
        f"photos sha256:{HEX} 0/minute",
        f"photos sha256:{HEX} 10/fortnight",
        f"photos sha256:{HEX} 10/minute 10/hour",
    ],
)
def test_what_is_no_line_is_told_by_its_number_and_not_repeated(line: str) -> None:
    with pytest.raises(ValueError, match="entry 2 is not") as caught:
        parse_keys(f"first sha256:{OTHER}\n{line}")
    assert not any(word in str(caught.value) for word in ("pasted", HEX[:-1], HEX.upper()))


def test_one_key_under_two_names_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="entry 2 is the same key"):
        parse_keys(f"a sha256:{HEX}, b sha256:{HEX}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_keys(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no text"):
        read_keys(tmp_path / "binary")


def test_only_the_whole_key_is_recognised() -> None:
    key, known = make_key("photos")
    others = [make_key(f"other-{number}")[1] for number in range(50)]
    ring = Keyring([*others, known])
    assert ring.find(key) == known
    for wrong in ("", key[:-1], key + "x", key.upper(), f" {key}", known.digest.hex(), "\udcff", "x" * (MOST_CHARACTERS + 1)):
        assert ring.find(wrong) is None
    assert Keyring(()).find(key) is None


def test_a_digest_that_only_begins_alike_is_another_key() -> None:
    key, known = make_key("photos")
    forged = ApiKey("forged", known.digest[:-1] + bytes([known.digest[-1] ^ 1]))
    assert Keyring([forged]).find(key) is None
