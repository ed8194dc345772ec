"""`NAME`: a network of `export/architectures/NAME.py`."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
from torch import nn

from app.manifest import Preprocessing, Source
from export import architectures
from export.detector import Detector
from export.dry_run import check_grounder, count_classes, measure_codebook, measure_detector
from export.grounder import Grounder
from export.informative import informative_detector, informative_grounder, informative_tokenizer, informative_weights
from export.labels import choose_labels, refuse_classes
from export.phrases import grounding_phrases
from export.preprocessing import from_timm_config
from export.provenance import describe_source
from export.spec import (
    AnyLoaded,
    ExportError,
    ExportRequest,
    Loaded,
    LoadedDetector,
    LoadedGrounder,
    LoadedTokenizer,
    Vocabulary,
    WeightsReport,
)
from export.tokenizer import Tokenizer
from export.weights import Checkpoint, load_weights, misfit, read_checkpoint


def load(request: ExportRequest, identifier: str) -> AnyLoaded:
    """Build the architecture with the model arguments and put the weights in that the request asks for.

    Raises:
        ExportError: no such architecture; arguments it does not take, or options its task does not have; weights that do not fit.
    """
    module = architectures.find(identifier)
    if request.weights == "pretrained":
        raise ExportError(f"{identifier} has no weights to fetch; pass --checkpoint FILE or --random-init.")
    preprocessing = from_timm_config(module.PREPROCESSING, request.preprocessing)
    return _LOADERS[architectures.task_of(module)](request, identifier, module, preprocessing)


def _load_classifier(request: ExportRequest, identifier: str, module: ModuleType, preprocessing: Preprocessing) -> Loaded:
    arguments = {"num_classes": request.num_classes or 1000, **request.model_args}
    network = _make(request, identifier, module, arguments)
    report = None
    if request.weights == "random":
        informative_weights(network, preprocessing, request.seed)
    elif request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), module)
    num_classes = count_classes(network, preprocessing)
    return Loaded(
        network=network.requires_grad_(False),
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, (), num_classes),
        activation=request.activation or "softmax",
        source=_source(request, identifier, module, arguments, report),
        weights=report,
    )


def _load_tokenizer(request: ExportRequest, identifier: str, module: ModuleType, preprocessing: Preprocessing) -> LoadedTokenizer:
    refuse_classes(request, f"{identifier} is a tokenizer and has no classes")
    network = _make(request, identifier, module, request.model_args)
    if not isinstance(network, Tokenizer):
        raise ExportError(f"{identifier} does not make a Tokenizer, although its TASK is tokenize.")
    network.requires_grad_(False)
    report = None
    if request.weights == "random":
        measure_codebook(network, preprocessing)  # says what does not fit before weights are spent on it
        informative_tokenizer(network, preprocessing, request.seed)
    elif request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), module)
    return LoadedTokenizer(
        network=network,
        preprocessing=preprocessing,
        codebook=measure_codebook(network, preprocessing),
        source=_source(request, identifier, module, request.model_args, report),
        weights=report,
    )


def _load_detector(request: ExportRequest, identifier: str, module: ModuleType, preprocessing: Preprocessing) -> LoadedDetector:
    if request.activation is not None:
        raise ExportError(f"{identifier} is a detector and knows its own scores; leave --activation out.")
    arguments = request.model_args | ({} if request.num_classes is None else {"classes": request.num_classes})
    network = _make(request, identifier, module, arguments)
    if not isinstance(network, Detector):
        raise ExportError(f"{identifier} does not make a Detector, although its TASK is detect.")
    network.requires_grad_(False)
    report = None
    if request.weights == "random":
        measure_detector(network, preprocessing)  # says what does not fit before weights are spent on it
        informative_detector(network, preprocessing, request.seed)
    elif request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), module)
    detection = measure_detector(network, preprocessing)
    return LoadedDetector(
        network=network,
        preprocessing=preprocessing,
        detection=detection,
        labels=choose_labels(request.labels, (), detection.classes),
        source=_source(request, identifier, module, arguments, report),
        weights=report,
    )


def _load_grounder(request: ExportRequest, identifier: str, module: ModuleType, preprocessing: Preprocessing) -> LoadedGrounder:
    refuse_classes(request, f"{identifier} finds what a phrase describes and has no classes")
    network = _make(request, identifier, module, request.model_args)
    if not isinstance(network, Grounder):
        raise ExportError(f"{identifier} does not make a Grounder, although its TASK is ground.")
    network.requires_grad_(False)
    vocabulary = _vocabulary(request, network)
    check_grounder(network, preprocessing, vocabulary)
    report = None
    if request.weights == "random":
        informative_grounder(network, preprocessing, vocabulary, request.seed)
    elif request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), module)
        check_grounder(network, preprocessing, vocabulary)
    return LoadedGrounder(
        network=network,
        preprocessing=preprocessing,
        vocabulary=vocabulary,
        long_phrases=request.long_phrases or "refuse",
        source=_source(request, identifier, module, request.model_args, report),
        weights=report,
    )


def _vocabulary(request: ExportRequest, network: Grounder) -> Vocabulary:
    """That of --tokenizer, else of the checkpoint's directory; random weights may have one trained here."""
    from export.bert_tokenizer import read_tokenizer, train_tokenizer, vocabulary_of  # noqa: PLC0415 -- transformers takes seconds

    if request.tokenizer is not None:
        return vocabulary_of(read_tokenizer(request.tokenizer))
    if request.checkpoint is not None:
        return vocabulary_of(read_tokenizer(request.checkpoint.parent))
    return vocabulary_of(train_tokenizer(grounding_phrases(), min(2000, network.vocabulary)))


_LOADERS: dict[str, Callable[[ExportRequest, str, ModuleType, Preprocessing], AnyLoaded]] = {
    "classify": _load_classifier,
    "tokenize": _load_tokenizer,
    "detect": _load_detector,
    "ground": _load_grounder,
}


def _make(request: ExportRequest, identifier: str, module: ModuleType, arguments: dict[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network: nn.Module = module.make(**arguments)
    except Exception as error:
        raise ExportError(f"{identifier} cannot be built with {arguments}: {error}") from error
    return network


def _source(
    request: ExportRequest, identifier: str, module: ModuleType, arguments: dict[str, Any], report: WeightsReport | None
) -> Source:
    return describe_source(
        request,
        "vitrine",
        identifier,
        arguments=arguments,
        licence=getattr(module, "LICENCE", None) if report else None,
        paper=module.PAPER,
        report=report,
    )


def _fit(network: nn.Module, checkpoint: Checkpoint, module: ModuleType) -> WeightsReport:
    """Load the checkpoint without what only training needs, as it is or with the authors' keys renamed when it does not fit."""
    checkpoint = _without(checkpoint, getattr(module, "TRAINING_ONLY", ()))
    convert: architectures.Convert | None = getattr(module, "convert", None)
    problem = misfit(network, checkpoint.tensors)
    if problem is not None and problem.head() is None and convert is not None:
        checkpoint = replace(checkpoint, tensors=convert(checkpoint.tensors))
    return load_weights(network, checkpoint)


def _without(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> Checkpoint:
    """The checkpoint less the keys that match; the patterns that matched are reported in their place."""
    matches = {pattern: {key for key in checkpoint.tensors if fnmatchcase(key, pattern)} for pattern in patterns}
    left_out = set[str]().union(*matches.values())
    tensors = {key: value for key, value in checkpoint.tensors.items() if key not in left_out}
    found = tuple(pattern for pattern, keys in matches.items() if keys)
    return replace(checkpoint, tensors=tensors, dropped=(*checkpoint.dropped, *found))
