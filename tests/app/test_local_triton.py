"""How the local Triton is found and called; the server itself is in tests/integration/test_triton.py."""

from pathlib import Path

import pytest

from app.local_triton import LocalTriton, LocalTritonError, Ports, command, environment, find, free_ports, run


def test_without_one_the_error_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(LocalTritonError, match=r"make \.triton"):
        find(tmp_path)
    with pytest.raises(LocalTritonError, match=r"make \.triton"):
        run(tmp_path, 1, 2, 3, home=tmp_path / ".triton")


def test_a_built_one_is_found_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".triton").mkdir()
    (tmp_path / ".triton" / "ready").touch()
    monkeypatch.chdir(tmp_path)
    assert find(Path(".triton")) == tmp_path / ".triton"


def test_the_command_serves_this_machine_alone(tmp_path: Path) -> None:
    line = command(tmp_path, tmp_path / "models", Ports(1, 2, 3), "prefix")
    assert line[0] == f"{tmp_path}/server/bin/tritonserver"
    assert f"--model-repository={tmp_path}/models" in line
    for front, port in (("http", 1), ("grpc", 2), ("metrics", 3)):
        assert {f"--{front}-address=127.0.0.1", f"--{front}-port={port}"} <= set(line)


def test_the_server_sees_no_other_python(tmp_path: Path) -> None:
    inherited = {"PATH": "/bin", "PYTHONPATH": "/elsewhere", "VIRTUAL_ENV": "/other", "HOME": "/home/me"}
    made = environment(tmp_path, inherited)
    assert made["PATH"] == f"{tmp_path}/venv/bin:/bin"
    assert made["LD_LIBRARY_PATH"] == f"{tmp_path}/lib"
    assert made["HOME"] == "/home/me"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & made.keys()


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LocalTritonError, match="no model repository"):
        LocalTriton(tmp_path / "nowhere", Ports(), tmp_path)


def test_free_ports_differ() -> None:
    ports = free_ports()
    assert len({ports.http, ports.grpc, ports.metrics}) == 3
