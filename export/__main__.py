"""The command line: `python -m export timm/convnext_atto.d2_in1k --pretrained`. Exit codes are those of `export/spec.py`.

`python -m export eval MODEL` is a command of its own, in `export/evaluate`.
"""

import ast
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from app.manifest import NAME_PATTERN, Interpolation
from export import detect_options as detect

if TYPE_CHECKING:
    from export.spec import ExportRequest

_EPILOG = (
    "Exit codes: 0 published, 1 cannot be exported, 2 wrong usage or a tool is missing, 3 verification failed. "
    "`python -m export eval --help`: measure a published model on your own data."
)
_SOURCE = (
    "timm/NAME[.TAG], transformers/PATH_OR_ID, open_clip/NAME[:TAG], diffusers/PATH_OR_ID[:FOLDER], python/FILE.py:factory, "
    "onnx/FILE, or a NAME of export/architectures."
)

_WEIGHTS = "Weights (say which)"
_NETWORK = "Network"
_PICTURE = "Preprocessing (instead of what the library says)"
_ONNX = "For onnx/FILE"
_ENGINE = "Engine"
_ENTRY = "Entry"


def _file(panel: str, text: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, help=text, rich_help_panel=panel, show_default=False)


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def main(  # noqa: PLR0917 -- typer reads the options from the parameters
    source: Annotated[str, typer.Argument(help=_SOURCE, metavar="SOURCE", show_default=False)],
    pretrained: Annotated[bool, _option(_WEIGHTS, "The library's own, from its hub.", "--pretrained")] = False,
    checkpoint: Annotated[Path | None, _file(_WEIGHTS, "A .pth, .pt or .safetensors file.")] = None,
    random_init: Annotated[bool, _option(_WEIGHTS, "Random ones, for trying things out.", "--random-init")] = False,
    num_classes: Annotated[int | None, _option(_NETWORK, "Classes of the head.", min=1)] = None,
    labels: Annotated[Path | None, _file(_NETWORK, "Names of the classes, a line each.")] = None,
    tokenizer: Annotated[
        Path | None,
        _option(
            _NETWORK, "Of phrases: tokenizer.json, vocab.txt or their directory.", exists=True, show_default="beside the checkpoint"
        ),
    ] = None,
    long_phrases: Annotated[
        Literal["refuse", "truncate"] | None, _option(_NETWORK, "Phrases of too many tokens.", show_default="refuse")
    ] = None,
    model_arg: Annotated[
        list[str] | None, _option(_NETWORK, "An argument of the network's constructor; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    activation: Annotated[
        Literal["softmax", "sigmoid"] | None,
        _option(_NETWORK, "sigmoid where several classes hold at once.", show_default="what the source says, else softmax"),
    ] = None,
    input_size: Annotated[str | None, _option(_PICTURE, "What the network sees.", metavar="N|HxW")] = None,
    resize: Annotated[
        str | None, _option(_PICTURE, "N: shortest edge; HxW: stretch. The centre is cut out.", metavar="N|HxW")
    ] = None,
    interpolation: Annotated[Interpolation | None, _option(_PICTURE, "How pixels are resized.")] = None,
    mean: Annotated[str | None, _option(_PICTURE, "Subtracted after scaling.", metavar="R,G,B")] = None,
    std: Annotated[str | None, _option(_PICTURE, "Divided by at last.", metavar="R,G,B")] = None,
    scale: Annotated[float | None, _option(_PICTURE, "Pixels are multiplied by it.", show_default="1/255")] = None,
    layout: Annotated[Literal["NCHW", "NHWC"] | None, _option(_ONNX, "Axes of its input.", show_default="NCHW")] = None,
    colour: Annotated[
        Literal["RGB", "BGR"] | None,
        _option(_ONNX, "Order of its channels.", "--colour", "--color", show_default="RGB, of yolox BGR"),
    ] = None,
    output: Annotated[
        Literal["logits", "probabilities"] | None,
        _option(_ONNX, "What its scores are.", show_default="logits, or as --head has it"),
    ] = None,
    input_name: Annotated[str | None, _option(_ONNX, "Its image input, where there are several.")] = None,
    output_name: Annotated[
        str | None, _option(_ONNX, "Its output, where there are several; a detector's of several levels with commas.")
    ] = None,
    task: detect.TaskFlag = "classify",
    head: detect.HeadFlag = None,
    boxes_name: detect.BoxesNameFlag = None,
    scores_name: detect.ScoresNameFlag = None,
    classes_name: detect.ClassesNameFlag = None,
    box_format: detect.BoxFormatFlag = None,
    box_units: detect.BoxUnitsFlag = None,
    background: detect.BackgroundFlag = None,
    strides: detect.StridesFlag = None,
    anchors: detect.AnchorsFlag = None,
    nms: detect.NmsFlag = None,
    agnostic_nms: detect.AgnosticNmsFlag = False,
    multi_label: detect.MultiLabelFlag = None,
    score_threshold: detect.ScoreThresholdFlag = 0.001,
    max_detections: detect.MaxDetectionsFlag = 300,
    letterbox: detect.LetterboxFlag = None,
    pad: detect.PadFlag = None,
    engine: Annotated[Literal["onnx", "tensorrt"], _option(_ENGINE, "tensorrt builds for the GPU of this machine.")] = "onnx",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], _option(_ENGINE, "Of weights and computation; bf16 needs tensorrt.")
    ] = "fp32",
    max_batch: Annotated[int, _option(_ENGINE, "Most images in one inference.", min=1, max=1024)] = 8,
    name: Annotated[str | None, _option(_ENTRY, "The model's name.", show_default="made of the source")] = None,
    repository: Annotated[Path, _option(_ENTRY, "Where it is published.")] = Path("model_repository"),
    licence: Annotated[str | None, _option(_ENTRY, "Of the weights.", "--licence", "--license")] = None,
    description: Annotated[str, _option(_ENTRY, "One sentence for people.")] = "",
    seed: Annotated[int, _option(_ENTRY, "Of random weights.")] = 0,
    debug: Annotated[bool, _option(_ENTRY, "Show the traceback of what nobody foresaw.", "--debug")] = False,
) -> None:
    """Make a verified engine of a network and publish it in a model repository."""
    given = locals()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    err = Console(file=sys.stderr, stderr=True)
    try:
        from export.report import run  # noqa: PLC0415 -- torch takes seconds that --help and a wrong flag need not wait for
    except ModuleNotFoundError as error:
        err.print(rf'{error.name} is not installed; what exporting needs comes with: pip install -e ".\[export]"', soft_wrap=True)
        raise typer.Exit(2) from error
    raise typer.Exit(run(_request(given), Console(file=sys.stdout), err, debug=debug))


