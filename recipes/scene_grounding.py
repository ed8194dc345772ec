"""Train the bundled grounding model `scenes-grounding`: a small TransVG++ that finds what the phrases of `recipes/scenes.py` mean.

    python recipes/scene_grounding.py --out runs/scene_grounding --minutes 60

The network is the TransVG++ of Deng et al. (arXiv 2206.06619) as `export/architectures/transvg_pp.py` builds it: 160x160 pixels in
patches of 16, width 128, six blocks of which the last three look at the words, a BERT of two layers; 1.9 M parameters in all. Its
vocabulary is trained on the phrases of the training scenes.

A [reg] token alone, told only by how much its box is off, would learn slowly from nothing. So the patches are taught too, by
heads that are thrown away after training:

- first what each patch shows, kind, colour and box, by the blocks before the words: alone for the first sixth of the run;
- then which patches the noun fits and which belong to the anchor of a relation, after the first block that looks at the words;
- and which belong to the shape that is meant, after the last block.

Each picture comes with one phrase, and mirrored with left and right exchanged in the words, and upside down likewise. What is
learnt last is the kind of a shape, so pictures count for more than phrases, and kinds for more than colours.

An interrupted run resumes from `--out`. The learning rate follows the share of `--minutes` that has passed. Every evaluation prints
one line of JSON with the accuracy at an overlap of 0.5 on validation phrases, in all and by form. It writes
`model.safetensors` and `tokenizer.json`, which `python -m export transvg_pp` takes with the arguments of `SIZES`.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from muon import optimizers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scenes import COLOURS, FORMS, KINDS, Drawn, Phrase, Scene, choose, drawn, mirrored, phrases, upside_down
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss
from training_run import Run, make_parser
from transformers import BertTokenizer

from export.architectures import transvg_pp
from export.bert_tokenizer import train_tokenizer

DRAWN = 256
SIDE, PATCH, WIDTH, LENGTH = 160, 16, 128, 20
GRID = SIDE // PATCH
SEEING = 3
"""How many blocks there are before the first that looks at the words."""
SIZES = {
    "width": WIDTH,
    "heads": 4,
    "depth": 6,
    "modulated": (3, 4, 5),
    "image_size": SIDE,
    "patch": PATCH,
    "text": (2, 128, 4, 256),
    "positions": LENGTH,
    "length": LENGTH,
}
SEEING_SHARE = 1 / 6


def build(vocabulary: int) -> transvg_pp.TransVGPlusPlus:
    """The network with random weights; positions begin as sines, from which places can be read."""
    model = transvg_pp.make(vocabulary=vocabulary, **SIZES)
    with torch.no_grad():
        model.visual_branch.pos_embed.copy_(sines(WIDTH, GRID))
    for name, module in model.visual_branch.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("lang_modulation.proj"):
                nn.init.normal_(module.weight, std=0.02)
    return model


def sines(width: int, side: int) -> Tensor:
    """Float32 [1,width,side,side]: sines and cosines of the rows and columns, of wavelengths from four frames to two patches."""
    waves = torch.logspace(math.log10(0.25), math.log10(side / 2), width // 4) * 2 * math.pi
    phase = (torch.arange(side) + 0.5) / side * waves[:, None]
    table = torch.cat([phase.sin(), phase.cos()])
    rows, columns = table[:, :, None].expand(-1, -1, side), table[:, None, :].expand(-1, side, -1)
    return torch.cat([rows, columns])[None]


@dataclass(frozen=True)
class Batch:
    """B pictures of at most T shapes, and P phrases about them."""

    images: Tensor
    """float32 [B,3,SIDE,SIDE], normalised."""
    cover: Tensor
    """float32 [B,T,GRID*GRID]: the share of each patch that each shape covers."""
    kinds: Tensor
    """int64 [B,T]."""
    colours: Tensor
    """int64 [B,T]."""
    boxes: Tensor
    """float32 [B,T,4]: centre, width, height in 0..1."""
    picture: Tensor
    """int64 [P]: which picture a phrase is about."""
    ids: Tensor
    """int64 [P,LENGTH]."""
    mask: Tensor
    """int64 [P,LENGTH]."""
    target: Tensor
    """int64 [P]: the shape that is meant."""
    among: Tensor
    """float32 [P,T]: 1 for shapes that the noun fits."""
    anchor: Tensor
    """float32 [P,T]: 1 for the shape that a relation is to."""


class Lessons:
    """Batches out of drawn scenes, mirrored and upside down, with their phrases."""

    def __init__(self, data: Drawn, tokenizer: BertTokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.most = max(len(scene.shapes) for scene in data.scenes)
        self.kinds = {kind: index for index, kind in enumerate(KINDS)}
        self.colours = {colour: index for index, colour in enumerate(COLOURS)}

    def batch(self, count: int, phrases_each: int, rng: np.random.Generator) -> Batch:
        """`count` pictures; with no phrases each, only what the first lesson needs."""
        rows = rng.integers(len(self.data.scenes), size=count)
        pixels, owners = self.data.pixels[rows], self.data.owners[rows][:, 2::4, 2::4]
        kinds, colours = (np.zeros((count, self.most), np.int64) for _ in range(2))
        corners = np.zeros((count, self.most, 4), np.float32)
        texts: list[str] = []
        said: list[tuple[int, Phrase]] = []
        for index, row in enumerate(rows):
            scene = self.data.scenes[row]
            shapes = scene.shapes
            kinds[index, : len(shapes)] = [self.kinds[shape.kind] for shape in shapes]
            colours[index, : len(shapes)] = [self.colours[shape.colour] for shape in shapes]
            corners[index, : len(shapes)] = [[edge / scene.size for edge in shape.box] for shape in shapes]
            turns: list[Callable[[str], str]] = []
            if rng.random() < 0.5:
                pixels[index], owners[index] = pixels[index][:, ::-1].copy(), owners[index][:, ::-1].copy()
                corners[index][:, [0, 2]] = 1 - corners[index][:, [2, 0]]
                turns.append(mirrored)
            if rng.random() < 0.5:
                pixels[index], owners[index] = pixels[index][::-1].copy(), owners[index][::-1].copy()
                corners[index][:, [1, 3]] = 1 - corners[index][:, [3, 1]]
                turns.append(upside_down)
            for phrase in some(scene, phrases_each, rng):
                text = phrase.text
                for turn in turns:
                    text = turn(text)
                texts.append(text)
                said.append((index, phrase))
        among, anchor = (torch.zeros(len(said), self.most) for _ in range(2))
        for index, (_, phrase) in enumerate(said):
            among[index, list(phrase.among)] = 1
            if phrase.anchor is not None:
                anchor[index, phrase.anchor] = 1
        ids, mask = tokens(self.tokenizer, texts)
        shown = torch.from_numpy(owners)[:, None] == torch.arange(1, self.most + 1)[:, None, None]
        return Batch(
            images=normalised(pixels),
            cover=F.interpolate(shown.float(), size=(GRID, GRID), mode="area").flatten(2),
            kinds=torch.from_numpy(kinds),
            colours=torch.from_numpy(colours),
            boxes=box_convert(torch.from_numpy(corners), "xyxy", "cxcywh"),
            picture=torch.tensor([index for index, _ in said], dtype=torch.int64),
            ids=ids,
            mask=mask,
            target=torch.tensor([phrase.target for _, phrase in said], dtype=torch.int64),
            among=among,
            anchor=anchor,
        )


def some(scene: Scene, count: int, rng: np.random.Generator) -> list[Phrase]:
    """Random phrases of a scene, its forms alike often."""
    if not count:
        return []
    by_form: dict[str, list[Phrase]] = defaultdict(list)
    for phrase in phrases(scene):
        by_form[phrase.form].append(phrase)
    forms = sorted(by_form)
    picked = [by_form[forms[i]] for i in rng.integers(len(forms), size=count)] if forms else []
    return [those[rng.integers(len(those))] for those in picked]


def tokens(tokenizer: BertTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [P,LENGTH]."""
    if not texts:
        return torch.zeros(2, 0, LENGTH, dtype=torch.int64).unbind()
    found = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def normalised(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B,H,W,3] as the network wants it, float32 [B,3,SIDE,SIDE]."""
    mean, std = (torch.tensor(transvg_pp.PREPROCESSING[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return (images / 255 - mean) / std


class Teacher(nn.Module):
    """The network with the heads that only training needs, and the loss of all."""

    def __init__(self, grounder: transvg_pp.TransVGPlusPlus) -> None:
        super().__init__()
        self.grounder = grounder
        self.what = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(KINDS) + 1 + len(COLOURS) + 1 + 4))
        self.fits = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.meant = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss; without phrases, that of the first lesson alone."""
        visual = self.grounder.visual_branch
        patches = (visual.patch_embed(batch.images) + visual.pos_embed).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.grounder.reg_token.expand(len(patches), -1, -1), patches], 1)
        for block in visual.blocks[:SEEING]:
            tokens = block(tokens, tokens, None)
        losses = self._seen(self.what(tokens[:, 1:]), batch)
        if not len(batch.picture):
            return losses
        words = self.grounder.text_proj(self.grounder.language_branch(batch.ids, batch.mask))
        unseen = torch.where(batch.mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        tokens = tokens[batch.picture]
        cover = (batch.cover[batch.picture] >= 0.3).float()  # [P,T,N]
        for index, block in enumerate(visual.blocks[SEEING:], start=1):
            tokens = block(tokens, words, unseen)
            if index == 1:
                wanted = torch.stack([batch.among, batch.anchor], 1) @ cover
                losses["fits"] = 10 * F.binary_cross_entropy_with_logits(self.fits(tokens[:, 1:]).mT, wanted.clamp(max=1))
        wanted = cover[torch.arange(len(cover)), batch.target]
        losses["meant"] = 10 * F.binary_cross_entropy_with_logits(self.meant(tokens[:, 1:])[..., 0], wanted)
        boxes = self.grounder.prediction_head(visual.norm(tokens[:, 0])).sigmoid()
        losses["box"] = box_loss(boxes, batch.boxes[batch.picture, batch.target])
        return losses

    @staticmethod
    def _seen(found: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of what the patches say of themselves, [B,N,...]."""
        kinds, colours, boxes = found.split([len(KINDS) + 1, len(COLOURS) + 1, 4], -1)
        share, owner = batch.cover.max(1)  # [B,N]
        owned = share >= 0.25
        losses = {}
        for name, weight, logits, labels in (("kind", 3, kinds, batch.kinds), ("colour", 1, colours, batch.colours)):
            wanted = torch.where(owned, labels.gather(1, owner) + 1, 0)
            losses[name] = weight * F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        wanted_boxes = batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        losses["extent"] = 0.5 * box_loss(boxes.sigmoid()[owned], wanted_boxes[owned])
        return losses


def box_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over boxes [...,4] of five times L1 and twice the generalised IoU loss."""
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted))
    giou = generalized_box_iou_loss(*corners, reduction="mean")
    return 5 * (found - wanted).abs().sum(-1).mean() + 2 * giou


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: BertTokenizer, data: Drawn, each: int = 2) -> dict[str, float]:
    """The share of phrases whose box overlaps the right one by a half at least, in all and by form."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(data.scenes), 50):
        scenes = data.scenes[start : start + 50]
        said = [(row, phrase) for row, scene in enumerate(scenes) for phrase in choose(scene, each)]
        pictures = normalised(np.array(data.pixels[start : start + 50]))[[row for row, _ in said]]
        boxes = model(pictures, *tokens(tokenizer, [phrase.text for _, phrase in said]))
        corners = box_convert(boxes, "cxcywh", "xyxy").numpy() * DRAWN
        for (row, phrase), found in zip(said, corners, strict=True):
            right[phrase.form].append(overlap(found, np.asarray(scenes[row].shapes[phrase.target].box)) >= 0.5)
    everything = [hit for hits in right.values() for hit in hits]
    return {"accuracy": share_of(everything)} | {form: share_of(right[form]) for form in FORMS if right[form]}


def share_of(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def overlap(one: NDArray[np.float32], other: NDArray[np.int64]) -> float:
    """Intersection over union of two boxes in corner form."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in range(2))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return float(shared / (areas - shared))


