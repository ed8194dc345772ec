"""Train the bundled dual encoder `scenes-encoder`: a small ViTamin with a small text tower, on the scenes of `recipes/scenes.py`.

    python recipes/scene_encoder.py --out runs/scene_encoder --minutes 60

The image tower is the ViTamin of Chen et al. (arXiv 2404.02132) as `export/vitamin.py` puts it together: 128x128 pixels, stages
of 24 and 48 channels, four blocks of width 128 over 8x8 places. The text tower is open_clip's, three layers of width 128 that read
byte pairs trained on the descriptions, lower case; whatever is in none of them becomes its bytes. 1.5 M parameters together.

It learns as CLIP does, by telling which description belongs to which picture of a batch, and

- beside the other pictures' descriptions, each picture has a wrong one of its own, in which two shapes have exchanged their
  colours: else a list of colours and a list of kinds would do;
- two pictures with the same description are both right;
- heads that are thrown away after training teach what one cannot do without: the places of the image tower, halfway, say what they
  show, and from the vectors of both towers one and the same head reads which colour there is of which kind.

Each picture comes in its eight symmetries, described with places, without, or as counts. An interrupted run resumes from `--out`.
The learning rate follows the share of `--minutes` that has passed. Every evaluation prints one line of JSON, zero-shot accuracy:
of 50 validation scenes at a time, the share for which their own description scores highest among the 50, for each form of
description. It writes a folder, `RUN/model/`, of `open_clip_model.safetensors` and the tokenizer, which `make bundled-encoder`
exports.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from muon import optimizers
from numpy.typing import NDArray
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from scene_views import Batch, Pixels, Seen, Views, resized
from scene_words import AMONG, DESCRIPTIONS, draws
from scenes import COLOURS, KINDS, Scene, drawn
from timm.utils import ModelEmaV3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from training_run import Run, make_parser
from transformers import PreTrainedTokenizerFast

from export.vitamin import register_trunk

DRAWN, SIDE = 256, 128
GRID = SIDE // 16
WIDTH = 128
TRUNK: dict[str, Any] = {"widths": (24, 48, WIDTH), "depths": (1, 2, 4), "heads": 4}
SEEING = 2
"""After how many blocks the places say what they show."""
DIMENSIONS = 128
PAD, END = "<pad>", "</s>"
VOCABULARY, LENGTH = 384, 77
TEXT = {
    "context_length": LENGTH,
    "vocab_size": VOCABULARY,
    "width": 128,
    "heads": 4,
    "layers": 3,
    "pool_type": "eos",
    "eos_id": 1,
}


def build() -> CustomTextCLIP:
    """The network with random weights, as `export/sources/open_clip.py` builds it from the arguments of `make bundled-encoder`."""
    trunk = register_trunk(**TRUNK, size=SIDE)
    vision = {"timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear", "image_size": SIDE}
    return CustomTextCLIP(embed_dim=DIMENSIONS, vision_cfg=vision, text_cfg=TEXT)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of `texts`; every text ends with </s>, from whose place the tower reads its vector."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END) == TEXT["eos_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, TEXT["eos_id"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def vocabulary(scenes: Sequence[Scene]) -> PreTrainedTokenizerFast:
    """The tokenizer of the descriptions of some scenes; the same for the same scenes."""
    return train_tokenizer([form(scene) for scene in scenes[:2000] for form in DESCRIPTIONS.values()])


def tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """int64 [B,L], L the length of the longest, LENGTH at most."""
    found: Tensor = tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    return found


def read(encoder: CustomTextCLIP, ids: Tensor) -> Tensor:
    """What `encoder.encode_text` gives for int64 [B,L] padded to LENGTH; as no token sees those behind it, most padding can go."""
    tower, length = encoder.text, ids.shape[1]
    x = tower.token_embedding(ids) + tower.positional_embedding[:length]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    end = (ids == tower.eos_id).int().argmax(-1)
    vectors: Tensor = x[torch.arange(len(x)), end] @ tower.text_projection
    return vectors


def normalised(pixels: Pixels) -> Tensor:
    """uint8 [B,SIDE,SIDE,3] as the network wants it, float32 [B,3,SIDE,SIDE] channels last."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last)


