"""Each rewrite is an exact equivalent of what it replaces."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.crossvit import CrossVit
from timm.models.hiera import Hiera, MaskUnitAttention, Unroll
from timm.models.volo import OutlookAttention
from torch import Tensor, nn
from transformers import CvtConfig
from transformers.models.cvt.modeling_cvt import CvtForImageClassification, CvtSelfAttention

from export.informative import make_informative
from export.rewrites import REWRITES, rewrite
from export.rewrites.convit import GatedAttention
from export.rewrites.crossvit import MatrixResize
from export.rewrites.cvt import MatMulAttention
from export.rewrites.global_mean import GlobalMean
from export.rewrites.hiera import GatheredUnroll
from export.rewrites.volo import OneHotOutlook


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def randomise(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())):
        tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=0.3)
    return module.eval()


def rewritten(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    return rewrite(copy.deepcopy(module))


def assert_same(module: nn.Module, replaced: nn.Module, *inputs: Any) -> None:
    """To what float32 allows at the size of the values."""
    expected = module(*inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(replaced(*inputs), expected, rtol=1e-5, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("size", [(28, 28), (8, 12), (7, 9)])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (3, 1)])
def test_outlook_attention(size: tuple[int, int], kernel_size: int, stride: int) -> None:
    layer = randomise(OutlookAttention(24, 3, kernel_size, kernel_size // 2, stride))
    replaced, used = rewritten(layer)

    assert used == ("volo-one-hot-fold",)
    assert isinstance(replaced, OneHotOutlook)
    assert_same(layer, replaced, torch.randn(2, *size, 24))


def test_one_hot_kernels_pick_and_put_back_exactly() -> None:
    layer = OneHotOutlook(OutlookAttention(6, 2, 3, 1, 2))
    image = torch.randn(2, 6, 8, 8)

    unfolded = nn.functional.conv2d(image, layer.one_hot, stride=2, padding=1, groups=6)
    folded = nn.functional.conv_transpose2d(unfolded, layer.one_hot, stride=2, padding=1, output_padding=1, groups=6)

    expected = nn.functional.unfold(image, 3, padding=1, stride=2)
    assert torch.equal(unfolded.flatten(2), expected)
    torch.testing.assert_close(folded, nn.functional.fold(expected, (8, 8), 3, padding=1, stride=2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [((240, 240), (224, 224)), ((60, 48), (56, 52)), ((10, 10), (25, 30))])
def test_bicubic_resize(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *source)

    expected = nn.functional.interpolate(image, size=target, mode="bicubic", align_corners=False)
    torch.testing.assert_close(MatrixResize(source, target)(image), expected, rtol=0, atol=1e-5)


def test_crossvit() -> None:
    arguments: dict[str, Any] = {"embed_dim": (24, 48), "depth": ((1, 1, 0),), "num_heads": (3, 3), "patch_size": (12, 16)}
    network = randomise(CrossVit(120, (1.0, 224 / 240), **arguments, mlp_ratio=(2.0, 2.0, 1.0), num_classes=7))
    replaced, used = rewritten(network)

    assert set(used) == {"explicit-attention", "crossvit-matrix-resize"}
    assert_same(network, replaced, torch.randn(2, 3, 120, 120))


def test_gated_positional_attention() -> None:
    network = timm.create_model("convit_tiny", embed_dim=24, depth=3, local_up_to_layer=2, img_size=64, num_classes=7).eval()
    images = torch.randn(4, 3, 64, 64)
    make_informative(network, images, seed=0)
    replaced, used = rewritten(network)

    assert used == ("convit-baked-positions",)
    assert sum(isinstance(module, GatedAttention) for module in replaced.modules()) == 2
    assert_same(network, replaced, images)


def test_unroll_is_the_same_permutation() -> None:
    unroll = Hiera(img_size=(64, 64), embed_dim=24, stages=(1, 1, 1, 1)).unroll
    tokens = torch.randn(3, 256, 24)

    assert isinstance(unroll, Unroll)
    assert torch.equal(GatheredUnroll(unroll)(tokens), unroll(tokens))


@pytest.mark.parametrize("with_cls_token", [True, False])
def test_cvt_attention(with_cls_token: bool) -> None:
    config = CvtConfig(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], cls_token=[False, False, with_cls_token])
    network = randomise(CvtForImageClassification(config))
    layer = next(module for module in reversed(list(network.modules())) if isinstance(module, CvtSelfAttention))

    assert layer.with_cls_token == with_cls_token
    assert_same(layer, MatMulAttention(layer), torch.randn(2, 6 * 4 + with_cls_token, 32), 6, 4)


@pytest.mark.parametrize(
    ("layer", "tokens"),
    [
        (Attention(24, 3, qkv_bias=True), (2, 17, 24)),
        (MaskUnitAttention(24, 48, 3, q_stride=4, window_size=4, use_mask_unit_attn=True), (2, 64, 24)),
        (MaskUnitAttention(24, 24, 3), (2, 16, 24)),
    ],
)
def test_attention_of_timm(layer: nn.Module, tokens: tuple[int, ...]) -> None:
    replaced, used = rewritten(randomise(layer))

    assert used == ("explicit-attention",)
    assert layer.fused_attn
    assert not replaced.fused_attn
    assert_same(layer, replaced, torch.randn(tokens))


@pytest.mark.parametrize("output_size", [1, (1, 1)])
def test_pooling_to_one_pixel(output_size: Any) -> None:
    layer = nn.AdaptiveAvgPool2d(output_size)
    replaced, used = rewritten(layer)

    assert isinstance(replaced, GlobalMean)
    assert used == ("global-mean",)
    assert_same(layer, replaced, torch.randn(2, 5, 7, 9).transpose(1, 2))


def test_pooling_to_more_stays() -> None:
    assert rewritten(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 3, 1)))[1] == ()


def test_a_module_that_lies_in_two_places_is_replaced_by_one() -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    network, _ = rewritten(nn.Sequential(pool, nn.Sequential(pool)))

    assert isinstance(network, nn.Sequential)
    assert isinstance(network[0], GlobalMean)
    assert network[0] is network[1][0]  # type: ignore[index]


def test_names_are_told_apart() -> None:
    assert len({candidate.name for candidate in REWRITES}) == len(REWRITES)


def test_a_network_of_ones_own_is_left_alone() -> None:
    class Attention(nn.Module):
        fused_attn = True

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    assert rewritten(Attention())[1] == ()