def vocabulary(data: Drawn) -> BertTokenizer:
    """The tokenizer of the phrases of some scenes; the same for the same scenes."""
    texts = sorted({phrase.text for scene in data.scenes[:2000] for phrase in phrases(scene)})
    return train_tokenizer(texts, 160)


def without_early_looks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network that looked at the words in earlier blocks, less those looks."""
    early = tuple(f"visual_branch.blocks.{index}.lang_modulation." for index in range(SEEING))
    return {name: tensor for name, tensor in weights.items() if not name.startswith(early)}


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    data = drawn(options.data, "train", options.scenes, size=DRAWN)
    validation = drawn(options.data, "validation", options.validation, size=DRAWN)
    tokenizer = vocabulary(data)
    lessons = Lessons(data, tokenizer)
    teacher = Teacher(build(len(tokenizer)))
    if options.start:
        teacher.grounder.load_state_dict(without_early_looks(load_file(options.start)))
    average = ModelEmaV3(teacher.grounder, decay=0.998, use_warmup=True, foreach=True)
    muon, adamw = optimizers(
        teacher,
        lr=options.lr,
        weight_decay=options.weight_decay,
        plain=("pos_embed", "reg_token", "what", "fits", "meant", "prediction_head.layers.2", "pooler"),
    )
    run = Run(
        options.out,
        minutes=options.minutes,
        every=options.evaluate_minutes,
        parts={"teacher": teacher, "average": average.module, "muon": muon, "adamw": adamw},
        steps=options.steps,
    )
    tokenizer.backend_tokenizer.save(str(options.out / "tokenizer.json"))
    for step in run.steps():
        rng = np.random.default_rng((options.seed, step))
        seeing = not options.start and run.progress < SEEING_SHARE
        batch = lessons.batch(2 * options.pictures, 0, rng) if seeing else lessons.batch(options.pictures, options.phrases, rng)
        rate = run.rate(options.lr)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        teacher.train()
        losses = teacher(batch)
        teacher.zero_grad(set_to_none=True)
        torch.stack(tuple(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(teacher.parameters(), 5.0)
        muon.step()
        adamw.step()
        average.update(teacher.grounder, step=step)
        run.note(norm=float(norm), **{name: float(loss) for name, loss in losses.items()})
        if run.is_due:
            run.report(lr=round(rate, 6), **evaluate(average.module, tokenizer, validation))
            weights = {name: tensor.contiguous() for name, tensor in average.module.state_dict().items()}
            save_file(weights, options.out / "model.safetensors")


def main() -> None:
    parser = make_parser(__doc__, Path("runs/scene_grounding"))
    parser.add_argument("--validation", type=int, default=500, help="scenes to evaluate on, two phrases each")
    parser.add_argument("--pictures", type=int, default=48, help="pictures in a batch, twice as many in the first lesson")
    parser.add_argument(
        "--start", type=Path, metavar="SAFETENSORS", help="weights to begin from, with phrases at once; given again to go on"
    )
    parser.add_argument("--phrases", type=int, default=1, help="phrases for each picture of a batch")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
