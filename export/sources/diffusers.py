"""`diffusers/PATH_OR_ID[:FOLDER]`: a `VQModel` of diffusers as a tokenizer, from a local directory or the hub."""

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.dry_run import measure_codebook
from export.informative import informative_tokenizer
from export.labels import refuse_classes
from export.preprocessing import from_timm_config
from export.provenance import describe_source
from export.spec import ExportError, ExportRequest, LoadedTokenizer, MissingToolError
from export.tokenizer import Tokenizer
from export.weights import load_weights, read_checkpoint, refuse_misfits

_CENTRED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # -1 to 1
_PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # 0 to 1, as aMUSEd's pipelines see images


class VQModel(Tokenizer):
    """diffusers' `VQModel`; its keys are those of the library behind `network.`"""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.spatial = network.config.norm_type == "spatial"  # MoVQ: the decoder's norms look at the codes

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.network.quant_conv(self.network.encoder(images))
        return latents.unsqueeze(1)

    def codebooks(self) -> Tensor:
        codes: Tensor = self.network.quantize.embedding.weight
        return codes.unsqueeze(0)

    def decode(self, codes: Tensor) -> Tensor:
        codes = codes.squeeze(1)
        images: Tensor = self.network.decoder(self.network.post_quant_conv(codes), codes if self.spatial else None)
        return images

    @torch.no_grad()
    def set_codebooks(self, codes: Tensor) -> None:
        self.network.quantize.embedding.weight.copy_(codes[0])


def load(request: ExportRequest, identifier: str) -> LoadedTokenizer:
    """Build the network of a directory with `config.json` or of a hub id; FOLDER is where a pipeline keeps it ("vqvae", "movq").

    Images are seen from -1 to 1 (aMUSEd's, whose codes are looked up by index, from 0 to 1), the shorter side resized to the
    configuration's `sample_size` or `--input-size`, the centre cut.

    Raises:
        ExportError: no `VQModel` there, or one not of RGB; no image size; arguments it does not take; weights that do not fit.
        MissingToolError: diffusers is not installed.
    """
    try:
        from diffusers import VQModel as Library  # noqa: PLC0415  costs seconds, and the other sources do not need it
    except ImportError as error:
        raise MissingToolError("diffusers is not installed; pip install 'vitrine[export]'.") from error
    refuse_classes(request, "A tokenizer has no classes")
    place, _, folder = (identifier, "", "") if Path(identifier).is_dir() else identifier.partition(":")
    config = _config(Library, request, place, folder)
    size = request.preprocessing.input_size or 2 * (_sample_size(Library, request, config),)
    pixels = _PLAIN if config.get("lookup_from_codebook") else _CENTRED
    resize = {"input_size": (3, *size), "interpolation": "bicubic", "crop_pct": 1.0}
    preprocessing = from_timm_config(pixels | resize, request.preprocessing)
    library = _build(Library, request, place, folder, config)
    network = VQModel(library).eval().requires_grad_(False)
    report = None
    if request.weights == "random":
        measure_codebook(network, preprocessing)
        informative_tokenizer(network, preprocessing, request.seed)
    elif request.weights == "checkpoint" and request.checkpoint is not None:
        report = load_weights(library, read_checkpoint(request.checkpoint, library))
    return LoadedTokenizer(
        network=network,
        preprocessing=preprocessing,
        codebook=measure_codebook(network, preprocessing),
        source=describe_source(
            request,
            "diffusers",
            "VQModel",
            arguments=request.model_args,
            checkpoint=identifier.rstrip("/").rpartition("/")[2] if request.weights == "pretrained" else None,
            report=report,
        ),
        weights=report,
    )


def _config(library: Any, request: ExportRequest, place: str, folder: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(library.load_config(place, subfolder=folder or None))
    except Exception as error:
        hint = "" if folder else f"; a pipeline keeps its tokenizer in a folder: diffusers/{place}:vqvae"
        raise ExportError(
            f"{place!r}{f' with a folder {folder!r}' if folder else ''} is neither a directory with a config.json nor a model that "
            f"the hub gives (no network?){hint}. {error}"
        ) from error
    if config.get("_class_name") != "VQModel":
        raise ExportError(f"{place} is of {config.get('_class_name')}; of diffusers only VQModel gives tokens.")
    config |= request.model_args
    unknown = request.model_args.keys() - inspect.signature(library).parameters.keys()
    if unknown:
        raise ExportError(f"The configuration of VQModel has no {', '.join(sorted(unknown))}.")
    if config.get("in_channels", 3) != 3 or config.get("out_channels", 3) != 3:
        raise ExportError("This VQModel is not of RGB images; only these are served.")
    return config


def _sample_size(library: Any, request: ExportRequest, config: dict[str, Any]) -> int:
    default = inspect.signature(library).parameters["sample_size"].default
    size = config.get("sample_size")
    unsaid = size == default and "sample_size" not in request.model_args  # the library writes its default into every file
    if unsaid or not isinstance(size, int) or size < 1:
        raise ExportError("The configuration of this VQModel does not say the size of its images; give --input-size (often 256).")
    return size


def _build(library: Any, request: ExportRequest, place: str, folder: str, config: dict[str, Any]) -> nn.Module:
    """The network, with the library's weights where these are asked for."""
    try:
        if request.weights != "pretrained":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(request.seed)
                return cast("nn.Module", library.from_config(config))
        network, info = library.from_pretrained(
            place,
            subfolder=folder or None,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            **request.model_args,
        )
    except Exception as error:
        raise ExportError(f"diffusers cannot build the VQModel of {place}: {error}") from error
    refuse_misfits(info, place)
    return cast("nn.Module", network)
