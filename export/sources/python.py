"""`python/FILE.py:factory`: the user's own network, made by calling a function of the user's own file."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from app.manifest import Preprocessing
from export.dry_run import count_classes
from export.informative import informative_weights
from export.labels import choose_labels
from export.preprocessing import from_overrides, from_timm_config
from export.provenance import describe_source
from export.spec import ExportError, ExportRequest, Loaded
from export.weights import load_weights, read_checkpoint

_CONFIGS = ("pretrained_cfg", "default_cfg")


def load(request: ExportRequest, identifier: str) -> Loaded:
    """Import FILE.py, call `factory` with the model arguments, and put the weights in that the request asks for.

    `--pretrained` means that the factory returns the network with its trained weights. The way images are prepared comes from a
    dictionary `pretrained_cfg` or `default_cfg` (timm's format) of the network or of the file, or from the flags.

    Raises:
        ExportError: the file or the factory fails; no network comes out; nothing says how images are prepared.
    """
    file, factory = _locate(identifier)
    module = _import(file)
    network = _make(getattr(module, factory, None), identifier, request)
    preprocessing = _preprocessing((network, module), request)
    report = None
    if request.weights == "random":
        informative_weights(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = load_weights(network, read_checkpoint(request.checkpoint, network))
    num_classes = count_classes(network, preprocessing)
    if request.num_classes not in (None, num_classes):
        raise ExportError(f"{identifier} makes a network of {num_classes} classes, not of {request.num_classes}.")
    return Loaded(
        network=network.requires_grad_(False),
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, (), num_classes),
        activation=request.activation or "softmax",
        source=describe_source(request, "python", f"{file.name}:{factory}", arguments=request.model_args, report=report),
        weights=report,
    )


def _locate(identifier: str) -> tuple[Path, str]:
    path, _, factory = identifier.rpartition(":")
    if not path or not factory.isidentifier():
        raise ExportError("Write python/FILE.py:factory, with the name of the function that makes the network.")
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"There is no file {file}.")
    return file.resolve(), factory


def _import(file: Path) -> ModuleType:
    """Run the file as a module of its own; its directory is importable meanwhile."""
    name = f"vitrine_source_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ExportError(f"{file.name} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ExportError(f"{file.name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _make(factory: Callable[..., Any] | None, identifier: str, request: ExportRequest) -> nn.Module:
    if not callable(factory):
        raise ExportError(f"There is no such function in {identifier}.")
    arguments = dict(request.model_args)
    if request.num_classes is not None and "num_classes" in inspect.signature(factory).parameters:
        arguments["num_classes"] = request.num_classes
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network = factory(**arguments)
    except Exception as error:
        raise ExportError(f"{identifier} called with {arguments} fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ExportError(f"{identifier} gives a {type(network).__name__}, not a torch.nn.Module.")
    return network.eval()


def _preprocessing(owners: tuple[object, ...], request: ExportRequest) -> Preprocessing:
    found = (getattr(owner, name, None) for owner in owners for name in _CONFIGS)
    config = next((config for config in found if isinstance(config, Mapping) and "input_size" in config), None)
    if config is None:
        return from_overrides(request.preprocessing)
    missing = [key for key in ("mean", "std") if key not in config]
    if missing:
        raise ExportError(f"The network's pretrained_cfg has input_size but no {' and no '.join(missing)}.")
    return from_timm_config(config, request.preprocessing)
