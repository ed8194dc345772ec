import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.manifest import check_hashes, read_entry
from export import pipeline
from export.config import CONFIG_FILE
from export.files import write_manifest
from export.publish import publish
from export.spec import Engine, ExportError, Loaded, Reference, Staged
from export.stage import stage
from export.verify import verify_classifier
from tests.export.small import make_request, verified

Made = tuple[Engine, Reference]

PUBLISHER = """
import sys, time
from pathlib import Path
from app.manifest import read_entry
from export.publish import publish
from export.spec import Staged

repository, gate, *staged = map(Path, sys.argv[1:])
ready = [Staged(path, read_entry(path).manifest) for path in staged]
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.01)
start = gate.stat().st_mtime + 0.1
for turn, one in enumerate(ready):
    while time.time() < start + 0.02 * turn:
        pass
    print(publish([one], repository).version, flush=True)
"""


@pytest.fixture(scope="module")
def pattern(made: Made, loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    """A verified version, to be copied."""
    with verified(made, loaded, make_request(tmp_path_factory.mktemp("pattern"))) as staged:
        yield staged


def copy(pattern: Staged, directory: Path, **changes: Any) -> Staged:
    """A staged version like `pattern` in `directory`; `changes` replace fields of its manifest."""
    model = directory / "small"
    shutil.copytree(pattern.path.parent, model)
    staged = Staged(model / "1", pattern.manifest.model_copy(update=changes))
    write_manifest(staged.path, staged.manifest)
    return staged


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_the_first_version_brings_its_model_directory(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "deep" / "repository"
    published = publish([copy(pattern, tmp_path / "staging")], repository)
    assert (published.name, published.version, published.path) == ("small", 1, repository / "small" / "1")
    check_hashes(read_entry(published.path))
    assert (repository / "small" / CONFIG_FILE).read_text() == (pattern.path.parent / CONFIG_FILE).read_text()
    assert not list((tmp_path / "staging").iterdir())


def test_later_versions_take_the_next_number(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "repository"
    versions = [publish([copy(pattern, tmp_path / str(i))], repository).version for i in range(3)]
    shutil.rmtree(repository / "small" / "1")
    versions.append(publish([copy(pattern, tmp_path / "again")], repository).version)
    assert versions == [1, 2, 3, 4]
    assert {path.name for path in repository.iterdir()} == {"small"}
    assert {path.name for path in (repository / "small").iterdir()} == {CONFIG_FILE, "2", "3", "4"}


def test_an_old_configuration_is_rendered_again(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "repository"
    publish([copy(pattern, tmp_path / "one")], repository)
    config = repository / "small" / CONFIG_FILE
    expected = config.read_text()
    config.write_text("name: 'edited'")
    publish([copy(pattern, tmp_path / "two")], repository)
    assert config.read_text() == expected


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"outputs": ({"name": "probabilities", "dtype": "float32", "shape": (-1, 9)},)}, "outputs"),
        ({"inputs": ({"name": "image", "dtype": "uint8", "shape": (-1, 64, 64, 3)},)}, "inputs"),
        ({"inputs": ({"name": "pixels", "dtype": "uint8", "shape": (-1, 32, 32, 3)},)}, "inputs"),
        ({"engine": {"max_batch": 16}}, "--max-batch"),
        ({"engine": {"kind": "tensorrt"}}, "an engine"),
    ],
    ids=["classes", "size", "tensor name", "maximum batch", "engine kind"],
)
def test_what_versions_share_cannot_change(tmp_path: Path, pattern: Staged, changes: dict[str, Any], why: str) -> None:
    repository = tmp_path / "repository"
    publish([copy(pattern, tmp_path / "one")], repository)
    before = tree(repository)
    document = pattern.manifest.model_dump()
    fields = {name: document[name] | new if isinstance(new, dict) else new for name, new in changes.items()}
    changed = type(pattern.manifest).model_validate(document | fields)
    with pytest.raises(ExportError, match=rf"{why}.*--name"):
        publish([copy(pattern, tmp_path / "two", **{name: getattr(changed, name) for name in changes})], repository)
    assert tree(repository) == before


def test_a_foreign_model_of_that_name_is_left_alone(tmp_path: Path, pattern: Staged) -> None:
    foreign = tmp_path / "repository" / "small" / "1"
    foreign.mkdir(parents=True)
    (foreign / "model.py").write_text("# theirs")
    before = tree(tmp_path / "repository")
    with pytest.raises(ExportError, match="without a readable manifest"):
        publish([copy(pattern, tmp_path / "staging")], tmp_path / "repository")
    assert tree(tmp_path / "repository") == before


