"""ViDT+ part by part against the same written as the papers' code writes it, its parameters' names, and that it trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.architectures import vidt_plus
from export.architectures._swin_ram import Attention, Block, Merging, Padding, sine_positions
from export.load import load
from export.spec import ExportError, LoadedDetector
from tests.export.detectors import CLASSES, DETECTORS

FAMILY = DETECTORS["vidt_plus"]
SMALL = {
    "classes": 8,
    "width": 24,
    "depths": (2, 2, 2, 2),
    "window": 8,
    "queries": 40,
    "channels": 80,
    "decoder_heads": 4,
    "layers": 3,
    "hidden": 256,
    "bottleneck": 32,
    "groups": 8,
    "masks": False,
    "rows": 40,
}

# Names that the published files have, one for each kind of layer.
PUBLISHED = """
    backbone.patch_embed.proj.weight backbone.patch_embed.norm.bias backbone.det_token backbone.det_pos_embed
    backbone.layers.0.blocks.0.norm1.weight backbone.layers.0.blocks.0.attn.qkv.bias backbone.layers.1.blocks.1.attn.proj.weight
    backbone.layers.0.blocks.0.attn.relative_position_bias_table backbone.layers.0.blocks.0.attn.relative_position_index
    backbone.layers.2.blocks.0.norm2.bias backbone.layers.2.blocks.0.mlp.fc1.weight backbone.layers.3.blocks.0.mlp.fc2.bias
    backbone.layers.3.blocks.0.det_pos_linear.weight backbone.layers.3.downsample.reduction.weight
    backbone.layers.0.downsample.norm.weight transformer.reference_points.weight
    transformer.decoder.layers.0.cross_attn.sampling_offsets.weight transformer.decoder.layers.0.cross_attn.attention_weights.bias
    transformer.decoder.layers.1.cross_attn.value_proj.weight transformer.decoder.layers.1.cross_attn.output_proj.bias
    transformer.decoder.layers.0.self_attn.in_proj_weight transformer.decoder.layers.0.self_attn.out_proj.bias
    transformer.decoder.layers.0.norm1.weight transformer.decoder.layers.0.norm3.bias transformer.decoder.layers.0.linear1.weight
    transformer.decoder.layers.0.linear2.bias fusion.multi_scaler.layer_0_rn.weight fusion.multi_scaler.p_norm_3.bias
    fusion.multi_scaler.refinenet_0.smoothing.weight fusion.multi_scaler.refinenet_1.resConfUnit1.conv2.weight
    fusion.multi_scaler.refinenet_3.resConfUnit2.conv3.bias tgt_proj.0.weight tgt_proj.1.bias query_pos_proj.0.bias
    class_embed.0.weight bbox_embed.2.layers.2.bias vector_embed.0.layers.0.weight vector_embed.2.layers.2.weight
"""
UNUSED = """
    backbone.norm1.weight backbone.norm3.bias backbone.layers.0.downsample.expansion.weight backbone.layers.3.downsample.norm2.bias
    transformer.level_embed transformer.enc_output.weight transformer.enc_output_norm.bias transformer.token_embed.weight
    transformer.decoder.bbox_embed.1.layers.0.weight iou_embed.0.layers.0.weight
    fusion.multi_scaler.refinenet_3.smoothing.weight fusion.multi_scaler.refinenet_3.resConfUnit1.conv1.weight
