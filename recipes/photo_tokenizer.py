"""Train the bundled tokenizer `vq-photo`: a small ViT-VQGAN, 256 x 256 pixels to 32 x 32 tokens of 8,192.

    python recipes/photo_tokenizer.py --photos photos_272.npz --kodak kodak/ --out runs/photo_tokenizer

`--photos` is a NumPy archive of natural photos with a shorter side of 272 pixels or more: `data` (uint8, the JPEG files one after
another) and `offsets` (int64, N + 1); they are not part of this repository. `--kodak` is a directory of the Kodak images, which are
looked at for progress only.

The network is that of Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627), in the variant `nano`:
2 encoder and 4 decoder blocks of 192 channels. It learns from crops of 128 pixels, which lie anywhere in its table of positions,
and at last from whole images of 256: attention that has seen a quarter of the places only is 0.2 dB worse at all of them.
The loss is the logarithm of the squared error, so that it is the mean PSNR that grows, and there is no discriminator: this is a
tokenizer that keeps what was there. Gradients pass the quantizer straight through; codes are running means of what they stand for,
and a code that is hardly used moves to where many latents are (as in Dhariwal et al., "Jukebox", 2020, section 3).

Two stages: `learn`, at a constant learning rate, as long as there is time (`--steps`), and `settle`, the learning rate falling to
nothing (`--settle-steps`), which was worth 0.8 dB and can start from any checkpoint of the first.

It writes `model.safetensors`, which `make bundled-tokenizer` exports.
"""

import argparse
import io
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muon import optimizers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from export.architectures import vit_vqgan

VARIANT = "nano"
CODES = vit_vqgan.VARIANTS[VARIANT].codes
SIDE, PATCH = 256, 8
CROP = {"learn": 128, "settle": SIDE}  # pixels, by stage
MEAN_PIXEL = 0.45
FLOOR = 1e-3  # added to the squared error before its logarithm, so that an even sky is not all that counts


def build() -> vit_vqgan.ViTVQGAN:
    """Weights of the variance that their inputs ask for, and quiet residual branches."""
    network = vit_vqgan.make(VARIANT)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            quiet = name.endswith(("to_out", "net.2"))
            nn.init.trunc_normal_(module.weight, std=(0.3 if quiet else 1.0) * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    first, last = network.encoder.to_patch_embedding[0], network.decoder.to_pixel[1]
    values = 3 * PATCH**2
    nn.init.normal_(first.weight, std=4 * values**-0.5)
    first.bias.data = -MEAN_PIXEL * first.weight.data.sum((1, 2, 3))
    nn.init.normal_(last.weight, std=0.3 * values**-0.5)
    nn.init.constant_(last.bias, MEAN_PIXEL)
    return network


@dataclass
class Window:
    """A square of the grid of positions, `side` positions wide: its part of the table of positions."""

    side: int
    row: int = 0
    column: int = 0

    def of(self, table: Tensor) -> Tensor:
        grid = SIDE // PATCH
        rows, columns = slice(self.row, self.row + self.side), slice(self.column, self.column + self.side)
        return table.view(grid, grid, -1)[rows, columns].reshape(1, self.side**2, -1)


WHOLE = Window(SIDE // PATCH)


def encode(network: vit_vqgan.ViTVQGAN, images: Tensor, window: Window = WHOLE) -> Tensor:
    """Images float32 [B,3,H,W] in 0..1 -> latents of unit length [B,h*w,D]."""
    encoder = network.encoder
    tokens = encoder.to_patch_embedding(images).flatten(2).transpose(1, 2) + window.of(encoder.en_pos_embedding)
    return normalize(network.pre_quant(encoder.transformer(tokens)), dim=-1)


def decode(network: vit_vqgan.ViTVQGAN, codes: Tensor, window: Window = WHOLE) -> Tensor:
    """Codes of unit length [B,h*w,D] -> images float32 [B,3,H,W], not clamped."""
    decoder = network.decoder
    tokens = decoder.transformer(network.post_quant(codes) + window.of(decoder.de_pos_embedding))
    images: Tensor = decoder.to_pixel(tokens.transpose(1, 2).unflatten(2, (window.side, window.side)))
    return images


@dataclass
class Codebook:
    """Unit vectors [N,D], each the direction of the running sum of the latents that it stood for."""

    codes: Tensor
    counts: Tensor = field(default_factory=lambda: torch.ones(CODES))
    decay: float = 0.99

    def __post_init__(self) -> None:
        self.sums = self.codes * self.counts[:, None]

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [...,D] -> indices [...]."""
        return (latents @ self.codes.T).argmax(-1)

    def learn(self, latents: Tensor, indices: Tensor, generator: torch.Generator) -> None:
        """Follow the latents [P,D]; a code of less than a tenth of the mean use moves to one of them."""
        self.counts.lerp_(torch.bincount(indices, minlength=CODES).float(), 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, indices, latents), 1 - self.decay)
        idle = torch.nonzero(self.counts < 0.1 * self.counts.mean()).flatten()
        self.sums[idle] = latents[torch.randint(len(latents), (len(idle),), generator=generator)] * 0.5 * self.counts.mean()
        self.counts[idle] = 0.5 * self.counts.mean()
        self.codes = normalize(self.sums, dim=-1)


def cluster(latents: Tensor, codes: Tensor, rounds: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means from `codes` [N,D] over `latents` [P,D]; a code without any latent begins anew at one."""
    for _ in range(rounds):
        indices = torch.cat([(part @ codes.T).argmax(1) for part in latents.split(8192)])
        sums = torch.zeros_like(codes).index_add_(0, indices, latents)
        anew = latents[torch.randint(len(latents), (len(codes),), generator=generator)]
        codes = torch.where(torch.bincount(indices, minlength=len(codes))[:, None] > 0, normalize(sums, dim=-1), anew)
    return codes


def perplexity(indices: Tensor) -> float:
    """How many codes, equally used, would be as hard to guess."""
    shares = torch.bincount(indices.flatten(), minlength=CODES).double() / indices.numel()
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


def load_photos(path: Path) -> list[Tensor]:
    """Every photo as uint8 [3,H,W]."""
    archive = np.load(path)
    files = (archive["data"][start:end].tobytes() for start, end in itertools.pairwise(archive["offsets"]))
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1) for file in files]


