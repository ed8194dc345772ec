"""Train the bundled detector `scenes-detector`: a narrow RT-DETR at 256x256 on the eight kinds of shapes of `recipes/scenes.py`.

    python recipes/scene_detector.py --out runs/scene_detector --minutes 60

The network is the RT-DETR of Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection" (arXiv 2304.08069), as transformers
builds it, with a ResNet of basic blocks of 24-24-64-112-128 channels, 1.9 M parameters. Of the set-matching detectors it is the one
for an hour on two CPU cores: its queries start from the best places of a dense prediction instead of learned positions, and
it denoises. Three more things make it quick here:

- one-to-many matching: an auxiliary dense head, thrown away after training, is taught at up to nine places per shape, chosen by
  score and overlap (task alignment, Feng et al., "TOOD", arXiv 2108.07755), so that the features learn from the first step on;
- small pictures first: 128x128, then 192x192, then 256x256;
- Muon, and weights averaged over the last steps.

Scenes are drawn once and kept in `--data`; each comes in its eight symmetries. An interrupted run resumes from `--out`. The
learning rate follows the share of `--minutes` that has passed, so that the run ends in time on any machine. Every evaluation
prints one line of JSON with pycocotools' figures on the validation split. It writes a folder that transformers loads,
`RUN/model/{config.json,model.safetensors}`.
"""

import argparse
import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from muon import optimizers
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import KINDS, Drawn, drawn
from scipy.optimize import linear_sum_assignment
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, generalized_box_iou, generalized_box_iou_loss
from training_run import Run, make_parser
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrMLPPredictionHead
from transformers.utils.logging import disable_progress_bar

SIDE = 256
LESSONS = ((0.0, 128, 32), (0.40, 192, 16), (0.60, 256, 16))
"""From which share of the run on, pictures of which size, and how many in a batch."""
BACKBONE = (24, 24, 64, 112, 128)
WIDTH = 96
PLACES_PER_SHAPE = 9


def build() -> RTDetrForObjectDetection:
    """The network with random weights, initialised for training from scratch.

    transformers draws BatchNorm's gains around 0 and all linear weights with a standard deviation of 0.01, which suits a
    pretrained backbone; here gains are 1 and weights follow the fan-in.
    """
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=BACKBONE[0],
            hidden_sizes=list(BACKBONE[1:]),
            depths=[1, 1, 2, 1],
            layer_type="basic",
            out_indices=[2, 3, 4],
        ),
        freeze_backbone_batch_norms=False,
        encoder_in_channels=list(BACKBONE[2:]),
        encoder_hidden_dim=WIDTH,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        decoder_in_channels=[WIDTH] * 3,
        d_model=WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        decoder_attention_heads=6,
        decoder_n_points=4,
        decoder_layers=3,
        num_queries=50,
        num_denoising=50,
        label_noise_ratio=0.3,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: index for index, kind in enumerate(KINDS)},
    )
    model = RTDetrForObjectDetection(config)
    kept = ("sampling_offsets", "attention_weights", "class_embed", "enc_score_head")
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and not name.endswith("layers.2") and not any(word in name for word in kept):
            nn.init.xavier_uniform_(module.weight)
    return model


@dataclass(frozen=True)
class Targets:
    """The shapes of a batch, padded to the T of the fullest scene."""

    labels: Tensor
    """int64 [B,T]."""
    boxes: Tensor
    """float32 [B,T,4]: centre, width, height in 0..1."""
    real: Tensor
    """bool [B,T]: not padding."""

    @property
    def corners(self) -> Tensor:
        return box_convert(self.boxes, "cxcywh", "xyxy")

    def as_transformers_has_them(self) -> list[dict[str, Tensor]]:
        rows = zip(self.labels, self.boxes, self.real, strict=True)
        return [{"class_labels": labels[real], "boxes": boxes[real]} for labels, boxes, real in rows]


