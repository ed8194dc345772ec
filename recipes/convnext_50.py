"""Train the bundled classifier `convnext-50`: ConvNeXt-atto at 64x64 on 50 classes of Tiny ImageNet.

    python recipes/convnext_50.py --data tiny_imagenet_50.npz --out runs/convnext_50

Tiny ImageNet (200 classes of ImageNet at 64x64, Stanford CS231n course, http://cs231n.stanford.edu/tiny-imagenet-200.zip) is
free for research; it is not part of this repository. `--data` is a NumPy archive made from 50 of its classes:
`data` (uint8, the JPEG files one after another), `offsets` (int64, N + 1), `label` (N), `is_val` (N, bool), `names` (50).

The network is the ConvNeXt of Liu et al., "A ConvNet for the 2020s" (arXiv 2201.03545), as timm builds it, small enough
to train on a laptop: one to two hours on two CPU cores with bfloat16. The first 20 epochs see 48x48 images. Random crops are
resampled and so softer than the images that are served, which costs 6 % of accuracy; the last 3 epochs see sharp ones (after
FixRes, Touvron et al., 2019). The result is the mean of the weights before and after them (a model soup, Wortsman et al., 2022),
served with the shorter side at 70 and cropped to 64. The optimiser is Muon (Jordan et al., 2024).

An interrupted run resumes from `--out`, with other options if they are given. The bundled weights were made so: 24 epochs of
`--epochs 36` without `output_stride`, then the rest of `--epochs 38` with it.
It writes `model.safetensors` and `labels.txt`, which `make bundled` exports:

    python -m export timm/convnext_atto --checkpoint runs/convnext_50/model.safetensors ...
"""

import argparse
import io
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MODEL_ARGS = {"patch_size": 2, "kernel_sizes": 5, "norm_layer": "batchnorm2d", "ls_init_value": 0.5, "output_stride": 16}


