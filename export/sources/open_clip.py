"""`open_clip/NAME[:TAG]`: a dual encoder of open_clip, with open_clip's own preprocessing, tokenizer and checkpoint conversion."""

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from app.manifest import Embedding, Preprocessing
from export.dry_run import measure_dual_encoder
from export.dual_encoder import DualEncoder
from export.informative import informative_dual_encoder
from export.labels import refuse_classes
from export.open_clip_tokenizer import read_vocabulary, simple_vocabulary, train_vocabulary
from export.phrases import grounding_phrases
from export.preprocessing import finish
from export.provenance import describe_source
from export.spec import CleanedVocabulary, ExportError, ExportRequest, LoadedDualEncoder, PreprocessingOverrides, WeightsReport
from export.vitamin import register_trunk
from export.weights import Checkpoint, load_weights, read_checkpoint


class OpenClip(DualEncoder):
    """A network of open_clip; its keys are those of open_clip behind `network.`"""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.length: int = network.context_length  # type: ignore[assignment]
        self.vocabulary: int = network.vocab_size  # type: ignore[assignment]

    @property
    def image_tower(self) -> nn.Module:
        tower: nn.Module = self.network.visual
        return tower

    @property
    def scale(self) -> float:
        return float(self.network.logit_scale.detach().double().exp())

    @property
    def bias(self) -> float | None:
        bias = getattr(self.network, "logit_bias", None)
        return None if bias is None else float(bias)

    @property
    def last_layers(self) -> tuple[nn.Linear | nn.Parameter, nn.Linear | nn.Parameter]:
        seeing, reading = self.network.visual, getattr(self.network, "text", self.network)
        return _last(seeing, "proj"), _last(reading, "text_projection")

    def image_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.encode_image(images)
        return features

    def text_features(self, input_ids: Tensor) -> Tensor:
        features: Tensor = self.network.encode_text(input_ids)
        return features


def _last(tower: nn.Module, projection: str) -> nn.Linear | nn.Parameter:
    named = getattr(tower, projection, None)
    if isinstance(named, nn.Linear | nn.Parameter):
        return named
    return [module for module in tower.modules() if isinstance(module, nn.Linear)][-1]