class Scenes:
    """Scenes in memory, given out in random symmetries."""

    def __init__(self, data: Drawn) -> None:
        scenes = data.scenes
        kinds = {kind: index for index, kind in enumerate(KINDS)}
        most = max(len(scene.shapes) for scene in scenes)
        self.pixels = data.pixels
        self.corners = np.zeros((len(scenes), most, 4), np.float32)
        self.labels = np.zeros((len(scenes), most), np.int64)
        self.real = np.zeros((len(scenes), most), bool)
        for row, scene in enumerate(scenes):
            count = len(scene.shapes)
            self.corners[row, :count] = [[edge / scene.size for edge in shape.box] for shape in scene.shapes]
            self.labels[row, :count] = [kinds[shape.kind] for shape in scene.shapes]
            self.real[row, :count] = True

    def batch(self, count: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Targets]:
        """Pixels as float32 [count,3,size,size] in 0..1, and their targets."""
        rows = rng.integers(len(self.pixels), size=count)
        pixels, corners = self.pixels[rows], self.corners[rows]
        for index, (turned, mirrored, flipped) in enumerate(rng.random((count, 3)) < 0.5):
            if turned:
                pixels[index] = pixels[index].transpose(1, 0, 2).copy()
                corners[index] = corners[index][:, [1, 0, 3, 2]]
            if mirrored:
                pixels[index] = pixels[index][:, ::-1].copy()
                corners[index][:, [0, 2]] = 1 - corners[index][:, [2, 0]]
            if flipped:
                pixels[index] = pixels[index][::-1].copy()
                corners[index][:, [1, 3]] = 1 - corners[index][:, [3, 1]]
        boxes = box_convert(torch.from_numpy(corners), "xyxy", "cxcywh")
        targets = Targets(torch.from_numpy(self.labels[rows]), boxes, torch.from_numpy(self.real[rows]))
        return as_floats(pixels, size), targets


