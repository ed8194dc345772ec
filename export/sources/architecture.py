"""`NAME`: a network of `export/architectures/NAME.py`."""

from dataclasses import replace

import torch
from torch import nn

from export import architectures
from export.dry_run import count_classes
from export.informative import informative_weights
from export.labels import choose_labels
from export.preprocessing import from_timm_config
from export.provenance import describe_source
from export.spec import ExportError, ExportRequest, Loaded, WeightsReport
from export.weights import Checkpoint, load_weights, misfit, read_checkpoint


def load(request: ExportRequest, identifier: str) -> Loaded:
    """Build the architecture with the model arguments and put the weights in that the request asks for.

    Raises:
        ExportError: no such architecture; arguments it does not take; weights that do not fit.
    """
    module = architectures.find(identifier)
    if request.weights == "pretrained":
        raise ExportError(f"{identifier} has no weights to fetch; pass --checkpoint FILE or --random-init.")
    preprocessing = from_timm_config(module.PREPROCESSING, request.preprocessing)
    arguments = {"num_classes": request.num_classes or 1000, **request.model_args}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network: nn.Module = module.make(**arguments)
    except Exception as error:
        raise ExportError(f"{identifier} cannot be built with {arguments}: {error}") from error
    report = None
    if request.weights == "random":
        informative_weights(network, preprocessing, request.seed)
    elif request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), getattr(module, "convert", None))
    num_classes = count_classes(network, preprocessing)
    return Loaded(
        network=network.requires_grad_(False),
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, (), num_classes),
        activation=request.activation or "softmax",
        source=describe_source(
            request,
            "vitrine",
            identifier,
            arguments=arguments,
            licence=getattr(module, "LICENCE", None) if report else None,
            paper=module.PAPER,
            report=report,
        ),
        weights=report,
    )


def _fit(network: nn.Module, checkpoint: Checkpoint, convert: architectures.Convert | None) -> WeightsReport:
    """Load the checkpoint as it is, or with the authors' keys renamed when it does not fit as it is."""
    problem = misfit(network, checkpoint.tensors)
    if problem is not None and problem.head() is None and convert is not None:
        checkpoint = replace(checkpoint, tensors=convert(checkpoint.tensors))
    return load_weights(network, checkpoint)