def load(request: ExportRequest, identifier: str) -> LoadedDualEncoder:
    """Build NAME as open_clip does and put the weights in that the request asks for; a TAG says how its weights see images.

    Model arguments replace members of open_clip's config; `vision_cfg` and `text_cfg` are dictionaries and change those that they
    name. `trunk` is a dictionary with the `widths`, `depths` and `heads` of a ViTamin of one's own.

    Raises:
        ExportError: no such network or tag; arguments it does not take; weights that do not fit or cannot be fetched.
    """
    name, _, tag = identifier.partition(":")
    config, pretrained = _configs(name, tag)
    refuse_classes(request, "A dual encoder has no classes, a request names them")
    arguments = _arguments(request, config)
    if request.weights == "pretrained" and not tag:
        raise ExportError(f"Say which weights of {name}: open_clip/{name}:TAG; there are {_tags(name)}.")
    network = _create(request, name, tag, arguments, pretrained)
    text = {**config["text_cfg"], **arguments.get("text_cfg", {})}
    preprocessing = _preprocessing(network.visual.preprocess_cfg, request.preprocessing)
    encoder = OpenClip(network).eval().requires_grad_(False)
    vocabulary = _vocabulary(request, text, encoder.length)
    dimensions = measure_dual_encoder(encoder, preprocessing, vocabulary)
    report = None
    if request.weights == "random":
        informative_dual_encoder(encoder, preprocessing, vocabulary, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = _fit(network, read_checkpoint(request.checkpoint, network))
        measure_dual_encoder(encoder, preprocessing, vocabulary)
    return LoadedDualEncoder(
        network=encoder,
        preprocessing=preprocessing,
        vocabulary=vocabulary,
        embedding=Embedding(
            dimensions=dimensions,
            scale=encoder.scale,
            bias=encoder.bias or 0.0,
            activation="softmax" if encoder.bias is None else "sigmoid",
        ),
        source=describe_source(
            request,
            "open_clip",
            name,
            arguments=request.model_args,
            checkpoint=tag if request.weights == "pretrained" else None,
            report=report,
        ),
        weights=report,
    )


def _configs(name: str, tag: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """open_clip's config of the network, and of the weights where a tag is given.

    Raises:
        ExportError: open_clip has no such name or tag; offers the nearest.
    """
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        version = open_clip.__version__
        raise ExportError(f"open_clip {version} has no model {name!r}" + (f"; near: {', '.join(near)}." if near else "."))
    pretrained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not pretrained:
        raise ExportError(f"open_clip has no weights {tag!r} of {name}; there are: {_tags(name)}.")
    return config, pretrained


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"


def _arguments(request: ExportRequest, config: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from open_clip's config, by its members."""
    given = dict(request.model_args)
    if (trunk := given.pop("trunk", None)) is not None:
        size = (request.preprocessing.input_size or (config["vision_cfg"]["image_size"],))[0]
        try:
            named = {"timm_model_name": register_trunk(**trunk, size=size)}
        except (TypeError, ValueError) as error:
            raise ExportError(f"There is no such trunk: {error}.") from error
        given["vision_cfg"] = given.get("vision_cfg", {}) | named
    return {key: _merge(config.get(key), value) for key, value in given.items()}


def _merge(before: Any, value: Any) -> Any:
    return {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _create(request: ExportRequest, name: str, tag: str, arguments: dict[str, Any], pretrained: Mapping[str, Any]) -> Any:
    size = request.preprocessing.input_size
    fetch = request.weights == "pretrained"
    if size is not None and "vision_cfg" in arguments:
        arguments["vision_cfg"] = {**arguments["vision_cfg"], "image_size": size}
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(request.seed)
            network = open_clip.create_model(
                name,
                pretrained=tag if fetch else None,
                pretrained_text=False,
                force_quick_gelu=bool(pretrained.get("quick_gelu")),  # as these weights were trained
                force_image_size=size,
                force_preprocess_cfg=merge_preprocess_dict({}, dict(pretrained)),
                **arguments,
            )
    except Exception as error:
        if fetch:
            raise ExportError(f"open_clip could not fetch the weights {tag} of {name} (no network?): {error}") from error
        raise ExportError(f"open_clip's {name} cannot be built with {arguments}: {error}") from error
    missing = [
        part for part in ("visual", "encode_image", "encode_text", "logit_scale", "vocab_size") if not hasattr(network, part)
    ]
    if missing:
        raise ExportError(f"open_clip's {name} is no dual encoder that is served: it has no {', '.join(missing)}.")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of weights that are not loaded, which the request asks for."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _preprocessing(config: Mapping[str, Any], overrides: PreprocessingOverrides) -> Preprocessing:
    """open_clip's evaluation transform: the shortest edge and the centre, or all of the image squeezed into the frame.

    Raises:
        ExportError: it pads images, or cuts a frame that is no square.
    """
    known = PreprocessCfg(**config)
    height, width = known.input_size[1:]
    if overrides.resize is None and (known.resize_mode == "longest" or (known.resize_mode == "shortest" and height != width)):
        raise ExportError(f"open_clip's resize mode {known.resize_mode!r} to {height}x{width} is not served; give --resize.")
    return finish(
        overrides,
        height=height,
        width=width,
        mean=tuple(known.mean),
        std=tuple(known.std),
        interpolation="bilinear" if known.interpolation == "bilinear" else "bicubic",
        policy="stretch" if known.resize_mode == "squash" else "shortest_edge",
        resize=(height, width),
    )


def _vocabulary(request: ExportRequest, text: Mapping[str, Any], length: int) -> CleanedVocabulary:
    """CLIP's byte pairs, or a tokenizer of transformers: that of --tokenizer, of the hub with pretrained weights, else of the
    checkpoint's directory; random weights may have one made here."""
    arguments = dict(text.get("tokenizer_kwargs") or {})
    if text.get("tokenizer_mode"):
        raise ExportError(f"Tokenizers in the mode {text['tokenizer_mode']!r} are not served.")
    if not text.get("hf_tokenizer_name"):
        if request.tokenizer is not None:
            raise ExportError("This network reads CLIP's own byte pairs, which open_clip brings along; leave --tokenizer out.")
        return simple_vocabulary(length, arguments)
    if request.tokenizer is not None:
        directory = request.tokenizer if request.tokenizer.is_dir() else request.tokenizer.parent
        return read_vocabulary(directory, length, arguments)
    if request.weights == "pretrained":
        return read_vocabulary(str(text["hf_tokenizer_name"]), length, arguments)
    if request.checkpoint is not None:
        return read_vocabulary(request.checkpoint.parent, length, arguments)
    return train_vocabulary(grounding_phrases(), length, arguments)


def _fit(network: nn.Module, checkpoint: Checkpoint) -> WeightsReport:
    """Load every key, through open_clip's conversions of other libraries' and of its own older files where they do not fit."""
    own = network.state_dict()
    tensors = convert_state_dict(network, dict(checkpoint.tensors))
    if "positional_embedding" in tensors and "positional_embedding" not in own:
        tensors = convert_to_custom_text_state_dict(tensors)
    scalars = ("logit_scale", "logit_bias")
    tensors |= {key: tensors[key].reshape(own[key].shape) for key in scalars if key in tensors and key in own}
    return load_weights(network, replace(checkpoint, tensors=tensors))