def build(num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """ConvNeXt-atto (depths 2-2-6-2, widths 40-80-160-320) for 64x64 images: 2x2 patches, 5x5 kernels, BatchNorm, and a last
    stage that dilates instead of striding, so that it sees 4x4 positions.

    The paper's initialisation (standard deviation 0.02 everywhere) suits its 300 epochs; He's fan-in rule learns much faster here.
    """
    model = timm.create_model("convnext_atto", num_classes=num_classes, drop_path_rate=drop_path, **MODEL_ARGS)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def load_images(path: Path) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Decode the archive: images uint8 [N,3,64,64], labels int64 [N], validation mask bool [N], class names."""
    archive = np.load(path)
    data, offsets = archive["data"], archive["offsets"]
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(data[start:end].tobytes())).convert("RGB")) for start, end in itertools.pairwise(offsets)]
    )
    labels = torch.from_numpy(archive["label"].astype(np.int64))
    names = [str(name) for name in archive["names"]]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, torch.from_numpy(archive["is_val"]), names


def normalise(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crop (area 0.35-1) to `size`, flip, rotation up to 10 degrees, brightness, contrast, saturation."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    scale, log_ratio, angle = uniform(0.35, 1.0).sqrt(), uniform(-0.2, 0.2), uniform(-0.17, 0.17)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    width, height = (scale * log_ratio.exp()).clamp(max=1), (scale * (-log_ratio).exp()).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = width * angle.cos() * flip, -height * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = width * angle.sin() * flip, height * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)

    column = (n, 1, 1, 1)
    images = images * uniform(0.7, 1.3).view(column)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * uniform(0.7, 1.3).view(column)
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * uniform(0.6, 1.4).view(column)).clamp(0, 255)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 6 pixels and flip, without resampling: as sharp as the images that are served."""
    padded = F.pad(images.float(), (6, 6, 6, 6), mode="reflect")
    top, left = (torch.randint(0, 13, (len(images),), generator=generator) for _ in range(2))
    size = images.shape[-1]
    shifted = torch.stack([p[:, t : t + size, x : x + size] for p, t, x in zip(padded, top, left, strict=True)])
    flipped = torch.rand(len(images), generator=generator) < 0.5
    shifted[flipped] = shifted[flipped].flip(-1)
    return shifted


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al., 2019): paste one box of a shuffled batch, mix the targets by its area."""
    share = float(torch.rand(1, generator=generator))
    size = images.shape[-1]
    side = int(size * math.sqrt(share))
    top, left = (int(v) for v in torch.randint(0, size - side + 1, (2,), generator=generator))
    order = torch.randperm(len(images), generator=generator)
    images = images.clone()
    images[:, :, top : top + side, left : left + side] = images[order][:, :, top : top + side, left : left + side]
    area = side * side / (size * size)
    return images, targets * (1 - area) + targets[order] * area


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in 0..1."""
    model.eval()
    top1 = top5 = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise(x).to(memory_format=torch.channels_last))
        best = logits.float().topk(5).indices
        top1 += int((best[:, 0] == y).sum())
        top5 += int((best == y[:, None]).sum())
    return top1 / len(labels), top5 / len(labels)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return peak * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(options: argparse.Namespace) -> None:  # noqa: PLR0915 -- one straight line
    torch.manual_seed(options.seed)
    images, labels, is_val, names = load_images(options.data)
    train_x, train_y, val_x, val_y = images[~is_val], labels[~is_val], images[is_val], labels[is_val]
    model = build(len(names), drop_path=0.05).to(memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="muon", lr=options.lr, weight_decay=options.weight_decay)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "labels.txt").write_text("\n".join(names) + "\n")
    checkpoint = options.out / "checkpoint.pth"
    first_epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]

    steps_per_epoch = len(train_x) // options.batch_size
    total = steps_per_epoch * options.epochs
    for epoch in range(first_epoch, options.epochs + options.served_epochs):
        as_served = epoch >= options.epochs
        if as_served:
            average.decay = 0.99
        if epoch == options.epochs:
            save_file(_contiguous(average.module), options.out / "resampled.safetensors")
        started, losses = time.monotonic(), []
        model.train()
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        size = 48 if epoch < options.small_epochs else 64
        mixing = as_served or epoch < options.epochs - 4
        for index, rows in enumerate(batches(len(train_x), options.batch_size, generator)):
            step = epoch * steps_per_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = (
                    learning_rate(step - total, options.served_epochs * steps_per_epoch, 20, options.lr / 4)
                    if as_served
                    else learning_rate(step, total, 2 * steps_per_epoch, options.lr)
                )
            x = shift(train_x[rows], generator) if as_served else augment(train_x[rows], size, generator)
            targets = F.one_hot(train_y[rows], len(names)).float()
            if mixing and torch.rand(1, generator=generator) < options.cutmix:
                x, targets = cutmix(x, targets, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(normalise(x).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            average.update(model, step=step)
            losses.append(loss.item())
        shown = F.interpolate(val_x.float(), size, mode="bilinear", antialias=True)
        top1, top5 = accuracy(average.module, shown, val_y)
        row = {
            "epoch": epoch + 1,
            "size": size,
            "loss": round(float(np.mean(losses)), 4),
            "top1": round(top1, 4),
            "top5": round(top5, 4),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(row), flush=True)
        state = {
            "model": model.state_dict(),
            "average": average.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
    soft, sharp = load_file(options.out / "resampled.safetensors"), _contiguous(average.module)
    mean = {name: (tensor + soft[name]) / 2 if tensor.is_floating_point() else tensor for name, tensor in sharp.items()}
    save_file(mean, options.out / "model.safetensors")


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/convnext_50"))
    parser.add_argument("--epochs", type=int, default=46)
    parser.add_argument("--small-epochs", type=int, default=20, help="the first epochs, which see 48x48 images")
    parser.add_argument("--served-epochs", type=int, default=3, help="epochs after the others, on images as sharp as served")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--cutmix", type=float, default=0.4, help="probability of CutMix per batch, off in the last epochs")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
