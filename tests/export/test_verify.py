from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from app.manifest import MANIFEST_FILE, Preprocessing, read_entry
from export.golden import golden_images
from export.informative import informative_weights
from export.reference import reference_pixels
from export.served import served_pixels
from export.spec import Engine, ExportError, Loaded, Reference, VerificationError
from export.stage import stage
from export.verify import verify_classifier
from tests.export.small import PREPROCESSING, SmallNet, make_engine, make_loaded, make_request, verified

Made = tuple[Engine, Reference]


def test_a_right_engine_passes_and_says_what_was_compared(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with verified(made, loaded, make_request(tmp_path)) as staged:
        verification = staged.manifest.verification
        assert read_entry(staged.path).manifest == staged.manifest
    assert verification is not None
    assert verification.passed
    assert (verification.images, verification.batch_sizes) == (8, (1, 3, 8))
    names = {check.name for check in verification.checks}
    assert {"pixels: off by more than one level", "engine, batch 8: logits", "served path: top-5 agreement"} <= names
    assert {"alone and in a batch of 3: logits", "sees swapped channels: logits", "scaled decoding: logits"} <= names


def test_golden_outputs_are_what_the_reference_gives(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with verified(made, loaded, make_request(tmp_path)) as staged:
        golden = staged.manifest.golden
        assert len(golden) == 3
        for example in golden:
            frame, _ = served_pixels((staged.path / example.image).read_bytes(), PREPROCESSING)
            normalised = (frame.transpose(2, 0, 1) / 255 - np.reshape(PREPROCESSING.mean, (3, 1, 1))) / np.reshape(
                PREPROCESSING.std, (3, 1, 1)
            )
            expected = made[1](torch.from_numpy(normalised[None].astype(np.float32))).softmax(-1).numpy()
            with np.load(staged.path / example.outputs) as outputs:
                np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)


def test_batches_stay_within_the_largest_of_the_engine(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with verified(made, loaded, make_request(tmp_path, max_batch=2)) as staged:
        assert staged.manifest.verification is not None
        assert staged.manifest.verification.batch_sizes == (1, 2)


def test_several_labels_at_once_pass_by_their_sigmoid(tmp_path: Path) -> None:
    loaded = make_loaded(activation="sigmoid", num_classes=1, labels=())
    with verified(make_engine(loaded, tmp_path), loaded, make_request(tmp_path)) as staged:
        assert staged.manifest.activation == "sigmoid"


def test_scaled_decoding_is_allowed_where_it_agrees(tmp_path: Path) -> None:
    """A network that only looks at the mean colour does not mind."""
    network = SmallNet()
    network.blocks = torch.nn.Identity()
    loaded = make_loaded(informative(network))
    with verified(make_engine(loaded, tmp_path), loaded, make_request(tmp_path)) as staged:
        assert staged.manifest.preprocessing.scaled_decoding


def test_scaled_decoding_that_disagrees_is_switched_off_and_recorded(
    tmp_path: Path, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_noise_when_scaled(data: bytes, preprocessing: Preprocessing, *, scaled: bool = False):
        frame, by = served_pixels(data, preprocessing, scaled=scaled)
        return (frame[::-1] if by > 1 else frame), by

    monkeypatch.setattr("export.verify.served_pixels", with_noise_when_scaled)
    with verified(made, loaded, make_request(tmp_path)) as staged:
        verification = staged.manifest.verification
        assert not staged.manifest.preprocessing.scaled_decoding
    assert verification is not None
    assert verification.passed
    assert any(not check.passed and check.name.startswith("scaled decoding") for check in verification.checks)


def test_scaled_decoding_that_no_image_needs_stays_off(tmp_path: Path) -> None:
    size = {"height": 1600, "width": 1600, "resize_height": 1600, "resize_width": 1600}
    frames = [served_pixels(image.data, PREPROCESSING.model_copy(update=size), scaled=True) for image in golden_images()]
    assert {by for _, by in frames} == {1}


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "shortest_edge", "resize_height": 72, "resize_width": 72, "interpolation": "bicubic"},
        {"policy": "shortest_edge", "resize_height": 64, "resize_width": 64, "interpolation": "bilinear"},
        {"policy": "stretch", "resize_height": 64, "resize_width": 80, "interpolation": "lanczos"},
        {"policy": "stretch", "resize_height": 70, "resize_width": 90, "interpolation": "nearest"},
        {"policy": "letterbox", "resize_height": 64, "resize_width": 80, "interpolation": "bilinear", "fill": (124, 116, 104)},
    ],
    ids=lambda fields: f"{fields['policy']}-{fields['interpolation']}",
)
def test_served_pixels_are_those_of_torchvision(fields: dict) -> None:
    preprocessing = Preprocessing(height=64, width=80 if fields["resize_width"] > 72 else 64, **fields)
    for image in golden_images():
        served, _ = served_pixels(image.data, preprocessing)
        difference = np.abs(served.astype(int) - reference_pixels(image.data, preprocessing))
        assert (difference > 1).mean() < 0.002, image.name


def test_the_message_lists_what_failed_and_nothing_is_written(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    def blind(images: torch.Tensor) -> torch.Tensor:
        return made[1](torch.zeros_like(images))

    with stage([made[0]], loaded, make_request(tmp_path)) as (staged,):
        before = (staged.path / MANIFEST_FILE).read_bytes()
        with pytest.raises(VerificationError, match=r"(?s)nothing was published.*engine, batch 1: logits") as caught:
            verify_classifier(staged, blind)
        assert (staged.path / MANIFEST_FILE).read_bytes() == before
        assert not list(staged.path.glob("golden/*.npz"))
    assert not caught.value.verification.passed
    assert "pixels" not in str(caught.value)


def test_an_engine_that_does_not_run_is_a_clear_error(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    broken = onnx.load(made[0].path)
    broken.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "model.onnx")
    with (
        stage([replace(made[0], path=tmp_path / "model.onnx")], loaded, make_request(tmp_path)) as (staged,),
        pytest.raises(ExportError, match="does not run in onnxruntime"),
    ):
        verify_classifier(staged, made[1])


def test_a_staged_version_that_was_touched_is_refused(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with stage([made[0]], loaded, make_request(tmp_path)) as (staged,):
        engine = staged.path / "model.onnx"
        engine.write_bytes(engine.read_bytes()[:-1] + b"!")
        with pytest.raises(ExportError, match="SHA-256"):
            verify_classifier(staged, made[1])


def test_a_plan_is_refused_where_it_cannot_be_run(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with stage([replace(made[0], kind="tensorrt")], loaded, make_request(tmp_path)) as (staged,):
        with pytest.raises(ExportError) as caught:
            verify_classifier(staged, made[1])
        assert caught.value.exit_code == 2


def informative(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    informative_weights(network, PREPROCESSING, seed=0)
    return network
