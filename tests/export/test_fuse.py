"""Pixels in, answers out: normalisation and activation in the graph, the reference untouched."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from app.manifest import Preprocessing
from export.fuse import Classifier, fuse_classifier
from export.informative import informative_weights, sample_images
from export.spec import Activation, Loaded, image_tensor
from tests.export.small import PREPROCESSING, SmallNet, make_loaded


def run(module: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(images)
    return result


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_graph_is_the_reference_between_normalisation_and_activation(activation: Activation) -> None:
    loaded = make_loaded(activation=activation)
    images = sample_images(loaded.preprocessing, 4, seed=3)
    fused = fuse_classifier(loaded)

    logits = fused.reference(image_tensor(images, loaded.preprocessing))
    expected = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    torch.testing.assert_close(run(fused.graph, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 1.0, "mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)},
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        {"scale": 1 / 127.5, "mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0)},
    ],
)
def test_every_normalisation_is_one_multiplication_and_one_addition(changes: dict[str, Any]) -> None:
    preprocessing = Preprocessing.model_validate(PREPROCESSING.model_dump() | changes)
    images = sample_images(preprocessing, 2, seed=0)
    seen: list[torch.Tensor] = []
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    run(Classifier(network, preprocessing, "softmax"), images)

    torch.testing.assert_close(seen[0], image_tensor(images, preprocessing), rtol=1e-5, atol=1e-5)


def test_a_half_precision_network_still_gives_float32_probabilities() -> None:
    class Half(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)).half()

    probabilities = run(Classifier(Half(), PREPROCESSING, "softmax"), sample_images(PREPROCESSING, 2, seed=0))

    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def rewritten() -> Loaded:
    """A network of timm that fuse rewrites, with its caches filled."""
    network = timm.create_model("convit_tiny", embed_dim=24, depth=3, local_up_to_layer=2, img_size=32, num_classes=7)
    informative_weights(network, PREPROCESSING, seed=0)
    return make_loaded(network.eval().requires_grad_(False))


def test_the_reference_is_the_network_before_rewriting(rewritten: Loaded) -> None:
    images = image_tensor(sample_images(PREPROCESSING, 3, seed=5), PREPROCESSING)
    assert isinstance(rewritten.network, nn.Module)
    before = copy.deepcopy(rewritten.network)

    fused = fuse_classifier(rewritten)
    run(fused.graph, sample_images(PREPROCESSING, 3, seed=5))

    assert fused.rewrites == ("convit-baked-positions",)
    assert [type(module) for module in rewritten.network.modules()] == [type(module) for module in before.modules()]
    assert torch.equal(fused.reference(images), run(before, images))


def test_weights_are_shared_with_the_reference(rewritten: Loaded) -> None:
    fused = fuse_classifier(rewritten)
    assert isinstance(fused.graph, nn.Module)
    assert isinstance(rewritten.network, nn.Module)

    ours = {parameter.data_ptr() for parameter in fused.graph.parameters()}
    assert ours <= {parameter.data_ptr() for parameter in rewritten.network.parameters()}


def test_parameters_are_those_of_the_network() -> None:
    network = SmallNet()

    assert fuse_classifier(make_loaded(network)).parameters == sum(parameter.numel() for parameter in network.parameters())
