"""Preprocessing is what the library says, to the pixel of its rounding, unless the user says otherwise."""

from typing import Any

import pytest
import timm
from timm.data import resolve_data_config
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import CenterCrop, Resize

from app.manifest import Preprocessing
from export.preprocessing import from_overrides, from_timm_config
from export.spec import ExportError, PreprocessingOverrides

CONFIG: dict[str, Any] = {"input_size": (3, 224, 224), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "crop_pct": 0.9}
ALL_FLAGS = PreprocessingOverrides(input_size=(64, 64), resize=72, mean=(0.5,), std=(0.25,))


def test_every_published_config_of_timm_is_followed_or_refused() -> None:
    followed = 0
    for name in timm.list_models(pretrained=True):
        config = timm.get_pretrained_cfg(name).to_dict()
        resize, crop, *_ = eval_transform(config)
        try:
            ours = from_timm_config(config, PreprocessingOverrides())
        except ExportError:
            padded = config["crop_pct"] > 1  # timm pads VOLO's largest images, which is refused as a crop that is too large
            assert isinstance(resize, ResizeKeepRatio) or config["input_size"][0] != 3 or padded, name
            continue
        followed += 1
        assert isinstance(crop, CenterCrop), name
        assert (ours.height, ours.width) == crop.size, name
        assert policy_and_size(resize) == (ours.policy, ours.resize_height, ours.resize_width), name
        assert ours.interpolation == resize.interpolation.value, name
    assert followed > 1000


def eval_transform(config: dict[str, Any]) -> list[Any]:
    resolved = resolve_data_config({}, pretrained_cfg=config)
    size = resolved.pop("input_size")[1:]
    if resolved["interpolation"] == "random":
        resolved["interpolation"] = "bilinear"
    transforms: list[Any] = transforms_imagenet_eval(img_size=size, **resolved).transforms
    return transforms


def policy_and_size(resize: Resize) -> tuple[str, int, int]:
    return ("shortest_edge", resize.size, resize.size) if isinstance(resize.size, int) else ("stretch", *resize.size)


def test_crop_pct_rounds_down_as_timm_does() -> None:
    assert from_timm_config(CONFIG, PreprocessingOverrides()).resize_height == 248  # 224 / 0.9 = 248.9


def test_random_interpolation_becomes_bilinear() -> None:
    assert from_timm_config(CONFIG | {"interpolation": "random"}, PreprocessingOverrides()).interpolation == "bilinear"


def test_a_border_is_refused() -> None:
    assert isinstance(eval_transform(CONFIG | {"crop_mode": "border"})[1], CenterCropOrPad)
    with pytest.raises(ExportError, match="--resize"):
        from_timm_config(CONFIG | {"crop_mode": "border"}, PreprocessingOverrides())


def test_every_flag_comes_before_the_library() -> None:
    overrides = PreprocessingOverrides((96, 80), (100, 90), "lanczos", (0.1,), (1.0, 2.0, 3.0), 1.0)

    assert from_timm_config(CONFIG, overrides) == Preprocessing(
        height=96,
        width=80,
        policy="stretch",
        resize_height=100,
        resize_width=90,
        interpolation="lanczos",
        mean=(0.1, 0.1, 0.1),
        std=(1.0, 2.0, 3.0),
        scale=1.0,
    )


def test_another_input_size_keeps_the_share_that_is_cropped() -> None:
    assert from_timm_config(CONFIG, PreprocessingOverrides(input_size=(90, 90))).resize_height == 100


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(ExportError, match="224x224 is larger than the image resized to 200x200"):
        from_timm_config(CONFIG, PreprocessingOverrides(resize=200))


@pytest.mark.parametrize("fields", [{"std": (0.0,)}, {"mean": (0.5, 0.5)}, {"interpolation": "cubic-ish"}])
def test_impossible_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"--std|--mean|Interpolation"):
        from_timm_config(CONFIG, PreprocessingOverrides(**fields))


def test_without_a_library_the_flags_say_everything() -> None:
    ours = from_overrides(ALL_FLAGS)

    assert (ours.policy, ours.resize_height, ours.height, ours.interpolation) == ("shortest_edge", 72, 64, "bilinear")


def test_nothing_is_guessed() -> None:
    with pytest.raises(ExportError, match="--resize, --std"):
        from_overrides(PreprocessingOverrides(input_size=(64, 64), mean=(0.5,)))
    with pytest.raises(ExportError, match="--input-size"):
        from_overrides(PreprocessingOverrides(resize=72, mean=(0.5,), std=(0.5,)))
