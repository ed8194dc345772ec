"""Swin with a Reconfigured Attention Module: detection tokens go through the windows' stages beside the patches (ViDT).

Song et al., "ViDT: An Efficient and Effective Fully Transformer-based Object Detector", 2021. In every block patches attend within
(shifted) windows and detection tokens to one another, through the same weights; in the last stage detection tokens attend to all
patches as well.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

_MASKED = -100.0


class Padding:
    """Where an image of `content` (int32 [B,2], height and width) ends in a frame, seen at any resolution; None: nowhere."""

    def __init__(self, frame: tuple[int, int], content: Tensor | None) -> None:
        self.frame = frame
        self.content = content

    def inside(self, size: tuple[int, int], between: tuple[int, int] | None = None) -> tuple[Tensor, Tensor] | None:
        """float32 [B,h] and [B,w]: 1 where a row or a column of a map shows the image, by its nearest pixel.

        `between` is the size of a map that the mask takes before, where the authors resize it twice.
        """
        if self.content is None:
            return None
        rows, columns = (
            (self._nearest(axis, size[axis], between).to(self.content.device) < self.content[:, axis : axis + 1]).float()
            for axis in (0, 1)
        )
        return rows, columns

    def _nearest(self, axis: int, count: int, between: tuple[int, int] | None) -> Tensor:
        """int32 [count]: the frame's pixel that each row or column shows."""
        places, whole = torch.arange(count), count
        if between is not None:
            places, whole = places * between[axis] // count, between[axis]
        return (places * self.frame[axis] // whole).int()


def sine_positions(size: tuple[int, int], channels: int, inside: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B or 1,h,w,channels]: half of the channels tell the row, half the column, in shares of what shows the image."""
    half = channels // 2
    axes = []
    for axis, count in enumerate(size):
        places = torch.arange(1, count + 1, dtype=torch.float32)[None]
        if inside is None:
            axes.append(places / (count + 1e-6) * 2 * math.pi)
        else:
            held = inside[axis].sum(1, keepdim=True)
            axes.append(torch.minimum(places.to(held.device), held) / (held + 1e-6) * 2 * math.pi)
    periods = 10000.0 ** (2 * (torch.arange(half, device=axes[0].device) // 2) / half)
    rows, columns = (_waves(axis.unsqueeze(-1) / periods) for axis in axes)
    shape = (-1, *size, half)
    return torch.cat([rows.unsqueeze(2).expand(shape), columns.unsqueeze(1).expand(shape)], -1)


def _waves(angles: Tensor) -> Tensor:
    """Sines of the even, cosines of the odd channels."""
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


class Attention(nn.Module):
    """Patches [B,H,W,C], H and W multiples of `window`, and detection tokens [B,Q,C], with shared weights."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.relative_position_index = nn.Buffer(_relative_positions(window))

    def within_windows(self, patches: Tensor, shift: int) -> Tensor:
        batch, height, width, channels = patches.shape
        down, across, area = height // self.window, width // self.window, self.window**2
        windows = self.qkv(patches).view(batch, down, self.window, across, self.window, 3 * channels).transpose(2, 3)
        split = windows.reshape(-1, area, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        scores = queries * self.scale @ keys.transpose(-2, -1)
        bias = (
            self.relative_position_bias_table[self.relative_position_index.flatten()].view(area, area, self.heads).permute(2, 0, 1)
        )
        if shift:
            rows, columns = (_seams(count, self.window, shift, axis) for axis, count in enumerate((down, across)))
            by_window = scores.view(-1, down, across, self.heads, area, area)
            by_window = by_window + (bias + rows.to(bias.device)[:, None, None]) + columns.to(bias.device)[None, :, None]
            scores = by_window.view(-1, self.heads, area, area)
        else:
            scores = scores + bias
        mixed = (scores.softmax(-1) @ values).transpose(1, 2)
        restored = mixed.reshape(-1, down, across, self.window, self.window, channels).transpose(2, 3)
        projected: Tensor = self.proj(restored.reshape(-1, height, width, channels))
        return projected

    def of_tokens(self, tokens: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor:
        """Detection tokens [B,Q,C] among themselves and the patches `seen` [B,N,C], if any; `mask` [B,1,1,N] is added to scores."""
        queries, keys, values = self._split(tokens)
        scores = queries * self.scale @ keys.transpose(-2, -1)
        if seen is not None:
            _, seen_keys, seen_values = self._split(seen)
            of_seen = queries * self.scale @ seen_keys.transpose(-2, -1)
            scores = torch.cat([of_seen if mask is None else of_seen + mask, scores], -1)
            values = torch.cat([seen_values, values], 2)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(mixed)
        return projected

    def _split(self, tokens: Tensor) -> Sequence[Tensor]:
        shape = (tokens.shape[0], tokens.shape[1], 3, self.heads, tokens.shape[2] // self.heads)
        split: Sequence[Tensor] = self.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        return split


def _relative_positions(window: int) -> Tensor:
    """int64 [window**2,window**2]: the row of the bias table for each pair of places in a window."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = places[:, None] - places[None] + window - 1
    return apart[..., 0] * (2 * window - 1) + apart[..., 1]


def _seams(windows: int, window: int, shift: int, axis: int) -> Tensor:
    """[windows,area,area]: pairs of places that only the cyclic shift along `axis` (0: down) has brought into one window."""
    places = torch.arange(windows * window)
    wrapped = (places >= (windows * window - shift)).view(windows, window)
    every = wrapped.repeat_interleave(window, 1) if axis == 0 else wrapped.repeat(1, window)
    return (every[:, :, None] != every[:, None, :]).float() * _MASKED


class Feedforward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        mapped: Tensor = self.fc2(gelu(self.fc1(tokens)))
        return mapped


class Block(nn.Module):
    def __init__(self, width: int, heads: int, window: int, *, shift: int, positions: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Feedforward(width)
        self.det_pos_linear = nn.Linear(positions, width)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, patches: Tensor, tokens: Tensor, token_positions: Tensor, patch_positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Patches [B,H,W,C] and tokens [B,Q,C]; with `patch_positions` [B or 1,H,W,C] tokens attend to patches."""
        normal_patches, normal_tokens = self.norm1(patches), self.norm1(tokens)
        seen = None if patch_positions is None else (normal_patches + patch_positions).flatten(1, 2)
        token_change = self.attn.of_tokens(normal_tokens + self.det_pos_linear(token_positions), seen, mask)
        patch_change = self._shifted_windows(normal_patches)
        patches, tokens = patches + self.drop_path(patch_change), tokens + self.drop_path(token_change)
        return (
            patches + self.drop_path(self.mlp(self.norm2(patches))),
            tokens + self.drop_path(self.mlp(self.norm2(tokens))),
        )

    def _shifted_windows(self, patches: Tensor) -> Tensor:
        _, height, width, _ = patches.shape
        window = self.attn.window
        below, right = -height % window, -width % window
        if below or right:
            patches = pad(patches, (0, 0, 0, right, 0, below))
        changed = _roll(self.attn.within_windows(_roll(patches, self.shift), self.shift), -self.shift)
        return changed[:, :height, :width] if below or right else changed


def _roll(patches: Tensor, by: int) -> Tensor:
    """Towards the top left by `by`, around the edges."""
    for axis in (1, 2) if by else ():
        cut = by % patches.shape[axis]
        patches = torch.cat([patches.narrow(axis, cut, patches.shape[axis] - cut), patches.narrow(axis, 0, cut)], axis)
    return patches


class Merging(nn.Module):
    """Four patches become one of `merged` channels; a token is taken for four alike."""

    def __init__(self, width: int, merged: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, merged, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, patches: Tensor) -> Tensor:
        height, width = patches.shape[1:3]
        if height % 2 or width % 2:
            patches = pad(patches, (0, 0, 0, width % 2, 0, height % 2))
        batch, height, width, channels = patches.shape
        pairs = patches.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.reduction(self.norm(pairs.reshape(batch, height // 2, width // 2, 4 * channels)))
        return merged

    def of_tokens(self, tokens: Tensor) -> Tensor:
        merged: Tensor = self.reduction(self.norm(torch.cat([tokens] * 4, -1)))
        return merged


class Stage(nn.Module):
    def __init__(self, width: int, heads: int, window: int, *, positions: int, merged: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, window, shift=window // 2 if index % 2 else 0, positions=positions, drop_path=drop_path)
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = Merging(width, merged)


class PatchEmbedding(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,h,w,C]."""
        right, below = -images.shape[3] % self.patch, -images.shape[2] % self.patch
        if right or below:
            images = pad(images, (0, right, 0, below))
        embedded: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return embedded


class SwinWithTokens(nn.Module):
    """Images [B,3,H,W] -> maps [B,C,h,w] of stages 2 to 4 and of a merging behind them, and detection tokens [B,Q,C of stage 4].

    `positions`: channels of the tokens' position table, and of the last map.
    """

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        window: int,
        patch: int,
        tokens: int,
        positions: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(depths))]
        self.channels = (*widths[1:], positions)
        rates = iter([drop_path * block / max(1, sum(depths) - 1) for block in range(sum(depths))])
        self.patch_embed = PatchEmbedding(patch, width)
        self.layers = nn.ModuleList(
            Stage(
                of_stage,
                heads[stage],
                window,
                positions=positions,
                merged=merged,
                drop_paths=[next(rates) for _ in range(depths[stage])],
            )
            for stage, (of_stage, merged) in enumerate(zip(widths, self.channels, strict=True))
        )
        self.det_token = nn.Parameter(torch.zeros(1, tokens, width))
        self.det_pos_embed = nn.Parameter(torch.zeros(1, tokens, positions))
        self.apply(_initialise)
        nn.init.trunc_normal_(self.det_token, std=0.02)
        nn.init.trunc_normal_(self.det_pos_embed, std=0.02)

    def sizes(self, frame: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of each map for images of `frame`."""
        height, width = (-(-side // self.patch_embed.patch) for side in frame)
        sizes = []
        for _ in self.layers:
            height, width = (height + 1) // 2, (width + 1) // 2
            sizes.append((height, width))
        return sizes

    def forward(self, images: Tensor, padding: Padding) -> tuple[list[Tensor], Tensor]:
        patches = self.patch_embed(images)
        tokens = self.det_token.expand(images.shape[0], -1, -1)
        first, last = tuple(patches.shape[1:3]), len(self.layers) - 1
        maps = []
        for index, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            size = (patches.shape[1], patches.shape[2])
            positions, mask = None, None
            if index == last:
                inside = padding.inside(size, between=(first[0] // 2**last, first[1] // 2**last))
                positions = sine_positions(size, patches.shape[3], inside).to(patches.device)
                mask = None if inside is None else _outside(*inside)
            for block in stage.blocks:
                patches, tokens = block(patches, tokens, self.det_pos_embed, positions, mask)
            if index:
                maps.append(patches.permute(0, 3, 1, 2))
            patches = stage.downsample(patches)
            if index != last:
                tokens = stage.downsample.of_tokens(tokens)
        return [*maps, patches.permute(0, 3, 1, 2)], tokens


def _outside(rows: Tensor, columns: Tensor) -> Tensor:
    """What is added to scores of attention [B,1,1,h*w]: nothing where the map shows the image."""
    held = rows.unsqueeze(2) * columns.unsqueeze(1)
    return ((1 - held) * _MASKED).flatten(1)[:, None, None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
