"""Image classifiers of transformers: a directory or the hub, and what each kind of image processor does."""

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from export.load import load
from export.reference import reference_pixels
from export.sources.transformers import Logits, from_processor
from export.spec import ExportError, ExportRequest, PreprocessingOverrides, image_tensor

CONFIG: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
    "label2id": {"cat": 0, "dog": 1, "owl": 2},
}


@pytest.fixture
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG))


@pytest.fixture
def home(classifier: Any, tmp_path: Path) -> Path:
    """What `save_pretrained` writes."""
    classifier.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def request(home: Path | str, **fields: Any) -> ExportRequest:
    return ExportRequest(f"transformers/{home}", Path("repository"), **({"weights": "pretrained"} | fields))


def test_a_directory_with_weights(home: Path, classifier: nn.Module) -> None:
    loaded = load(request(home))

    assert isinstance(loaded.network, Logits)
    assert loaded.labels == ("cat", "dog", "owl")
    assert loaded.source.architecture == "vit"
    assert (loaded.source.weights, loaded.source.checkpoint) == ("pretrained", "vit")
    assert (loaded.preprocessing.policy, loaded.preprocessing.resize_height, loaded.preprocessing.mean) == (
        "stretch",
        32,
        (0.5,) * 3,
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.network(images), classifier.eval()(images).logits)


def test_a_checkpoint_goes_into_the_classifier(home: Path, classifier: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "trained.pt")
    loaded = load(request(home, weights="checkpoint", checkpoint=tmp_path / "trained.pt"))

    assert isinstance(loaded.network, Logits)
    assert torch.equal(loaded.network.classifier.state_dict()["classifier.weight"], classifier.state_dict()["classifier.weight"])


def test_random_weights_take_classes_and_arguments(home: Path) -> None:
    loaded = load(request(home, weights="random", num_classes=5, model_args={"num_hidden_layers": 2}))

    assert (loaded.num_classes, loaded.labels) == (5, ())


def test_an_argument_that_the_configuration_does_not_have(home: Path) -> None:
    with pytest.raises(ExportError, match="has no colour"):
        load(request(home, weights="random", model_args={"colour": 1}))


def test_weights_without_a_head_are_refused_with_their_keys(classifier: Any, home: Path) -> None:
    classifier.vit.save_pretrained(home)

    with pytest.raises(ExportError, match=r"classifier\.weight"):
        load(request(home))


def test_a_pretrained_head_of_another_size_is_refused(home: Path) -> None:
    with pytest.raises(ExportError, match=r"classifier\.weight"):
        load(request(home, num_classes=5))


def test_a_configuration_that_is_no_classifier(home: Path) -> None:
    (home / "config.json").write_text(json.dumps({"model_type": "bert"}))

    with pytest.raises(ExportError, match="AutoModelForImageClassification cannot build a network"):
        load(request(home, weights="random"))


def test_without_a_network_the_hub_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ExportError, match=r"neither a directory with a config.json nor a model that the hub gives"):
        load(request("nobody/no-such-model"))


def test_without_a_processor_the_flags_say_everything(home: Path) -> None:
    (home / "preprocessor_config.json").unlink()
    with pytest.raises(ExportError, match="--input-size, --resize, --mean, --std"):
        load(request(home))

    overrides = PreprocessingOverrides(input_size=(32, 32), resize=36, mean=(0.5,), std=(0.5,))
    assert load(request(home, preprocessing=overrides)).preprocessing.resize_height == 36


NONE = PreprocessingOverrides()
PROCESSORS = [
    transformers.ViTImageProcessor(),
    transformers.ViTImageProcessor(resample=3, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3),
    transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
    transformers.PvtImageProcessor(),
    transformers.DeiTImageProcessor(),
    transformers.LevitImageProcessor(),
    transformers.PoolFormerImageProcessor(),
    transformers.BitImageProcessor(),
    transformers.CLIPImageProcessor(),
    transformers.MobileViTImageProcessor(size={"shortest_edge": 288}),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
@pytest.mark.parametrize("size", [(500, 333), (320, 480)])
def test_images_are_prepared_as_the_processor_prepares_them(processor: Any, size: tuple[int, int]) -> None:
    """But for the last bits of the resize, which the processor does on tensors and the gateway with Pillow.

    Nor do they agree which pixel an odd margin leaves to the left; these sizes have even margins.
    """
    ours = from_processor(processor, NONE)
    photo = smooth_photo(*size)
    file = io.BytesIO()
    photo.save(file, "png")

    theirs = processor(photo, return_tensors="pt")["pixel_values"][0]
    if getattr(processor, "do_flip_channel_order", False):
        theirs = theirs.flip(0)
    pixels = torch.from_numpy(reference_pixels(file.getvalue(), ours).copy())[None]

    assert theirs.shape[1:] == (ours.height, ours.width)
    levels = (image_tensor(pixels, ours)[0] - theirs).abs() * torch.tensor(ours.std).view(3, 1, 1) / ours.scale
    assert levels.mean() < 0.5
    assert levels.max() <= 3


def smooth_photo(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 23) * np.cos(y / 31), np.cos(x / 41 + 1), np.sin((x + 2 * y) / 37)]
    return Image.fromarray(((np.stack(channels, -1) * 0.4 + 0.5) * 255).astype(np.uint8))


def test_mobilevit_sees_blue_first() -> None:
    class First(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return type("Output", (), {"logits": pixel_values[:, 0]})

    images = torch.arange(3.0).view(1, 3, 1, 1)

    assert Logits(First(), flip=True)(images).item() == 2
    assert Logits(First(), flip=False)(images).item() == 0


@pytest.mark.parametrize(
    "processor",
    [
        transformers.EfficientNetImageProcessor(),
        transformers.ViTImageProcessor(do_resize=False),
        transformers.CLIPImageProcessor(do_center_crop=False),
        transformers.ViTImageProcessor(size={"longest_edge": 224}),
    ],
)
def test_what_the_manifest_cannot_express_is_refused(processor: Any) -> None:
    with pytest.raises(ExportError, match="ImageProcessor"):
        from_processor(processor, NONE)


def test_flags_come_before_the_processor() -> None:
    processor = transformers.ViTImageProcessor(do_resize=False)
    overrides = PreprocessingOverrides(input_size=(96, 96), resize=(100, 110), interpolation="lanczos", std=(0.25,))
    ours = from_processor(processor, overrides)

    assert (ours.policy, ours.resize_height, ours.resize_width, ours.height) == ("stretch", 100, 110, 96)
    assert (ours.interpolation, ours.mean, ours.std) == ("lanczos", (0.5,) * 3, (0.25,) * 3)
    assert from_processor(transformers.ViTImageProcessor(), PreprocessingOverrides(input_size=(96, 96))).resize_height == 96


@pytest.mark.parametrize(
    ("problem", "asked", "activation"),
    [
        ("multi_label_classification", None, "sigmoid"),
        ("multi_label_classification", "softmax", "softmax"),
        ("single_label_classification", None, "softmax"),
        (None, None, "softmax"),
    ],
)
def test_the_configuration_says_what_the_logits_mean(home: Path, problem: str | None, asked: Any, activation: str) -> None:
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"problem_type": problem}))

    assert load(request(home, weights="pretrained", activation=asked)).activation == activation


def test_a_regression_is_refused(home: Path) -> None:
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))

    with pytest.raises(ExportError, match="regression"):
        load(request(home, weights="pretrained"))
