"""Several engines of one build are published together: under one number, all or none."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.manifest import Codebook, read_entry
from export.config import CONFIG_FILE, render_config
from export.files import write_manifest
from export.publish import publish
from export.spec import Engine, ExportError, Loaded, Reference, Staged
from tests.export.small import make_request, verified

ROLES = ("tokenize", "detokenize")
CODEBOOK = Codebook(id="0" * 64, count=1, size=16, channels=4, bits=4, grid=(2, 2))


@pytest.fixture(scope="module")
def pattern(made: tuple[Engine, Reference], loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    """A verified version, to be copied."""
    with verified(made, loaded, make_request(tmp_path_factory.mktemp("pattern"))) as staged:
        yield staged


def pair(pattern: Staged, directory: Path, **changes: dict[str, Any]) -> list[Staged]:
    """Two staged engines of one build; `changes` replace fields of the manifest of a role."""
    build = []
    for role in ROLES:
        model = directory / f"small.{role}"
        shutil.copytree(pattern.path.parent, model)
        fields = {"role": role, "roles": ROLES, "codebook": CODEBOOK} | changes.get(role, {})
        staged = Staged(model / "1", pattern.manifest.model_copy(update=fields))
        write_manifest(staged.path, staged.manifest)
        (model / CONFIG_FILE).write_text(render_config(staged.manifest))
        build.append(staged)
    return build


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def versions(repository: Path) -> dict[str, set[str]]:
    return {model.name: {path.name for path in model.iterdir()} for model in repository.iterdir()}


def test_both_come_in_under_one_number(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "repository"
    first = publish(pair(pattern, tmp_path / "one"), repository)
    assert (first.name, first.version) == ("small", 1)
    assert first.paths == tuple(repository / f"small.{role}" / "1" for role in ROLES)
    second = publish(pair(pattern, tmp_path / "two"), repository)
    assert [path.name for path in second.paths] == ["2", "2"]
    assert versions(repository) == {f"small.{role}": {CONFIG_FILE, "1", "2"} for role in ROLES}
    assert [read_entry(path).manifest.role for path in second.paths] == list(ROLES)


@pytest.mark.parametrize("lost", ROLES)
def test_a_number_that_either_has_had_is_not_used_again(tmp_path: Path, pattern: Staged, lost: str) -> None:
    repository = tmp_path / "repository"
    for turn in ("one", "two"):
        publish(pair(pattern, tmp_path / turn), repository)
    shutil.rmtree(repository / f"small.{lost}")
    assert publish(pair(pattern, tmp_path / "three"), repository).version == 3
    assert versions(repository)[f"small.{lost}"] == {CONFIG_FILE, "3"}


@pytest.mark.parametrize("existing", [0, 1], ids=["first version", "next version"])
def test_when_the_second_cannot_follow_the_first_goes_back(tmp_path: Path, pattern: Staged, existing: int) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for index in range(existing):
        publish(pair(pattern, tmp_path / f"existing{index}"), repository)
        shutil.rmtree(repository / "small.detokenize")
    (repository / "small.detokenize").write_text("a file stands here")
    before = tree(repository)
    with pytest.raises(ExportError, match="Cannot write"):
        publish(pair(pattern, tmp_path / "staging"), repository)
    assert tree(repository) == before


def test_what_either_shares_with_its_versions_cannot_change(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "repository"
    publish(pair(pattern, tmp_path / "one"), repository)
    before = tree(repository)
    with pytest.raises(ExportError, match=r"small.detokenize have inputs other.*--name"):
        publish(pair(pattern, tmp_path / "two", detokenize={"inputs": ()}), repository)
    assert tree(repository) == before


def test_both_must_be_verified(tmp_path: Path, pattern: Staged) -> None:
    with pytest.raises(ExportError, match="verified"):
        publish(pair(pattern, tmp_path / "one", detokenize={"verification": None}), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_name_is_that_of_a_classifier_or_of_a_tokenizer(tmp_path: Path, pattern: Staged) -> None:
    single = Staged(tmp_path / "single" / "small" / "1", pattern.manifest)
    shutil.copytree(pattern.path.parent, single.path.parent)
    pairs, alone = tmp_path / "pairs", tmp_path / "alone"
    publish(pair(pattern, tmp_path / "one"), pairs)
    with pytest.raises(ExportError, match=r"small.detokenize, small.tokenize\); give another --name"):
        publish([single], pairs)
    publish([single], alone)
    with pytest.raises(ExportError, match=r"other engines \(small\)"):
        publish(pair(pattern, tmp_path / "two"), alone)
