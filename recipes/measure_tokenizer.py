"""Measure a tokenizer through the REST API, beside raw patches as codes and beside image codecs.

    python recipes/measure_tokenizer.py --images kodak/ --photos photos_272.npz --url http://127.0.0.1:8000 --model vq-photo \\
        --record model_repository --document docs/tokenizers.md --pictures docs/pictures

`--images` is a directory of lossless images, seen twice: the central square resized to 256 x 256, and the central 256 x 256 pixels.
`--photos` is the archive of `photo_tokenizer.py`: how evenly the codes are used is measured on it, and the baseline learns from it.

With `--record` the figures are written into the manifests of the version that answered, with `--document` between the marks of that
file, and with `--pictures` the curves and the images side by side are drawn there anew.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from measure_accuracy import record
from numpy.typing import NDArray
from patch_codes import Floats, cluster, patches, reconstruct
from PIL import Image
from rate_distortion import CODECS, Pixels, Point, at_rate, beside, caption, curve, decoded, encode_png, plot, side_by_side

from app.client import DEFAULT_URL, Client
from app.fidelity import psnr, ssim
from app.token_format import bits_per_token, pack

SIDE = 256
BATCH = 25
BASELINE_PATCHES, BASELINE_ROUNDS = 32, 5  # patches to learn from for each code, and rounds over them
SHOWN = 4  # images side by side
VIEWS = {"resized": "central square, resized", "cut": "central 256 x 256 pixels"}
ROLES = ("tokenize", "detokenize")
MARKS = re.compile(r"(?<=<!-- figures: written by recipes/measure_tokenizer.py -->\n).*(?=<!-- end of figures -->)", re.DOTALL)

Views = Mapping[str, Sequence[Image.Image]]
Uses = NDArray[np.int64]


@dataclass(frozen=True)
class Restored:
    """What became of one image: how close it is, and the bits per pixel of its container and of the tokens alone."""

    pixels: Pixels
    psnr: float
    ssim: float
    container: float = math.nan
    tokens: float = math.nan


@dataclass(frozen=True)
class Measured:
    """By view, then by image: what came back from the service and from the baseline. `uses` counts each code over the photos."""

    model: str
    version: int
    restored: Mapping[str, Sequence[Restored]]
    baseline: Mapping[str, Sequence[Restored]]
    curves: Mapping[str, Mapping[str, Sequence[Point]]]
    uses: Uses
    photos: int

    def point(self, view: str) -> Point:
        """The tokenizer's place beside the curves."""
        images = self.restored[view]
        return Point(*(fmean(getattr(each, name) for each in images) for name in ("container", "tokens", "psnr")))