def confused(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one fault: two shapes of different kinds have exchanged their colours; where no two can, one has another."""
    shapes = list(scene.shapes)
    pairs = [
        (i, j)
        for i, one in enumerate(shapes)
        for j, other in enumerate(shapes[:i])
        if one.colour != other.colour and one.kind != other.kind
    ]
    if pairs:
        i, j = pairs[rng.integers(len(pairs))]
        colours = {i: shapes[j].colour, j: shapes[i].colour}
    elif shapes:
        i = int(rng.integers(len(shapes)))
        colours = {i: [colour for colour in COLOURS if colour != shapes[i].colour][rng.integers(len(COLOURS) - 1)]}
    else:
        colours = {}
    changed = (dataclasses.replace(s, colour=colours.get(i, s.colour)) for i, s in enumerate(shapes))
    return dataclasses.replace(scene, shapes=tuple(changed))


def pairs_of(scenes: Sequence[Scene]) -> Tensor:
    """float32 [B,64]: 1 for each colour that there is of a kind."""
    colours, kinds = list(COLOURS), list(KINDS)
    found = torch.zeros(len(scenes), len(colours) * len(kinds))
    for row, scene in enumerate(scenes):
        found[row, [colours.index(shape.colour) * len(kinds) + kinds.index(shape.kind) for shape in scene.shapes]] = 1
    return found


class Teacher(nn.Module):
    """The encoder with the heads that only training needs, and the loss of all."""

    def __init__(self, encoder: CustomTextCLIP) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen = Seen(WIDTH, GRID)
        self.pairs = nn.Linear(DIMENSIONS, len(COLOURS) * len(KINDS))

    def forward(self, batch: Batch, texts: Sequence[str], wrong: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
        """The terms of the loss; `ids` int64 [2B,L] are those of `texts` and of `wrong`, one of each per picture."""
        halfway: list[Tensor] = []
        trunk = self.encoder.visual.trunk
        hook = trunk.blocks[SEEING - 1].register_forward_hook(lambda _module, _inputs, places: halfway.append(places))
        images = F.normalize(self.encoder.encode_image(normalised(batch.pixels)), dim=-1)
        hook.remove()
        said = F.normalize(read(self.encoder, ids), dim=-1)
        right = said[: len(texts)]
        scale = self.encoder.logit_scale.clamp(max=np.log(100)).exp()
        same = torch.tensor([[one == other for other in (*texts, *wrong)] for one in texts]).float()
        losses = {
            "to_text": matching(scale * images @ said.T, same),
            "to_image": matching(scale * right @ images.T, same[:, : len(texts)]),
        }
        present = pairs_of(batch.scenes)
        length = DIMENSIONS**0.5
        for name, vectors in (("pairs_seen", images), ("pairs_read", right)):
            losses[name] = 5 * F.binary_cross_entropy_with_logits(self.pairs(length * vectors), present)
        return losses | self.seen(halfway[0], torch.arange(GRID * GRID), batch)


def matching(logits: Tensor, right: Tensor) -> Tensor:
    """The cross-entropy of logits [B,N], with as many right answers a row as `right` [B,N] has ones."""
    return -(F.log_softmax(logits, -1) * right / right.sum(-1, keepdim=True)).sum(-1).mean()


def zero_shot(images: NDArray[np.float32], texts: NDArray[np.float32], drawn_rows: Sequence[Sequence[int]]) -> float:
    """The share of images [N,D] whose own text [N,D] fits best among those of their draw."""
    hits = [(images[rows] @ texts[rows].T).argmax(1) == np.arange(len(rows)) for rows in map(list, drawn_rows)]
    return round(float(np.concatenate(hits).mean()), 4)


@torch.inference_mode()
def evaluate(
    encoder: CustomTextCLIP, tokenizer: PreTrainedTokenizerFast, pixels: Pixels, scenes: Sequence[Scene]
) -> dict[str, float]:
    """Zero-shot accuracy by the form of the descriptions."""
    encoder.eval()

    def unit(vectors: list[Tensor]) -> NDArray[np.float32]:
        return F.normalize(torch.cat(vectors), dim=-1).numpy()

    starts = range(0, len(scenes), AMONG)
    images = unit([encoder.encode_image(normalised(pixels[i : i + AMONG])) for i in starts])
    figures = {}
    for name, form in DESCRIPTIONS.items():
        texts = [form(scene) for scene in scenes]
        said = unit([read(encoder, tokens(tokenizer, texts[i : i + AMONG])) for i in starts])
        figures[name] = zero_shot(images, said, draws(texts))
    return figures


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    views = Views(drawn(options.data, "train", options.scenes, size=DRAWN), SIDE, GRID)
    validation = drawn(options.data, "validation", options.validation, size=DRAWN)
    seen = resized(validation.pixels, SIDE)
    tokenizer = vocabulary(views.scenes)
    teacher = Teacher(build()).to(memory_format=torch.channels_last)
    average = ModelEmaV3(teacher.encoder, decay=0.998, use_warmup=True, foreach=True)
    muon, adamw = optimizers(
        teacher,
        lr=options.lr,
        weight_decay=options.weight_decay,
        plain=("positional_embedding", "pos_embed", "conv2_kxk", "seen", "pairs"),
    )
    run = Run(
        options.out,
        minutes=options.minutes,
        every=options.evaluate_minutes,
        parts={"teacher": teacher, "average": average.module, "muon": muon, "adamw": adamw},
        steps=options.steps,
    )
    tokenizer.save_pretrained(options.out / "model")
    for step in run.steps():
        rng = np.random.default_rng((options.seed, step))
        batch = views.batch(options.pictures, rng)
        form = list(DESCRIPTIONS.values())[rng.integers(len(DESCRIPTIONS))]
        texts, wrong = [form(scene) for scene in batch.scenes], [form(confused(scene, rng)) for scene in batch.scenes]
        rate = run.rate(options.lr)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        teacher.train()
        losses = teacher(batch, texts, wrong, tokens(tokenizer, [*texts, *wrong]))
        teacher.zero_grad(set_to_none=True)
        torch.stack(tuple(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(teacher.parameters(), 5.0)
        muon.step()
        adamw.step()
        average.update(teacher.encoder, step=step)
        run.note(norm=float(norm), **{name: float(loss.detach()) for name, loss in losses.items()})
        if run.is_due:
            run.report(lr=round(rate, 6), **evaluate(average.module, tokenizer, seen, validation.scenes))
            save(average.module, options.out / "model")


def save(encoder: CustomTextCLIP, folder: Path) -> None:
    """The weights where `python -m export open_clip/ViTamin-S --checkpoint` looks for the tokenizer beside them."""
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def main() -> None:
    parser = make_parser(__doc__, Path("runs/scene_encoder"))
    parser.add_argument("--validation", type=int, default=500, help="scenes to evaluate on, 50 at a time")
    parser.add_argument("--pictures", type=int, default=64, help="pictures in a batch")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
