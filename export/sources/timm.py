"""`timm/NAME[.TAG]`: a network of timm, with timm's own data config, labels and checkpoint conversion."""

import difflib
import re
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from export.dry_run import count_classes
from export.informative import informative_weights
from export.labels import choose_labels
from export.preprocessing import from_timm_config
from export.provenance import describe_source
from export.spec import ExportError, ExportRequest, Loaded, WeightsReport
from export.weights import Checkpoint, head_error, load_weights, misfit, misfit_error, read_checkpoint

_HEAD_SIZE = re.compile(r"size mismatch for (\S+)\.weight: copying a param with shape torch\.Size\(\[(\d+)")


def load(request: ExportRequest, identifier: str) -> Loaded:
    """Build `identifier` as timm does and put the weights in that the request asks for.

    Raises:
        ExportError: no such network; arguments it does not take; weights that do not fit or cannot be fetched.
    """
    config = _config(identifier)
    pretrained = request.weights == "pretrained"
    arguments = _arguments(request, config)
    network = _create(request, identifier, arguments)
    preprocessing = from_timm_config(config, request.preprocessing)
    report = None
    if request.weights == "random":
        informative_weights(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network), identifier, arguments)
    num_classes = count_classes(network, preprocessing)
    return Loaded(
        network=network.requires_grad_(False),
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, _labels(config) if pretrained else (), num_classes),
        activation=request.activation or "softmax",
        source=describe_source(
            request,
            "timm",
            identifier.partition(".")[0],
            arguments=arguments,
            checkpoint=config.get("tag") if pretrained else None,
            licence=config.get("license") if pretrained else None,
            paper=_paper(config),
            report=report,
        ),
        weights=report,
    )


def _config(identifier: str) -> dict[str, Any]:
    """timm's pretrained config of NAME[.TAG].

    Raises:
        ExportError: timm has no such name or tag; offers the nearest.
    """
    name, _, tag = identifier.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ExportError(f"timm {timm.__version__} has no model {name!r}" + (f"; near: {', '.join(near)}." if near else "."))
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise ExportError(f"timm has no weights {tag!r} of {name}; there are: {', '.join(tags) or 'none'}.")
    found = timm.get_pretrained_cfg(identifier)
    if found is None:
        raise ExportError(f"timm has no data config of {name}, and preprocessing is never guessed; use another source for it.")
    config: dict[str, Any] = found.to_dict()
    return config


def _arguments(request: ExportRequest, config: dict[str, Any]) -> dict[str, Any]:
    """What timm's factory is called with beside the name."""
    arguments = dict(request.model_args)
    if "img_size" in arguments:
        raise ExportError("Give the image size with --input-size, not as a model argument.")
    if request.preprocessing.input_size is not None and config.get("fixed_input_size"):
        arguments["img_size"] = request.preprocessing.input_size
    if request.num_classes is not None:
        arguments["num_classes"] = request.num_classes
    classes = arguments.get("num_classes", config.get("num_classes"))
    if not classes:
        raise ExportError("These weights have no classification head; pass --num-classes with --checkpoint or --random-init.")
    if request.weights == "pretrained" and classes != config["num_classes"]:
        raise ExportError(
            f"The pretrained head has {config['num_classes']} classes; --num-classes {classes} would leave it untrained."
        )
    return arguments


def _create(request: ExportRequest, identifier: str, arguments: dict[str, Any]) -> nn.Module:
    pretrained = request.weights == "pretrained"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network: nn.Module = timm.create_model(identifier, pretrained=pretrained, **arguments)
    except Exception as error:
        if pretrained:
            raise ExportError(f"timm could not fetch the weights of {identifier} (no network?): {error}") from error
        raise ExportError(f"timm's {identifier} cannot be built with {arguments}: {error}") from error
    return network.eval()


def _fit(network: Any, checkpoint: Checkpoint, identifier: str, arguments: dict[str, Any]) -> WeightsReport:
    """Load the checkpoint as it is, or through timm's own conversion of the authors' keys when it does not fit as it is."""
    problem = misfit(network, checkpoint.tensors)
    if problem is None or problem.head() is not None:
        return load_weights(network, checkpoint)
    overlay = {"state_dict": checkpoint.tensors, "num_classes": network.num_classes, "label_offset": 0, "custom_load": False}
    try:
        # Some families are lenient by default and would leave what is missing at random.
        strict = {"pretrained": True, "pretrained_cfg_overlay": overlay, "pretrained_strict": True}
        converted = timm.create_model(identifier, **strict, **arguments)
    except Exception as error:
        sizes = dict(_HEAD_SIZE.findall(str(error)))
        classifiers = {str(network.pretrained_cfg.get("classifier"))} & sizes.keys()
        if classifiers and "Missing key" not in str(error):
            raise head_error(checkpoint, int(sizes[classifiers.pop()]), network.num_classes) from error
        raise misfit_error(checkpoint, problem) from error
    network.load_state_dict(converted.state_dict())
    return checkpoint.report(missing=())


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The class names of published weights: their own, else those of the ImageNet subset of this size."""
    names, described = config.get("label_names"), config.get("label_descriptions")
    if names:
        return tuple((described or {}).get(name, name) for name in names)
    subset = infer_imagenet_subset(config)
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else ()


def _paper(config: dict[str, Any]) -> str | None:
    papers = config.get("paper_ids")
    return papers if isinstance(papers, str) or papers is None else ", ".join(papers)