def views(image: Image.Image) -> dict[str, Image.Image]:
    """The two squares of an image, by the name of the view."""

    def centre(side: int) -> Image.Image:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    return {"resized": centre(min(image.size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC), "cut": centre(SIDE)}


def perplexity(uses: Uses) -> float:
    """How many codes, equally used, would be as hard to guess as codes used so often: 1 to their number."""
    shares = uses[uses > 0] / uses.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def photos_of(path: Path) -> list[bytes]:
    """Every encoded photo of the archive."""
    archive = np.load(path)
    data = archive["data"]
    return [data[start:end].tobytes() for start, end in itertools.pairwise(archive["offsets"])]


def restore(client: Client, image: Image.Image, model: str) -> Restored:
    """One image through the service and back."""
    file = encode_png(image)
    grids = client.tokenize(file, model=model).grids
    (item,) = client.reconstruct(file, model=model).results
    if item.reconstruction is None or item.psnr is None or item.ssim is None:
        raise SystemExit(f"An image was not reconstructed: {item.error}.")
    container, tokens = 8 * len(pack(grids)) / SIDE**2, grids.tokens.size * bits_per_token(grids.size) / SIDE**2
    return Restored(decoded(item.reconstruction.data), item.psnr, item.ssim, container, tokens)


def use_of_codes(client: Client, photos: Sequence[bytes], model: str) -> Uses:
    """How often each code of the first codebook stands for a piece of a photo."""
    batches = (client.tokenize(photos[start : start + BATCH], model=model).grids for start in range(0, len(photos), BATCH))
    counts = [np.bincount(grids.tokens[:, 0].ravel(), minlength=grids.size) for grids in batches]
    total: Uses = np.sum(counts, axis=0)
    return total


def learn_patches(photos: Sequence[bytes], count: int, random: np.random.Generator) -> Floats:
    """As many codes by k-means on patches drawn from all photos."""
    everything = [patches(decoded(photo)).astype(np.uint8) for photo in photos]
    share = count * BASELINE_PATCHES / sum(map(len, everything))
    drawn = [each[random.random(len(each)) < share] for each in everything]
    *_, (codes, _) = cluster(np.concatenate(drawn).astype(np.float32), count, BASELINE_ROUNDS, random)
    return codes


def by_patches(image: Image.Image, codes: Floats) -> Restored:
    original = np.asarray(image)
    pixels = reconstruct(original, codes)
    return Restored(pixels, psnr(pixels, original), ssim(pixels, original))


def measure(client: Client, images: Views, photos: Sequence[bytes], model: str) -> Measured:
    answer = client.tokenize(photos[0], model=model)
    restored = {view: [restore(client, image, model) for image in images[view]] for view in VIEWS}
    uses = use_of_codes(client, photos, model)
    curves = {view: {codec.name: curve(codec, images[view]) for codec in CODECS} for view in VIEWS}
    codes = learn_patches(photos, answer.grids.size, np.random.default_rng(0))
    baseline = {view: [by_patches(image, codes) for image in images[view]] for view in VIEWS}
    return Measured(answer.model, answer.version, restored, baseline, curves, uses, len(photos))


def figures(measured: Measured) -> dict[str, float]:
    """The model's own, as a manifest holds them."""
    found: dict[str, float] = {"images": len(measured.restored["resized"])}
    for view, restored in measured.restored.items():
        found[f"psnr_{view}"] = round(fmean(each.psnr for each in restored), 2)
        found[f"ssim_{view}"] = round(fmean(each.ssim for each in restored), 3)
    used = round(float(np.mean(measured.uses > 0)), 3)
    return found | {"photos": measured.photos, "perplexity": round(perplexity(measured.uses)), "codes_used": used}


def document(measured: Measured, names: Sequence[str]) -> str:
    """The figures as Markdown: every image, the means beside the baseline's, the codecs at the same rate, the codebook."""
    lines = [f"| | {' | '.join(f'{title}: PSNR | SSIM' for title in VIEWS.values())} |", "| --- | --: | --: | --: | --: |"]
    for index, name in enumerate(names):
        lines.append(_row(name, {view: restored[index : index + 1] for view, restored in measured.restored.items()}))
    lines.append(_row(f"**{measured.model}, mean**", measured.restored))
    lines.append(_row("k-means on 8x8 patches, mean", measured.baseline))
    points = {view: measured.point(view) for view in VIEWS}
    lines += ["", f"| PSNR at the rate of the tokenizer | {' | '.join(VIEWS.values())} |", "| --- | --: | --: |"]
    for title, rate in (("whole file", "rate"), ("coded data", "coded_rate")):
        bits = getattr(points["resized"], rate)
        for codec in CODECS:
            levels = [at_rate(measured.curves[view][codec.name], getattr(points[view], rate), rate) for view in VIEWS]
            cells = ("-" if math.isnan(level) else f"{level:.2f} dB" for level in levels)
            lines.append(f"| {codec.name}, {title} of {bits:.3f} bits per pixel | {' | '.join(cells)} |")
    codes, evenly = len(measured.uses), perplexity(measured.uses)
    lines += [
        "",
        f"Over {measured.photos} photos {np.mean(measured.uses > 0):.1%} of the {codes:,} codes are used, with a perplexity of "
        f"{evenly:,.0f}, {evenly / codes:.0%} of the codebook.",
    ]
    return "\n".join(lines) + "\n"


def _row(title: str, restored: Mapping[str, Sequence[Restored]]) -> str:
    means = [(fmean(each.psnr for each in images), fmean(each.ssim for each in images)) for images in restored.values()]
    return f"| {title} | {' | '.join(f'{level:.2f} dB | {likeness:.3f}' for level, likeness in means)} |"


def draw(measured: Measured, images: Views, directory: Path) -> None:
    """`rate-distortion.png` and `side-by-side.jpg`."""
    panels = {title: (measured.curves[view], measured.point(view)) for view, title in VIEWS.items()}
    plot(panels, measured.model, directory / "rate-distortion.png")
    rows = []
    for image, restored in list(zip(images["resized"], measured.restored["resized"], strict=True))[:SHOWN]:
        size = round(restored.container * SIDE**2 / 8)
        ours = (caption(measured.model, size, restored.psnr), restored.pixels)
        rows.append([("original", np.asarray(image)), ours, *beside(image, size)])
    side_by_side(rows, directory / "side-by-side.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--model", default="vq-photo")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifests there")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the figures between the marks of this file")
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="draw the pictures there")
    options = parser.parse_args()
    files = sorted(options.images.glob("*.png"))
    squares = [views(Image.open(file).convert("RGB")) for file in files]
    images = {view: [square[view] for square in squares] for view in VIEWS}
    with Client(options.url) as client:
        measured = measure(client, images, photos_of(options.photos), options.model)
    text = document(measured, [file.stem for file in files])
    print(f"{measured.model}@{measured.version}: {json.dumps(figures(measured))}\n\n{text}")
    if options.pictures:
        draw(measured, images, options.pictures)
    if options.document:
        options.document.write_text(MARKS.sub(lambda _: text, options.document.read_text()))
    for role in ROLES if options.record else ():
        record(options.record / f"{measured.model}.{role}" / str(measured.version), figures(measured))


if __name__ == "__main__":
    main()