def load_kodak(directory: Path) -> dict[str, Tensor]:
    """The Kodak images [N,3,256,256] in 0..1: the central square resized, and the central 256 x 256 pixels cut."""
    images = [Image.open(file).convert("RGB") for file in sorted(directory.glob("*.png"))]

    def centre(image: Image.Image, side: int) -> Image.Image:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    views = {
        "resized": [centre(image, min(image.size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images],
        "cut": [centre(image, SIDE) for image in images],
    }
    return {name: torch.from_numpy(np.stack(view)).permute(0, 3, 1, 2).float() / 255 for name, view in views.items()}


def crops(photos: list[Tensor], count: int, side: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Squares [3,side,side] in 0..1 from anywhere in any photo, mirrored or not, enlarged or shrunk by up to 1.8."""
    for _ in range(count):
        photo = photos[int(torch.randint(len(photos), (1,), generator=generator))]
        scale = math.exp(float(torch.empty(1).uniform_(math.log(0.55), math.log(1.8), generator=generator)))
        seen = min(int(side * scale), *photo.shape[1:])
        top, left = (int(torch.randint(size - seen + 1, (1,), generator=generator)) for size in photo.shape[1:])
        square = photo[:, top : top + seen, left : left + seen].float() / 255
        if torch.rand(1, generator=generator) < 0.5:
            square = square.flip(-1)
        yield interpolate(square[None], side, mode="bicubic", antialias=True).clamp(0, 1)[0]


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Of each image [N] in dB, as 8 bits hold them."""
    return -10 * ((images.clamp(0, 1) * 255).round() / 255 - references).square().mean((1, 2, 3)).log10()


class Training:
    """What a checkpoint holds, and a step of training."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.photos = load_photos(options.photos)
        self.kodak = load_kodak(options.kodak) if options.kodak else {}
        self.generator = torch.Generator().manual_seed(options.seed)
        self.network = build()
        self.optimizers = optimizers(self.network, lr=options.lr, weight_decay=0.01)
        self.codebook: Codebook | None = None
        self.stage, self.step = "learn", 0
        if options.start:
            self.network.load_state_dict(load_file(options.start))
            self.codebook = Codebook(self.network.codebooks()[0].detach(), torch.full((CODES,), 0.5))
        self.errors: list[float] = []
        self.used: list[Tensor] = []

    @property
    def crop(self) -> int:
        """Pixels along the side of what the stage learns from."""
        return CROP[self.stage]

    def batch(self, count: int) -> Tensor:
        return torch.stack(list(crops(self.photos, count, self.crop, self.generator)))

    def window(self) -> Window:
        side = self.crop // PATCH
        row, column = (int(torch.randint(SIDE // PATCH - side + 1, (1,), generator=self.generator)) for _ in range(2))
        return Window(side, row, column)

    def train_step(self, lr: float) -> None:
        images, window = self.batch(self.options.batch_size * CROP["learn"] ** 2 // self.crop**2), self.window()
        latents = encode(self.network, images, window)
        commitment = latents.new_zeros(())
        codes = latents
        if self.codebook is not None:
            indices = self.codebook.nearest(latents.detach())
            quantized = self.codebook.codes[indices]
            self.used.append(indices.flatten())
            self.codebook.learn(latents.detach().flatten(0, 1), indices.flatten(), self.generator)
            commitment = (latents - quantized).square().sum(-1).mean()
            codes = latents + (quantized - latents).detach()
        error = (decode(self.network, codes, window) - images).square().mean((1, 2, 3))
        self.move((error + FLOOR).log().mean() + self.options.commitment * commitment, lr)
        self.errors.append(float(error.detach().mean()))

    def move(self, loss: Tensor, lr: float) -> None:
        """Differentiate `loss` and move by it."""
        self.network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def latents(self, count: int) -> Tensor:
        """Of `count` crops, [P,D]."""
        return torch.cat([encode(self.network, self.batch(32), self.window()).flatten(0, 1) for _ in range(count // 32)])

    @torch.no_grad()
    def start_codebook(self) -> None:
        """k-means over latents of crops, once the encoder has left its first weights behind."""
        latents = self.latents(320)
        first = latents[torch.randperm(len(latents), generator=self.generator)[:CODES]]
        self.codebook = Codebook(cluster(latents, first, 12, self.generator), torch.full((CODES,), 0.5))

    @torch.no_grad()
    def report(self, seconds: float) -> dict[str, Any]:
        figures: dict[str, Any] = {"stage": self.stage, "step": self.step, "seconds": round(seconds)}
        figures["crops"] = round(-10 * math.log10(float(np.mean(self.errors))), 2)
        if self.codebook is not None:
            figures["perplexity"] = round(perplexity(torch.cat(self.used)))
            for name, images in self.kodak.items():
                codes = self.codebook.codes[self.codebook.nearest(encode(self.network, images))]
                figures[name] = round(float(psnr(decode(self.network, codes), images).mean()), 2)
        self.errors.clear()
        self.used.clear()
        return figures

    def save(self, path: Path) -> None:
        assert self.codebook is not None
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "codes": self.codebook.codes,
            "counts": self.codebook.counts,
            "stage": self.stage,
            "step": self.step,
            "generator": self.generator.get_state(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.codebook = Codebook(state["codes"], state["counts"])
        self.stage, self.step = state["stage"], state["step"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])

    def export(self, path: Path) -> None:
        assert self.codebook is not None
        self.network.set_codebooks(self.codebook.codes[None])
        save_file({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}, path)


def learning_rate(stage: str, step: int, options: argparse.Namespace) -> float:
    """A short rise in the first stage; constant while learning, falling linearly while settling."""
    rise = min(1.0, (step + 1) / 50) if stage == "learn" or options.steps == 0 else 1.0
    fall = 1 - step / options.settle_steps if stage == "settle" else 1.0
    return float(options.lr * rise * fall)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    training = Training(options)
    lengths = {"learn": options.steps, "settle": options.settle_steps}
    stages = list(lengths)
    resumed = options.resume or max(options.out.glob("*.pth"), key=lambda path: path.stat().st_mtime, default=None)
    if resumed is not None:
        training.restore(resumed)
    started = time.monotonic()
    for stage in stages[stages.index(training.stage) :]:
        if stage != training.stage:
            training.stage, training.step = stage, 0
        while training.step < lengths[stage]:
            if training.codebook is None and training.step == options.unquantized_steps:
                training.start_codebook()
            training.train_step(learning_rate(stage, training.step, options))
            training.step += 1
            if training.step % options.report_every == 0:
                print(json.dumps(training.report(time.monotonic() - started)), flush=True)
                if training.codebook is not None:
                    training.save(options.out / f"{stage}.pth")
        training.save(options.out / f"{stage}.pth")
    training.export(options.out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--kodak", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/photo_tokenizer"))
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="by default the newest of --out")
    parser.add_argument("--start", type=Path, metavar="SAFETENSORS", help="weights to begin from")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--settle-steps", type=int, default=1000)
    parser.add_argument("--unquantized-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--commitment", type=float, default=0.25)
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    whole = (CROP["settle"] // CROP["learn"]) ** 2
    if options.batch_size % whole:
        parser.error(f"--batch-size counts crops, {whole} of which are as large as a whole image; give a multiple of {whole}")
    if options.start and (options.resume or any(options.out.glob("*.pth"))):
        parser.error(f"--start begins a run, and {options.resume or options.out} holds one that would go on; give another --out")
    train(options)


if __name__ == "__main__":
    main()