def test_a_broken_version_does_not_block_the_next(tmp_path: Path, pattern: Staged) -> None:
    repository = tmp_path / "repository"
    publish([copy(pattern, tmp_path / "one")], repository)
    broken = publish([copy(pattern, tmp_path / "two")], repository)
    (broken.path / "manifest.json").write_text("{")
    assert publish([copy(pattern, tmp_path / "three")], repository).version == 3


@pytest.mark.parametrize("verdict", ["none", "failed"])
def test_only_what_was_verified_is_published(tmp_path: Path, pattern: Staged, verdict: str) -> None:
    verification = pattern.manifest.verification
    assert verification is not None
    bad = verification.checks[0].model_copy(update={"passed": False})
    failed = verification.model_copy(update={"checks": (bad, *verification.checks[1:])})
    staged = copy(pattern, tmp_path / "staging", verification=None if verdict == "none" else failed)
    with pytest.raises(ExportError, match="verified"):
        publish([staged], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("existing", [0, 1], ids=["first version", "next version"])
def test_processes_that_publish_at_once_each_get_their_own_version(tmp_path: Path, pattern: Staged, existing: int) -> None:
    repository, gate, each = tmp_path / "repository", tmp_path / "gate", 8
    for index in range(existing):
        publish([copy(pattern, tmp_path / f"existing{index}")], repository)
    staged = [[copy(pattern, tmp_path / f"{who}-{i}", build=f"{who}-{i}").path for i in range(each)] for who in "ab"]
    command = [sys.executable, "-c", PUBLISHER, repository, gate]
    processes = [subprocess.Popen([*command, *paths], stdout=subprocess.PIPE, text=True) for paths in staged]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        gate.touch()
        taken = [[int(line) for line in process.communicate(timeout=60)[0].split()] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(taken[0] + taken[1]) == list(range(existing + 1, existing + 2 * each + 1))
    entries = [read_entry(repository / "small" / str(number)) for numbers in taken for number in numbers]
    assert [entry.manifest.build for entry in entries] == [f"{who}-{i}" for who in "ab" for i in range(each)]
    assert {path.name for path in repository.iterdir()} == {"small"}


@pytest.mark.parametrize("existing", [0, 1], ids=["first version", "next version"])
def test_a_number_that_another_takes_meanwhile_is_not_taken_again(
    tmp_path: Path, pattern: Staged, monkeypatch: pytest.MonkeyPatch, existing: int
) -> None:
    """The other comes between the look at the repository and the rename."""
    repository = tmp_path / "repository"
    model = repository / "small"
    for index in range(existing):
        publish([copy(pattern, tmp_path / f"existing{index}")], repository)
    others = copy(pattern, tmp_path / "other", build="other")
    rename = Path.rename

    def late(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        publish([others], repository)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", late)
    mine = publish([copy(pattern, tmp_path / "mine", build="mine")], repository)
    assert mine.version == existing + 2
    assert [read_entry(model / str(existing + number)).manifest.build for number in (1, 2)] == ["other", "mine"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_staging_leaves_nothing(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with files_of_at_most(4096), pytest.raises(ExportError, match="Cannot write"), stage([made[0]], loaded, make_request(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_verifying_leaves_nothing(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with (
        stage([made[0]], loaded, make_request(tmp_path)) as (staged,),
        files_of_at_most(100),
        pytest.raises(ExportError, match="Cannot write"),
    ):
        verify_classifier(staged, made[1])
    assert not list(tmp_path.iterdir())


def test_a_repository_that_cannot_be_written_is_a_clear_error(tmp_path: Path, pattern: Staged) -> None:
    (tmp_path / "repository").write_text("a file stands here")
    with pytest.raises(ExportError, match="Cannot write"):
        publish([copy(pattern, tmp_path / "staging")], tmp_path / "repository")


def test_the_whole_way_leaves_only_the_model(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    request = make_request(tmp_path)
    with verified(made, loaded, request) as staged:
        publish([staged], request.repository)
    with verified(made, loaded, replace(request, description="again")) as staged:
        assert publish([staged], request.repository).version == 2
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_a_full_disk_while_exporting_is_a_clear_error(tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.pipeline.load", lambda request: loaded)
    with files_of_at_most(4096), pytest.raises(ExportError, match="Cannot write"):
        pipeline.export(make_request(tmp_path), lambda stage: None)
    assert not list(tmp_path.iterdir())
