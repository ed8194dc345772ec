"""Checkpoint files: reading them without running code, and fitting them to a network without losing a key."""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export.spec import ExportError, WeightsReport

_WRAPPERS = (  # averaged weights first: they are the ones that published figures are of
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
)
_PREFIXES = ("module.", "_orig_mod.", "model.")
_BOOKKEEPING = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel counts its updates in the state_dict
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, and what lay around them. `dropped` are keys that are no weights of any network."""

    file: Path
    sha256: str
    wrapper: str | None
    prefix: str | None
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()

    def report(self, missing: tuple[str, ...]) -> WeightsReport:
        return WeightsReport(self.file.name, self.sha256, self.wrapper, self.prefix, missing, unexpected=self.dropped)


@dataclass(frozen=True)
class Misfit:
    """Why tensors are not those of a network. `mismatched`: key -> (shape in the checkpoint, shape in the network).

    `heads` are the keys of the network that can be those of a classifier: a linear map or a convolution with an output per class.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    heads: frozenset[str] = frozenset()

    def head(self) -> tuple[int, int] | None:
        """The classes (in the checkpoint, in the network) when nothing but the first axis of a head's tensors differs."""
        rows = {(theirs[:1], ours[:1]) for theirs, ours in self.mismatched.values()}
        same_columns = all(theirs[1:] == ours[1:] for theirs, ours in self.mismatched.values())
        if self.missing or self.unexpected or len(rows) != 1 or not same_columns or not self.heads.issuperset(self.mismatched):
            return None
        ((theirs,), (ours,)) = rows.pop()
        return theirs, ours

    def describe(self) -> str:
        parts = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in self._kinds().items() if keys]
        return "; ".join(parts)

    def _kinds(self) -> dict[str, list[str]]:
        shapes = [f"{key} {list(theirs)} instead of {list(ours)}" for key, (theirs, ours) in self.mismatched.items()]
        return {"missing": list(self.missing), "unexpected": list(self.unexpected), "of another shape": shapes}


def read_checkpoint(file: Path, network: nn.Module) -> Checkpoint:
    """Read .safetensors, or a torch file with `weights_only=True`, and take wrappers and prefixes off.

    Prefixes that every key has are taken off as far as that makes the most keys those of `network`.

    Raises:
        ExportError: the file is missing, damaged, holds code, or holds no tensors.
    """
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"The checkpoint {file} cannot be read: {error.strerror}.") from error
    wrapper, content = _unwrap(_read(file))
    dropped = tuple(key for key in _BOOKKEEPING if key in content)
    content = {key: value for key, value in content.items() if key not in dropped}
    foreign = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if foreign or not content:
        found = f"it also holds {', '.join(foreign[:8])}" if foreign else "it is empty"
        raise ExportError(f"{file.name} does not hold a state_dict: {found}. Save `network.state_dict()`.")
    prefix, tensors = _strip(content, network.state_dict())
    return Checkpoint(file, sha256, wrapper, prefix, tensors, dropped)


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except Exception as error:
            raise ExportError(f"{file.name} is not a readable safetensors file: {error}.") from error
    if file.suffix not in _PICKLES:
        raise ExportError(f"{file.name} is not a checkpoint that is read here; give {', '.join(_PICKLES)} or .safetensors.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their plain options beside the weights
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(_refusal(file)) from error


def _refusal(file: Path) -> str:
    try:
        code = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:
        return f"{file.name} is damaged or not a torch checkpoint."
    if not code:
        return f"{file.name} is damaged or not a torch checkpoint."
    return (
        f"{file.name} holds code ({', '.join(sorted(code)[:8])}), which is never run. "
        "Save only the weights: torch.save(network.state_dict(), ...)."
    )


def _unwrap(content: Any) -> tuple[str | None, dict[str, Any]]:
    """Descend into known wrappers: the path taken, and the innermost dictionary."""
    path: list[str] = []
    while isinstance(content, Mapping):
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)
        if wrapper is None:
            break
        path.append(wrapper)
        content = content[wrapper]
    return ".".join(path) or None, dict(content) if isinstance(content, Mapping) else {}


def _strip(tensors: dict[str, Tensor], network: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Tensor]]:
    """The prefix to take off and the tensors without it; where no key is the network's, all that none of its keys has."""
    stripped = dict(_peel(tensors))
    shared = {taken: len(network.keys() & keys.keys()) for taken, keys in stripped.items()}
    best = max(stripped, key=lambda taken: shared[taken])  # of equals the first, with the least taken off
    if not shared[best]:
        foreign = (taken for taken in stripped if not any(key.startswith(taken) for key in network))
        best = max(foreign, key=len, default="")
    return best or None, stripped[best]


def _peel(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors with ever more prefixes taken off, and what was taken."""
    taken = ""
    while True:
        yield taken, tensors
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return
        taken += prefix
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}


def misfit(network: nn.Module, tensors: Mapping[str, Tensor]) -> Misfit | None:
    """What stands between `tensors` and a strict load into `network`; None when they fit."""
    own = network.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # older files lack them; inference does not read them
    missing = tuple(key for key in own if key not in tensors and key not in counters)
    unexpected = tuple(key for key in tensors if key not in own)
    mismatched = {
        key: (tuple(tensors[key].shape), tuple(value.shape))
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    }
    found = Misfit(missing, unexpected, mismatched, _heads(network))
    return found if missing or unexpected or mismatched else None


def _heads(network: nn.Module) -> frozenset[str]:
    """The keys of linear maps and convolutions with as many outputs as the network says it has classes, if it says so."""
    classes = getattr(network, "num_classes", getattr(network, "num_labels", None))
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d)
    owners = [(name, module) for name, module in network.named_modules() if isinstance(module, linear)]
    return frozenset(
        f"{name}.{key}".removeprefix(".")
        for name, module in owners
        for key in ("weight", "bias")
        if not isinstance(classes, int) or module.weight.shape[0] == classes
    )


def load_weights(network: nn.Module, checkpoint: Checkpoint) -> WeightsReport:
    """Load the checkpoint into `network`, every key.

    Raises:
        ExportError: the keys differ, all of them listed; or the head has another number of classes.
    """
    problem = misfit(network, checkpoint.tensors)
    if problem is not None:
        raise misfit_error(checkpoint, problem)
    network.load_state_dict(checkpoint.tensors, strict=False)  # strict but for the counters that `misfit` lets be missing
    return checkpoint.report(missing=tuple(key for key in network.state_dict() if key not in checkpoint.tensors))


def misfit_error(checkpoint: Checkpoint, problem: Misfit) -> ExportError:
    head = problem.head()
    if head is not None:
        return head_error(checkpoint, *head)
    return ExportError(f"{checkpoint.file.name} does not fit the network; {problem.describe()}.")


def head_error(checkpoint: Checkpoint, theirs: int, ours: int) -> ExportError:
    return ExportError(
        f"The head in {checkpoint.file.name} has {theirs} classes, the network's has {ours}; pass --num-classes {theirs}."
    )


def refuse_misfits(info: Mapping[str, Any], place: str) -> None:
    """Raise ExportError where the `output_loading_info` of a Hugging Face library tells of keys that do not fit."""
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if problems:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in problems.items())
        raise ExportError(f"The weights of {place} do not fit its network; {listed}.")
