"""Checkpoints: what is around the tensors is recognised, no key is lost, and no code is run."""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export.spec import ExportError
from export.weights import load_weights, read_checkpoint
from tests.export.small import SmallNet


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return SmallNet(num_classes=5).state_dict()


def save(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_every_file_format_loads(tensors: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    network = SmallNet(num_classes=5)

    report = load_weights(network, read_checkpoint(file, network))

    assert all(torch.equal(value, tensors[key]) for key, value in network.state_dict().items())
    assert report.file == file.name
    assert report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (report.wrapper, report.prefix, report.missing, report.unexpected) == (None, None, (), ())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema", "model_ema", "state_dict_ema", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off_and_reported(
    tensors: dict[str, Tensor], tmp_path: Path, wrapper: str, prefix: str
) -> None:
    content = {wrapper: prefixed(prefix, tensors), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    network = SmallNet(num_classes=5)

    report = load_weights(network, read_checkpoint(save(content, tmp_path / "a.pth"), network))

    assert (report.wrapper, report.prefix) == (wrapper, prefix or None)
    assert torch.equal(network.head.weight, tensors["head.weight"])


def test_averaged_weights_come_first(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": SmallNet(5).state_dict(), "model_ema": {"state_dict": tensors}}
    network = SmallNet(num_classes=5)

    report = load_weights(network, read_checkpoint(save(content, tmp_path / "a.pth"), network))

    assert report.wrapper == "model_ema.state_dict"
    assert torch.equal(network.head.weight, tensors["head.weight"])


def test_a_prefix_that_is_the_networks_own_stays(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SmallNet(num_classes=5)

    network = Wrapped()
    report = load_weights(network, read_checkpoint(save(prefixed("module.model.", tensors), tmp_path / "a.pth"), network))

    assert report.prefix == "module."


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "module._orig_mod."])
def test_a_prefix_around_the_networks_own_is_taken_off(tensors: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SmallNet(num_classes=5)

    network = Wrapped()
    report = load_weights(network, read_checkpoint(save(prefixed(prefix + "model.", tensors), tmp_path / "a.pth"), network))

    assert report.prefix == prefix


def test_the_counter_of_averaging_is_left_out_and_reported(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"n_averaged": torch.tensor(7), **prefixed("module.", tensors)}
    network = SmallNet(num_classes=5)

    assert load_weights(network, read_checkpoint(save(content, tmp_path / "a.pth"), network)).unexpected == ("n_averaged",)


def test_missing_and_unexpected_keys_are_all_listed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {key: value for key, value in tensors.items() if not key.startswith("stem")} | {"extra.weight": torch.zeros(1)}
    network = SmallNet(num_classes=5)
    before = network.head.weight.clone()

    with pytest.raises(ExportError, match=r"2 missing: stem.weight, stem.bias; 1 unexpected: extra.weight"):
        load_weights(network, read_checkpoint(save(content, tmp_path / "a.pth"), network))
    assert torch.equal(network.head.weight, before)


def test_one_key_too_many_is_one_too_many(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    network = SmallNet(num_classes=5)

    with pytest.raises(ExportError, match="1 unexpected: aux"):
        load_weights(network, read_checkpoint(save(tensors | {"aux": torch.zeros(1)}, tmp_path / "a.pth"), network))


def test_batch_norm_counters_may_be_missing(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    network = SmallNet(num_classes=5)

    report = load_weights(network, read_checkpoint(save(content, tmp_path / "a.pth"), network))

    assert torch.equal(network.stem.weight, tensors["stem.weight"])
    assert report.missing == tuple(key for key in tensors if key.endswith("num_batches_tracked"))
    assert report.missing


def test_a_head_of_another_size_names_the_flag(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    network = SmallNet(num_classes=9)

    with pytest.raises(ExportError, match="has 5 classes, the network's has 9; pass --num-classes 5"):
        load_weights(network, read_checkpoint(save(tensors, tmp_path / "a.pth"), network))


def test_another_width_is_no_matter_of_classes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    network = SmallNet(num_classes=5, width=10)

    with pytest.raises(ExportError, match=r"of another shape: stem.weight \[12, 3, 4, 4\] instead of \[10, 3, 4, 4\]"):
        load_weights(network, read_checkpoint(save(tensors, tmp_path / "a.pth"), network))


class Attention(SmallNet):
    """A SmallNet with a table whose length goes with the image size, as BEiT's relative positions do."""

    def __init__(self, positions: int, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.position_table = nn.Parameter(torch.zeros(positions, 2))


class Embedded(SmallNet):
    def __init__(self, positions: int, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.position = nn.Embedding(positions, 2)


class Counted(SmallNet):
    """A network that says how many classes it has, and has another linear map that does not give them."""

    def __init__(self, outputs: int, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.num_classes = num_classes
        self.side = nn.Linear(3, outputs)


@pytest.mark.parametrize("kind", [Attention, Embedded, Counted])
def test_another_image_size_is_no_matter_of_classes(kind: Any, tmp_path: Path) -> None:
    network = kind(9)

    with pytest.raises(ExportError, match=r"of another shape: .* \[16(, \d)?\] instead of \[9(, \d)?\]"):
        load_weights(network, read_checkpoint(save(kind(16).state_dict(), tmp_path / "a.pth"), network))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ExportError, match=r"holds code \(.*mkdir\), which is never run"):
        read_checkpoint(save({"state_dict": Payload()}, tmp_path / "a.pth"), SmallNet())
    assert not (tmp_path / "code-was-run").exists()


def test_a_whole_network_in_a_pickle_is_code(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="SmallNet"):
        read_checkpoint(save(SmallNet(), tmp_path / "a.pth"), SmallNet())


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint at all")

    with pytest.raises(ExportError, match=name):
        read_checkpoint(tmp_path / name, SmallNet())


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2]])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ExportError, match="does not hold a state_dict"):
        read_checkpoint(save(content, tmp_path / "a.pth"), SmallNet())


def test_a_missing_file_and_a_foreign_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    with pytest.raises(ExportError, match="cannot be read"):
        read_checkpoint(tmp_path / "nowhere.pth", SmallNet())
    with pytest.raises(ExportError, match=r"\.safetensors"):
        read_checkpoint(tmp_path / "a.npz", SmallNet())
