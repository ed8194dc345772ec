"""Random weights that make verification see."""

import pytest
import timm
import torch
from torch import nn

from export.informative import informative_weights, make_informative, sample_images
from export.spec import ExportError, image_tensor
from tests.export.small import PREPROCESSING, SmallNet


def test_pictures_differ_and_repeat() -> None:
    pictures = sample_images(PREPROCESSING, 4, seed=0)

    assert pictures.shape == (4, 32, 32, 3)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures, sample_images(PREPROCESSING, 4, seed=0))
    assert (pictures[0] != pictures[1]).any()
    assert pictures.float().std() > 30


def test_every_parameter_and_statistic_is_disturbed() -> None:
    network = timm.create_model(
        "efficientformerv2_s0", img_size=64, num_classes=7, embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 2)
    )
    before = {name: value.clone() for name, value in network.state_dict().items() if value.is_floating_point()}
    images = torch.randn(4, 3, 64, 64)

    make_informative(network, images, seed=0)

    after = network.state_dict()
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]
    assert all(torch.isfinite(after[name]).all() for name in before)
    assert not network.training


def test_layer_scale_comes_near_one() -> None:
    network = timm.create_model("convnext_atto", num_classes=7)
    gammas = [value for name, value in network.named_parameters() if name.endswith("gamma")]
    assert all(gamma.max() < 1e-3 for gamma in gammas)

    make_informative(network, torch.randn(2, 3, 64, 64), seed=0)

    assert all(0.9 < gamma.mean() < 1.1 and gamma.std() > 0.05 for gamma in gammas)


def test_logits_spread_over_the_images_around_zero() -> None:
    network = SmallNet()
    informative_weights(network, PREPROCESSING, seed=4)

    images = image_tensor(sample_images(PREPROCESSING, 8, seed=4), PREPROCESSING)
    with torch.no_grad():
        logits = network(images)

    assert logits.std(0).mean() == pytest.approx(3, rel=0.01)
    assert logits.mean(0).abs().max() < 1e-3


def test_weights_repeat_with_their_seed() -> None:
    torch.manual_seed(0)
    first, other = SmallNet(), SmallNet()
    again = SmallNet()
    again.load_state_dict(first.state_dict())
    for network, seed in ((first, 0), (again, 0), (other, 1)):
        informative_weights(network, PREPROCESSING, seed)

    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_tables_made_of_parameters_are_made_again() -> None:
    network = timm.create_model("efficientformer_l1", embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 2), num_classes=7).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        network(images)  # fills the caches with the old biases
        make_informative(network, images, seed=0)
        settled = network(images)
        fresh = network.train().eval()(images)

    assert torch.equal(settled, fresh)


def test_a_network_that_does_not_look_is_refused() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.ones(len(images), 3))
            return logits

    with pytest.raises(ExportError, match="do not depend on the image"):
        informative_weights(Blind(), PREPROCESSING, seed=0)
