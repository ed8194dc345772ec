"""What a library, a network or the user says about preprocessing, as the one record that the gateway follows."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from app.manifest import Interpolation, Preprocessing
from export.spec import ExportError, PreprocessingOverrides

_FLAGS = {"input_size": "--input-size", "resize": "--resize", "mean": "--mean", "std": "--std"}


def from_timm_config(config: Mapping[str, Any], overrides: PreprocessingOverrides) -> Preprocessing:
    """Follow timm's `resolve_data_config` and `transforms_imagenet_eval`, then the overrides.

    `config` holds `input_size` (3, H, W), `mean`, `std` and, as timm has them, `crop_pct`, `crop_mode`, `interpolation`. The
    `crop_mode` `letterbox`, which timm has not, fits the image into the size and pads it with the mean, lying as `anchor` says.

    Raises:
        ExportError: not RGB; a crop mode or a shape that the manifest cannot express; see `finish`.
    """
    if overrides.input_size is None and config["input_size"][0] != 3:
        raise ExportError(f"The network takes {config['input_size'][0]} channels; only RGB images are served.")
    height, width = overrides.input_size or config["input_size"][-2:]
    interpolation = config.get("interpolation", "bicubic")
    return finish(
        overrides,
        height=height,
        width=width,
        mean=config["mean"],
        std=config["std"],
        interpolation="bilinear" if interpolation == "random" else interpolation,
        **({} if overrides.resize is not None else _timm_resize(config, height, width)),
    )


def _timm_resize(config: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """The resize of timm's evaluation transform, with its rounding."""
    crop_pct = config.get("crop_pct") or 0.875
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode == "letterbox":
        return {"policy": "letterbox", "resize": (height, width), "anchor": config.get("anchor", "corner")}
    scaled = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    if crop_mode == "squash":
        return {"policy": "stretch", "resize": scaled}
    if crop_mode == "border":
        raise ExportError("timm centres this model's image on a border (crop_mode 'border'), which is not served; give --resize.")
    if scaled[0] != scaled[1]:
        raise ExportError(f"timm's centre crop to {height}x{width} fits neither a shortest edge nor a stretch; give --resize.")
    return {"policy": "shortest_edge", "resize": scaled}


def from_overrides(overrides: PreprocessingOverrides, input_size: tuple[int, int] | None = None) -> Preprocessing:
    """Take everything from the user; `input_size` is what the network itself fixes. Bilinear unless said otherwise.

    Raises:
        ExportError: something is missing; names the flags.
    """
    size = overrides.input_size or input_size
    known = {"input_size": size, "resize": overrides.resize, "mean": overrides.mean, "std": overrides.std}
    missing = [_FLAGS[name] for name, value in known.items() if value is None]
    if missing or size is None:
        raise ExportError(
            f"Nothing says how images are prepared for this network; give {', '.join(missing)} "
            "(for example: --input-size 224 --resize 256 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)."
        )
    return finish(overrides, height=size[0], width=size[1], mean=(), std=(), interpolation="bilinear")


def finish(
    overrides: PreprocessingOverrides,
    *,
    height: int,
    width: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    policy: str = "stretch",
    resize: tuple[int, int] = (0, 0),
    anchor: str = "corner",
    scale: float = 1 / 255,
) -> Preprocessing:
    """Lay the overrides over what is known and check that it fits together.

    Raises:
        ExportError: the crop is larger than the resized image, a standard deviation of 0, an unknown interpolation.
    """
    if isinstance(overrides.resize, int):
        policy, resize = "shortest_edge", (overrides.resize, overrides.resize)
    elif overrides.resize is not None:
        policy, resize = "stretch", overrides.resize
    height, width = overrides.input_size or (height, width)
    if height > resize[0] or width > resize[1]:
        raise ExportError(
            f"The crop of {height}x{width} is larger than the image resized to {resize[0]}x{resize[1]}; give a larger --resize."
        )
    interpolation = overrides.interpolation or interpolation
    if interpolation not in get_args(Interpolation):
        raise ExportError(f"Interpolation {interpolation!r} is not one of {', '.join(get_args(Interpolation))}.")
    scale = scale if overrides.scale is None else overrides.scale
    mean = _channels(overrides.mean or mean, "--mean")
    return Preprocessing.model_validate(
        {
            "height": height,
            "width": width,
            "policy": policy,
            "resize_height": resize[0],
            "resize_width": resize[1],
            "interpolation": interpolation,
            "anchor": anchor,
            "fill": tuple(round(level / scale) for level in mean) if policy == "letterbox" else (0, 0, 0),
            "scale": scale,
            "mean": mean,
            "std": _positive(_channels(overrides.std or std, "--std")),
        }
    )


def _channels(values: tuple[float, ...], flag: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise ExportError(f"{flag} takes one value or three (R, G, B), not {len(values)}.")
    return values


def _positive(std: tuple[float, ...]) -> tuple[float, ...]:
    if min(std) <= 0:
        raise ExportError(f"--std must be above 0, not {std}.")
    return std