def as_floats(pixels: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 [B,H,W,3] as float32 [B,3,size,size] in 0..1, channels last."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


# Losses. Each takes the predictions at chosen places and adds varifocal, L1 and generalised IoU terms, as RT-DETR does.


def varifocal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy towards the overlap that a place reaches, where nothing is wanted focused on what looks sure."""
    score = logits.detach().sigmoid()
    weight = torch.where(wanted > 0, wanted, 0.75 * score.square())
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")


def detection_loss(
    logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor, places: tuple[Tensor, ...], *, share: Tensor | None = None
) -> Tensor:
    """Of predictions [..., C] and [..., 4] whose `places` should show `labels` [P] and the boxes `wanted` [P,4].

    Args:
        share: how well each place suits its shape in 0..1, instead of the overlap of the boxes.
    """
    count = max(len(labels), 1)
    found = boxes[places]
    corners, wanted_corners = box_convert(found, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    giou = generalized_box_iou_loss(corners, wanted_corners, reduction="none")
    quality = torch.zeros_like(logits)
    quality[(*places, labels)] = overlap(corners.detach(), wanted_corners) if share is None else share
    return (varifocal(logits, quality) + 5 * (found - wanted).abs().sum() + 2 * giou.sum()) / count


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes [P,4] with boxes [P,4], corner form."""
    sides = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    shared = sides.prod(-1)
    areas = (one[:, 2:] - one[:, :2]).prod(-1) + (other[:, 2:] - other[:, :2]).prod(-1)
    return shared / (areas - shared).clamp(min=1e-9)


@torch.no_grad()
def one_to_one(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and shape indices of the cheapest assignment of each image of [B,Q,C] and [B,Q,4] (Carion et al., DETR)."""
    images: list[int] = []
    queries: list[int] = []
    shapes: list[int] = []
    score = logits.sigmoid()
    focal = 0.25 * (1 - score).square() * -(score + 1e-8).log() - 0.75 * score.square() * -(1 - score + 1e-8).log()
    corners, wanted = box_convert(boxes, "cxcywh", "xyxy"), targets.corners
    for image, real in enumerate(targets.real):
        labels, shown = targets.labels[image][real], targets.boxes[image][real]
        cost = 2 * focal[image][:, labels] + 5 * torch.cdist(boxes[image], shown, p=1)
        cost = cost - 2 * generalized_box_iou(corners[image], wanted[image][real])
        rows, columns = linear_sum_assignment(cost.nan_to_num(1e4).numpy())
        images += [image] * len(rows)
        queries += rows.tolist()
        shapes += columns.tolist()
    return torch.tensor(images), torch.tensor(queries), torch.tensor(shapes)


@torch.no_grad()
def one_to_many(logits: Tensor, boxes: Tensor, centres: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, place and shape indices and the share in 0..1 of the places of [B,A,C] and [B,A,4] that suit each shape best.

    A place at `centres` [A,2] can be chosen by the shapes whose box it lies in; by several, it goes to the nearest in overlap.
    """
    batch, most = targets.labels.shape
    corners, wanted = box_convert(boxes, "cxcywh", "xyxy"), targets.corners
    iou = torch.stack([box_iou(w, c) for w, c in zip(wanted, corners, strict=True)])  # [B,T,A]
    score = logits.sigmoid().gather(2, targets.labels[:, None].expand(-1, logits.shape[1], -1)).transpose(1, 2)
    inside = ((centres > wanted[:, :, None, :2]) & (centres < wanted[:, :, None, 2:])).all(-1) & targets.real[..., None]
    suits = score.sqrt() * iou.pow(4) * inside
    best = suits.topk(PLACES_PER_SHAPE, -1)
    chosen = torch.zeros_like(inside).scatter(2, best.indices, best.values > 0)
    owner = (iou * chosen).argmax(1, keepdim=True)
    chosen &= torch.arange(most)[None, :, None] == owner
    images, shapes, places = chosen.nonzero(as_tuple=True)
    suits, iou = suits * chosen, iou * chosen
    scale = iou.amax(-1) / suits.amax(-1).clamp(min=1e-9)
    share = (suits * scale[..., None])[images, shapes, places].clamp(0, 1)
    assert batch == len(logits)
    return images, places, shapes, share


class Teacher(nn.Module):
    """The detector with the dense head that only training needs, and the loss of both."""

    def __init__(self, detector: RTDetrForObjectDetection) -> None:
        super().__init__()
        self.detector = detector
        self.dense_score = nn.Linear(WIDTH, len(KINDS))
        self.dense_box = RTDetrMLPPredictionHead(WIDTH, WIDTH, 4, num_layers=3)
        nn.init.constant_(self.dense_score.bias, -math.log(99))
        nn.init.zeros_(self.dense_box.layers[-1].weight)
        nn.init.zeros_(self.dense_box.layers[-1].bias)

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The terms of the loss."""
        memories: list[Tensor] = []
        hook = self.detector.model.enc_output.register_forward_hook(lambda _module, _inputs, memory: memories.append(memory))
        out = self.detector.model(images, labels=targets.as_transformers_has_them())
        hook.remove()
        (memory,) = memories
        height, width = images.shape[-2:]
        levels = tuple((height // stride, width // stride) for stride in self.detector.config.feat_strides)
        anchors, valid = self.detector.model.generate_anchors(levels)
        dense = anchored(self.dense_box(memory), anchors, valid)
        scores = self.dense_score(memory)
        image, place, shape, share = one_to_many(scores.detach(), dense.detach(), anchors.sigmoid()[0, :, :2], targets)
        losses = {
            "dense": detection_loss(
                scores, dense, targets.labels[image, shape], targets.boxes[image, shape], (image, place), share=share
            ),
            "proposals": self._matched(out.enc_topk_logits, out.enc_topk_bboxes, targets),
            "queries": torch.zeros(()),
            "denoising": torch.zeros(()),
        }
        logits, boxes = out.intermediate_logits, out.intermediate_reference_points
        meta = out.denoising_meta_values
        split = meta["dn_num_split"] if meta is not None else [0, logits.shape[2]]
        noisy_logits, logits = logits.split(split, 2)
        noisy_boxes, boxes = boxes.split(split, 2)
        for layer in range(logits.shape[1]):
            losses["queries"] = losses["queries"] + self._matched(logits[:, layer], boxes[:, layer], targets)
            if meta is not None:
                losses["denoising"] = losses["denoising"] + self._denoised(
                    noisy_logits[:, layer], noisy_boxes[:, layer], targets, meta
                )
        return losses

    @staticmethod
    def _matched(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        image, query, shape = one_to_one(logits.detach(), boxes.detach(), targets)
        return detection_loss(logits, boxes, targets.labels[image, shape], targets.boxes[image, shape], (image, query))

    @staticmethod
    def _denoised(logits: Tensor, boxes: Tensor, targets: Targets, meta: dict[str, Any]) -> Tensor:
        queries: tuple[Tensor, ...] = meta["dn_positive_idx"]
        counts = targets.real.sum(1).tolist()
        image = torch.cat([torch.full_like(q, i) for i, q in enumerate(queries)])
        shape = torch.cat([torch.arange(n).repeat(meta["dn_num_group"]) for n in counts])
        return detection_loss(logits, boxes, targets.labels[image, shape], targets.boxes[image, shape], (image, torch.cat(queries)))


def anchored(offsets: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
    """Boxes [B,A,4] in 0..1 from offsets to anchors in logits; anchors that are not valid stay where nothing can choose them."""
    return torch.where(valid, (offsets + torch.where(valid, anchors, 0.0)).sigmoid(), 0.0)


@torch.inference_mode()
def detections(model: RTDetrForObjectDetection, pixels: NDArray[np.uint8], most: int = 100) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each picture of uint8 [N,H,W,3] the scores, labels and corners (0..1) of its best detections."""
    model.eval()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(pixels), 50):
        out = model(as_floats(np.array(pixels[start : start + 50]), SIDE))
        scores, index = out.logits.sigmoid().flatten(1).topk(most)
        query, labels = index // len(KINDS), index % len(KINDS)
        corners = box_convert(out.pred_boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
        rows += list(zip(scores, labels, corners, strict=True))
    return rows


def evaluate(model: RTDetrForObjectDetection, data: Drawn) -> dict[str, float]:
    """COCO's average precision on some scenes, by pycocotools."""
    category = {kind: index for index, kind in enumerate(KINDS)}
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": row} for row in range(len(data.scenes))],
        "categories": [{"id": index, "name": kind} for kind, index in category.items()],
        "annotations": [
            {
                "image_id": row,
                "category_id": category[s.kind],
                "bbox": [s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1]],
                "area": s.extent,
                "iscrowd": 0,
            }
            for row, scene in enumerate(data.scenes)
            for s in scene.shapes
        ],
    }
    for number, annotation in enumerate(truth.dataset["annotations"], start=1):
        annotation["id"] = number
    results = [
        {"image_id": row, "category_id": int(label), "bbox": (box * SIDE).tolist(), "score": float(score)}
        for row, (scores, labels, corners) in enumerate(detections(model, data.pixels))
        for score, label, box in zip(scores, labels, box_convert(corners, "xyxy", "xywh"), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: round(float(run.stats[i]), 4) for i, name in enumerate(("ap", "ap50", "ap75"))}


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    disable_progress_bar()
    data = Scenes(drawn(options.data, "train", options.scenes, size=SIDE))
    validation = drawn(options.data, "validation", options.validation, size=SIDE)
    teacher = Teacher(build()).to(memory_format=torch.channels_last)
    average = ModelEmaV3(teacher.detector, decay=0.998, use_warmup=True, foreach=True)
    muon, adamw = optimizers(
        teacher,
        lr=options.lr,
        weight_decay=options.weight_decay,
        plain=("sampling_offsets", "attention_weights", "score", "class_embed", "layers.2.weight", "embedder.embedder.0"),
    )
    run = Run(
        options.out,
        minutes=options.minutes,
        every=options.evaluate_minutes,
        parts={"teacher": teacher, "average": average.module, "muon": muon, "adamw": adamw},
        steps=options.steps,
    )
    for step in run.steps():
        size, count = next(lesson for share, *lesson in reversed(LESSONS) if run.progress >= share)
        images, targets = data.batch(count, size, np.random.default_rng((options.seed, step)))
        rate = run.rate(options.lr)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        teacher.train()
        losses = teacher(images, targets)
        teacher.zero_grad(set_to_none=True)
        torch.stack(tuple(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(teacher.parameters(), 20.0)
        muon.step()
        adamw.step()
        average.update(teacher.detector, step=step)
        run.note(norm=float(norm), **{name: float(loss) for name, loss in losses.items()})
        if run.is_due:
            run.report(size=size, lr=round(rate, 6), **evaluate(average.module, validation))
            average.module.save_pretrained(options.out / "model")


def main() -> None:
    parser = make_parser(__doc__, Path("runs/scene_detector"))
    parser.add_argument("--validation", type=int, default=200, help="scenes to evaluate on")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