def _request(given: dict[str, Any]) -> "ExportRequest":
    """The options as one record.

    Raises:
        typer.BadParameter: a value that cannot be read, or options that do not go together.
    """
    from export.spec import ExportRequest, OnnxInterface, PreprocessingOverrides  # noqa: PLC0415

    interface = {key: given[key] for key in ("layout", "colour", "output", "input_name", "output_name") if given[key] is not None}
    if interface and not given["source"].startswith("onnx/"):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in interface)
        raise typer.BadParameter(f"{flags} is only for the source onnx/FILE.")
    if given["name"] is not None and not NAME_PATTERN.fullmatch(given["name"]):
        raise typer.BadParameter("--name takes 1 to 100 of a-z, 0-9, '-' and '_', a letter or digit first.")
    if given["precision"] == "bf16" and given["engine"] != "tensorrt":
        raise typer.BadParameter("onnxruntime has no bf16 kernels for most operators; take fp16, or --engine tensorrt.")
    return ExportRequest(
        weights=_weights(given),
        model_args=dict(read_argument(text) for text in given["model_arg"] or ()),
        preprocessing=PreprocessingOverrides(
            input_size=None if given["input_size"] is None else read_size(given["input_size"], "--input-size"),
            resize=_resize(given["resize"]),
            interpolation=given["interpolation"],
            mean=read_numbers(given["mean"], "--mean"),
            std=read_numbers(given["std"], "--std"),
            scale=given["scale"],
        ),
        onnx=OnnxInterface(**interface),
        detection=detect.read_detection(given, read_numbers),
        **{key: given[key] for key in _AS_GIVEN},
    )


_AS_GIVEN = (
    *("source", "repository", "name", "checkpoint", "num_classes", "labels", "tokenizer", "long_phrases", "activation"),
    *("engine", "precision", "max_batch", "licence", "description", "seed"),
)


def _weights(given: dict[str, Any]) -> Literal["pretrained", "checkpoint", "random"] | None:
    ways = {"pretrained": given["pretrained"], "checkpoint": given["checkpoint"] is not None, "random": given["random_init"]}
    chosen: list[Any] = [way for way, asked in ways.items() if asked]
    if len(chosen) > 1:
        raise typer.BadParameter("Choose one of --pretrained, --checkpoint FILE and --random-init.")
    return chosen[0] if chosen else None


def read_argument(text: str) -> tuple[str, Any]:
    """`key=value`; the value is a Python literal where it reads as one, else the text itself."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"--model-arg takes KEY=VALUE, not {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def read_size(text: str, flag: str) -> tuple[int, int]:
    """`224` or `192x256`: height, width."""
    height, _, width = text.lower().partition("x")
    if not height.isdecimal() or not (width or height).isdecimal() or text.lower().endswith("x"):
        raise typer.BadParameter(f"{flag} takes a number or HEIGHTxWIDTH, such as 224 or 192x256, not {text!r}.")
    return int(height), int(width or height)


def _resize(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    size = read_size(text, "--resize")
    return size if "x" in text.lower() else size[0]


def read_numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """`0.485,0.456,0.406`, or one number for all channels."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{flag} takes numbers with commas between them, not {text!r}.") from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(epilog=_EPILOG, no_args_is_help=True)(main)


def run(arguments: list[str]) -> None:
    """Export, or `eval`: whose first argument is a model's name, where an export's is a source."""
    if arguments[:1] == ["eval"]:
        from export.evaluate.command import app as evaluation  # noqa: PLC0415 -- a gateway, which an export does not start

        evaluation(arguments[1:], prog_name="python -m export eval")
    else:
        app(arguments, prog_name="python -m export")


if __name__ == "__main__":
    run(sys.argv[1:])