"""


def by_rolling(attention: Attention, patches: Tensor, shift: int) -> Tensor:
    """Shifted windows as Swin's code has them: rolled, with a mask of regions that are painted one by one."""
    batch, height, width, channels = patches.shape
    window, heads = attention.window, attention.heads
    rolled = torch.roll(patches, (-shift, -shift), (1, 2))

    def windows(values: Tensor) -> Tensor:
        cut = values.view(values.shape[0], height // window, window, width // window, window, -1).permute(0, 1, 3, 2, 4, 5)
        return cut.reshape(-1, window * window, values.shape[-1])

    queries, keys, values = attention.qkv(windows(rolled)).view(-1, window**2, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    scores = queries @ keys.transpose(-2, -1) * (channels // heads) ** -0.5
    for first in range(window**2):
        for second in range(window**2):
            apart = (
                (first // window - second // window + window - 1) * (2 * window - 1) + first % window - second % window + window - 1
            )
            scores[:, :, first, second] += attention.relative_position_bias_table[apart]
    if shift:
        regions, count = torch.zeros(1, height, width, 1), 0
        parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for rows in parts:
            for columns in parts:
                regions[:, rows, columns] = count
                count += 1
        region = windows(regions).squeeze(-1)
        apart = (region[:, None] != region[:, :, None]) * -100.0
        scores = (scores.view(batch, -1, heads, window**2, window**2) + apart[None, :, None]).view(scores.shape)
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(-1, window * window, channels)
    cut = mixed.view(batch, height // window, width // window, window, window, channels).permute(0, 1, 3, 2, 4, 5)
    return torch.roll(attention.proj(cut.reshape(batch, height, width, channels)), (shift, shift), (1, 2))


@pytest.mark.parametrize("shift", [0, 2])
def test_shifted_windows(shift: int) -> None:
    torch.manual_seed(0)
    block = Block(12, 3, 4, shift=shift, positions=8, drop_path=0.0)
    nn.init.normal_(block.attn.relative_position_bias_table)
    patches = torch.randn(2, 8, 12, 12)
    torch.testing.assert_close(block._shifted_windows(patches), by_rolling(block.attn, patches, shift), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block._shifted_windows(patches), by_rolling(block.attn, patches, 2 - shift), atol=1e-3)


def test_windows_that_do_not_fit_are_padded_with_zeros() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, 4, shift=2, positions=8, drop_path=0.0)
    patches = torch.randn(1, 6, 7, 12)
    padded = nn.functional.pad(patches, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(block._shifted_windows(patches), by_rolling(block.attn, padded, 2)[:, :6, :7], rtol=1e-4, atol=1e-5)


def test_merging_takes_its_patches_column_by_column() -> None:
    merging = Merging(6, 12)
    patches = torch.randn(2, 5, 7, 6)
    padded = nn.functional.pad(patches, (0, 0, 0, 1, 0, 1))
    corners = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    torch.testing.assert_close(merging(patches), merging.reduction(merging.norm(torch.cat(corners, -1))))


def test_the_decoders_self_attention_is_torchs() -> None:
    ours = vidt_plus.SelfAttention(16, 4, dropout=0.0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    tokens, positions = torch.randn(2, 5, 16), torch.randn(1, 5, 16)
    expected, _ = theirs(tokens + positions, tokens + positions, tokens)
    torch.testing.assert_close(ours(tokens, positions), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_shares_of_what_shows_the_image() -> None:
    """As the authors count them: by a running sum over the mask."""
    padding = Padding((96, 136), torch.tensor([[96, 136], [41, 100]], dtype=torch.int32))
    inside = padding.inside((6, 9))
    assert inside is not None
    held = inside[0][:, :, None] * inside[1][:, None]
    frame = torch.zeros(2, 1, 96, 136)
    frame[0], frame[1, :, :41, :100] = 1, 1
    assert torch.equal(held, nn.functional.interpolate(frame, (6, 9)).squeeze(1))
    angles = []
    for axis in (1, 2):
        running = held.cumsum(axis)
        angles.append(running / (running.amax(axis, keepdim=True) + 1e-6) * 2 * torch.pi)
    periods = 10000 ** (2 * (torch.arange(4) // 2) / 4)
    waves = [angle[..., None] / periods for angle in angles]
    expected = torch.cat([torch.stack([wave[..., 0::2].sin(), wave[..., 1::2].cos()], -1).flatten(-2) for wave in waves], -1)
    seen = held.bool()
    torch.testing.assert_close(sine_positions((6, 9), 8, inside)[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_a_mask_may_be_resized_twice() -> None:
    content = torch.tensor([[50, 99]], dtype=torch.int32)
    twice = Padding((100, 100), content).inside((4, 4), between=(3, 3))
    mask = torch.zeros(1, 1, 100, 100)
    mask[..., :50, :99] = 1
    expected = nn.functional.interpolate(nn.functional.interpolate(mask, (3, 3)), (4, 4))[0, 0]
    assert twice is not None
    assert torch.equal(twice[0][0][:, None] * twice[1][0], expected)


def test_a_frame_without_padding_is_one_whose_content_is_all_of_it() -> None:
    network = vidt_plus.make(classes=CLASSES, **FAMILY.narrow).eval()
    images = torch.randn(2, 3, 96, 136)
    with torch.no_grad():
        whole = network.detect(images, torch.tensor([[96, 136]] * 2, dtype=torch.int32))
        for one, other in zip(whole, network.detect(images, None), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_answered_is_the_last_level_of_training() -> None:
    network = vidt_plus.make(classes=CLASSES, **FAMILY.narrow, ious=True).eval()
    images = torch.randn(2, 3, 96, 136)
    with torch.no_grad():
        levels, queries = network(images), network.detect(images, None)
    assert levels.logits.shape == (3, 2, 20, 7)
    assert levels.ious is not None
    assert levels.ious.shape == (3, 2, 20)
    centre, size = levels.boxes[-1].split(2, -1)
    torch.testing.assert_close(queries.boxes, torch.cat([centre - size / 2, centre + size / 2], -1))
    torch.testing.assert_close(queries.logits, levels.logits[-1])


def test_a_small_one_trains() -> None:
    """Two million parameters for 256 pixels, as the docstring has it: a step down the gradient lowers the loss of every level."""
    torch.manual_seed(0)
    network = vidt_plus.make("nano", **SMALL)
    assert sum(parameter.numel() for parameter in network.parameters()) < 2e6
    images, boxes = torch.randn(1, 3, 64, 64), torch.rand(40, 4)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        levels = network.eval()(images)
        by_level = (levels.boxes - boxes).abs().mean((1, 2, 3)) + levels.logits.sigmoid().mean((1, 2, 3))
        losses.append(by_level.detach())
        optimiser.zero_grad()
        by_level.sum().backward()
        optimiser.step()
    assert (losses[-1] < losses[0]).all()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_parameters_have_the_published_names() -> None:
    with torch.device("meta"):
        keys = vidt_plus.make(classes=CLASSES, **FAMILY.narrow).state_dict().keys()
    assert set(PUBLISHED.split()) <= keys


def test_a_published_checkpoint_loads_without_what_nothing_uses(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = vidt_plus.make(classes=CLASSES, **FAMILY.narrow)
    extra = {key: torch.zeros(3) for key in UNUSED.split()}
    torch.save({"model": trained.state_dict() | extra, "epoch": 3}, tmp_path / "published.pth")
    loaded = load(replace(FAMILY.request(tmp_path), weights="checkpoint", checkpoint=tmp_path / "published.pth"))
    assert isinstance(loaded, LoadedDetector)
    own, theirs = loaded.network.state_dict(), trained.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert loaded.weights is not None
    assert set(loaded.weights.unexpected) == set(vidt_plus.TRAINING_ONLY)


def test_anything_else_must_match(tmp_path: Path) -> None:
    weights = vidt_plus.make(classes=CLASSES, **FAMILY.narrow).state_dict()
    del weights["tgt_proj.0.weight"]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ExportError, match=r"1 missing: tgt_proj\.0\.weight"):
        load(replace(FAMILY.request(tmp_path), weights="checkpoint", checkpoint=tmp_path / "other.pth"))
