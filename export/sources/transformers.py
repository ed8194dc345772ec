"""`transformers/PATH_OR_ID`: an image classifier or a detector of transformers, from a local directory or the hub."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.manifest import Preprocessing, Source
from export.dry_run import count_classes, measure_detector
from export.informative import informative_detector, informative_phrase_detector, informative_weights
from export.labels import choose_labels
from export.library_detector import LibraryDetector, ProposingDetector
from export.phrase_detector import PLACES, PhraseDetector
from export.preprocessing import finish, from_overrides
from export.provenance import describe_source
from export.reading import short_phrases
from export.rewrites.deformable import GATHERED_ATTENTION
from export.sources.qwen2_5_vl import MODEL_TYPE, load_chat
from export.spec import (
    Activation,
    AnyLoaded,
    ExportError,
    ExportRequest,
    Loaded,
    LoadedDetector,
    MissingToolError,
    PreprocessingOverrides,
    WeightsReport,
)
from export.weights import load_weights, read_checkpoint, refuse_misfits

_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers
_STRETCHED = ("rt_detr", "rt_detr_v2", "d_fine")  # they take a mask and never look at it
_PROPOSING = ("rt_detr",)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class Logits(nn.Module):
    """A transformers classifier as a plain network: pixels [B,3,H,W] -> logits [B,C].

    `flip` turns RGB into BGR for the processors that do so (MobileViT).
    """

    def __init__(self, classifier: nn.Module, flip: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.flip = flip

    def forward(self, pixels: Tensor) -> Tensor:
        return cast("Tensor", self.classifier(pixel_values=pixels.flip(1) if self.flip else pixels).logits)


def load(request: ExportRequest, identifier: str) -> AnyLoaded:
    """Build the network of `identifier`, a directory with `config.json` or a hub id: what its configuration is of.

    Raises:
        ExportError: neither an image classifier nor a detector; a processor that the manifest cannot express; weights that do not
            fit.
        MissingToolError: transformers is not installed.
    """
    try:
        import transformers  # noqa: PLC0415  costs seconds, and the other sources do not need it
    except ImportError as error:
        raise MissingToolError("transformers is not installed; pip install 'vitrine[export]'.") from error
    if _is_chat(transformers, identifier):
        return load_chat(transformers, request, identifier)
    config = _config(transformers, request, identifier)
    load_task: Callable[[Any, ExportRequest, str, Any], AnyLoaded] = _load_classifier
    if type(config) in transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING:
        load_task = _load_detector
    elif type(config) in transformers.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
        load_task = _load_phrase_detector
    return load_task(transformers, request, identifier, config)


def _is_chat(transformers: Any, identifier: str) -> bool:
    try:
        return bool(transformers.AutoConfig.from_pretrained(identifier).model_type == MODEL_TYPE)
    except Exception:  # whatever is wrong is told where the configuration is read with what the user says of it
        return False


def _load_classifier(transformers: Any, request: ExportRequest, identifier: str, config: Any) -> Loaded:
    preprocessing, flip = _preprocessing(transformers, identifier, request.preprocessing)
    classifier = _build(transformers.AutoModelForImageClassification, request, identifier, config)
    network = Logits(classifier, flip)
    report = None
    if request.weights == "random":
        informative_weights(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = load_weights(classifier, read_checkpoint(request.checkpoint, classifier))
    num_classes = count_classes(network, preprocessing)
    return Loaded(
        network=network.requires_grad_(False),
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, _labels(config), num_classes),
        activation=request.activation or _activation(config),
        source=_source(request, identifier, config, report),
        weights=report,
    )


def _load_detector(transformers: Any, request: ExportRequest, identifier: str, config: Any) -> LoadedDetector:
    if request.activation is not None:
        raise ExportError(f"{config.model_type} is a detector and knows its own scores; leave --activation out.")
    library = _build(transformers.AutoModelForObjectDetection, request, identifier, config)
    if request.precision != "fp32" and any(map(GATHERED_ATTENTION.matches, library.modules())):
        raise ExportError(
            f"{config.model_type} reads its maps between pixels, which half precision misplaces; leave --precision out."
        )
    content = "pixel_mask" in inspect.signature(library.forward).parameters and config.model_type not in _STRETCHED
    preprocessing = _frame(transformers, identifier, config, request.preprocessing, letterbox=content)
    frame = (preprocessing.height, preprocessing.width)
    network = (
        ProposingDetector(library, frame=frame)
        if config.model_type in _PROPOSING
        else LibraryDetector(library, content=content, frame=frame)
    )
    network.requires_grad_(False)
    report = None
    if request.weights == "random":
        measure_detector(network, preprocessing)
        informative_detector(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = load_weights(library, read_checkpoint(request.checkpoint, library))
    detection = measure_detector(network, preprocessing)
    return LoadedDetector(
        network=network,
        preprocessing=preprocessing,
        detection=detection,
        labels=choose_labels(request.labels, _labels(config), detection.classes),
        source=_source(request, identifier, config, report),
        weights=report,
    )


def _load_phrase_detector(transformers: Any, request: ExportRequest, identifier: str, config: Any) -> LoadedDetector:
    from export.clip_tokenizer import make_tokenizer, read_tokenizer, vocabulary_of  # noqa: PLC0415 -- transformers takes seconds

    if config.model_type != "owlv2":
        raise ExportError(f"{config.model_type} looks for phrases in a way that is not served; OWLv2 is.")
    if request.activation is not None or request.labels is not None or request.num_classes is not None:
        raise ExportError("OWLv2 has phrases in place of classes; leave --activation, --labels and --num-classes out.")
    if request.precision != "fp32":
        raise ExportError("OWLv2 is exported in fp32 alone; leave --precision out.")
    library = _build(transformers.AutoModelForZeroShotObjectDetection, request, identifier, config)
    vocabulary = vocabulary_of(make_tokenizer() if request.weights == "random" else read_tokenizer(identifier))
    if vocabulary.size > config.text_config.vocab_size:
        raise ExportError(f"The tokenizer has {vocabulary.size} tokens, the network knows {config.text_config.vocab_size}.")
    network = PhraseDetector(library, vocabulary)
    network.requires_grad_(False)
    network.ask(short_phrases(vocabulary, network.length, PLACES))
    # Black, below and to the right: unlike what its paper's predecessor did, and older releases of the library.
    preprocessing = _frame(transformers, identifier, config, request.preprocessing, letterbox=True)
    preprocessing = preprocessing.model_copy(update={"fill": (0, 0, 0)})
    report = None
    if request.weights == "random":
        measure_detector(network, preprocessing)
        informative_phrase_detector(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = load_weights(library, read_checkpoint(request.checkpoint, library))
    return LoadedDetector(
        network=network,
        preprocessing=preprocessing,
        detection=measure_detector(network, preprocessing),
        labels=(),
        source=_source(request, identifier, config, report),
        weights=report,
        vocabulary=vocabulary,
        text=vocabulary.text(network.length, phrases=PLACES),
    )


def _source(request: ExportRequest, identifier: str, config: Any, report: WeightsReport | None) -> Source:
    return describe_source(
        request,
        "transformers",
        config.model_type,
        arguments=request.model_args,
        checkpoint=Path(identifier).name if request.weights == "pretrained" else None,
        report=report,
    )


def _activation(config: Any) -> Activation:
    """What transformers' own pipeline makes of the logits."""
    if config.problem_type == "regression":
        raise ExportError("The model is for regression, its outputs are no probabilities; only classifiers are served.")
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def _config(transformers: Any, request: ExportRequest, identifier: str) -> Any:
    known = dict(request.model_args)
    if request.num_classes is not None:
        known["num_labels"] = request.num_classes
    try:
        config, unused = transformers.AutoConfig.from_pretrained(identifier, return_unused_kwargs=True, **known)
    except Exception as error:
        raise ExportError(
            f"{identifier!r} is neither a directory with a config.json nor a model that the hub gives (no network?): {error}"
        ) from error
    if unused:
        raise ExportError(f"The configuration of {config.model_type} has no {', '.join(unused)}.")
    return config


def _build(auto: Any, request: ExportRequest, identifier: str, config: Any) -> nn.Module:
    """The network of `config` by the automatic class of its task, with the library's weights where these are asked for."""
    try:
        if request.weights != "pretrained":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(request.seed)
                return cast("nn.Module", auto.from_config(config).eval())
        network, info = auto.from_pretrained(
            identifier, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise ExportError(f"{auto.__name__} cannot build a network of {identifier}: {error}") from error
    refuse_misfits(info, identifier)
    return cast("nn.Module", network.eval())


def _labels(config: Any) -> tuple[str, ...]:
    """`id2label` in order, unless it is the placeholder LABEL_0, LABEL_1, ..."""
    names = config.id2label or {}  # None in some configurations that were never given any
    labels = tuple(str(names[index]) for index in sorted(names))
    return () if all(label == f"LABEL_{index}" for index, label in enumerate(labels)) else labels


def _preprocessing(transformers: Any, identifier: str, overrides: PreprocessingOverrides) -> tuple[Preprocessing, bool]:
    """What the model's image processor does, and whether it flips RGB to BGR; all from the user when it has none."""
    directory = Path(identifier)
    if directory.is_dir() and not any((directory / file).exists() for file in _PROCESSOR_FILES):
        return from_overrides(overrides), False
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(identifier)
    except Exception as error:
        raise ExportError(f"The image processor of {identifier} cannot be read: {error}") from error
    return from_processor(processor, overrides), bool(getattr(processor, "do_flip_channel_order", False))


def _frame(transformers: Any, identifier: str, config: Any, overrides: PreprocessingOverrides, *, letterbox: bool) -> Preprocessing:
    """The frame of a detector: what its processor resizes to, the longer side across, or `--input-size`.

    Detectors are trained with frames of any shape, and an engine has one. Where the network masks padding, images are fitted into
    it; others see them stretched.
    """
    if Path(identifier).is_dir() and not any((Path(identifier) / file).exists() for file in _PROCESSOR_FILES):
        return from_overrides(overrides)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(identifier)
    except Exception as error:
        raise ExportError(f"The image processor of {identifier} cannot be read: {error}") from error
    size = _size(processor.size)
    height, width = overrides.input_size or (
        size.get("height") or size.get("shortest_edge"),
        size.get("width") or size.get("longest_edge"),
    )
    if height is None or width is None:
        raise ExportError(f"{type(processor).__name__} resizes by {size}, which is no frame of one size; give --input-size.")
    return finish(
        overrides,
        height=height,
        width=width,
        policy="letterbox" if letterbox else "stretch",
        resize=(height, width),
        **_normalisation(processor),
    )


def _normalisation(processor: Any) -> dict[str, Any]:
    """Mean, standard deviation, scale and interpolation of an image processor."""
    normalised, rescaled = processor.do_normalize, processor.do_rescale
    return {
        "mean": _each(processor.image_mean) if normalised else (0.0,),
        "std": _each(processor.image_std) if normalised else (1.0,),
        "scale": float(processor.rescale_factor) if rescaled else 1.0,
        "interpolation": "bilinear" if processor.resample is None else _INTERPOLATIONS[int(processor.resample)],
    }


def from_processor(processor: Any, overrides: PreprocessingOverrides) -> Preprocessing:
    """Read an image processor's attributes: size, crop, rescaling and normalisation, each as its own class applies it.

    Raises:
        ExportError: the processor does what the manifest cannot express.
    """
    for extra in ("do_pad", "rescale_offset", "include_top"):  # EfficientNet's include_top normalises a second time
        if getattr(processor, extra, False):
            raise ExportError(f"{type(processor).__name__} has {extra}, which is not served.")
    return finish(overrides, **_normalisation(processor), **_geometry(processor, overrides))


def _each(values: float | Sequence[float]) -> tuple[float, ...]:
    return (values,) if isinstance(values, float | int) else tuple(values)


def _geometry(processor: Any, overrides: PreprocessingOverrides) -> dict[str, Any]:
    """Resize policy, resized size and crop, before `--resize`."""
    if overrides.resize is not None and overrides.input_size is not None:
        return {"height": 0, "width": 0}
    name = type(processor).__name__
    size, crop = _size(processor.size), _size(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
    if not processor.do_resize:
        raise ExportError(f"{name} does not resize; give --resize and --input-size.")
    if "height" in size and "width" in size:
        size = {"height": size["height"], "width": size["width"]}
        if not crop and overrides.input_size is not None:
            size = dict(zip(("height", "width"), overrides.input_size, strict=True))
        return {"policy": "stretch", "resize": (size["height"], size["width"]), **(crop or size)}
    if "shortest_edge" in size:
        return _shortest_edge(processor, size["shortest_edge"], crop)
    raise ExportError(f"{name} resizes by {size}, which is not served; give --resize and --input-size.")


def _size(size: Any) -> dict[str, int]:
    keys = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
    found = {key: size.get(key) if isinstance(size, Mapping) else getattr(size, key, None) for key in keys}
    return {key: int(value) for key, value in found.items() if value is not None}


def _shortest_edge(processor: Any, edge: int, crop: dict[str, int]) -> dict[str, Any]:
    """The shorter side becomes `edge`, or what some classes make of it: theirs is the size after a crop."""
    name = type(processor).__name__
    if name.startswith("ConvNext"):
        if edge >= 384:
            return {"policy": "stretch", "resize": (edge, edge), "height": edge, "width": edge}
        crop, edge = {"height": edge, "width": edge}, int(edge / processor.crop_pct)
    elif name.startswith("Levit"):
        edge = int(256 / 224 * edge)
    elif name.startswith("PoolFormer") and processor.crop_pct is not None:
        edge = int(edge / processor.crop_pct)
    elif getattr(processor, "crop_pct", None) is not None:
        raise ExportError(f"{name} resizes in its own way; give --resize and --input-size.")
    if not crop:
        raise ExportError(f"{name} keeps the aspect ratio and does not crop; give --resize and --input-size.")
    return {"policy": "shortest_edge", "resize": (edge, edge), **crop}
