"""Train the bundled chat model `scenes-chat`: a tiny Qwen2.5-VL that talks about the scenes of `recipes/scenes.py`.

    python recipes/scene_chat.py --out runs/scene_chat --minutes 60

The network is the Qwen2.5-VL of transformers: a vision tower of five blocks of width 128 that sees at most 168x168 pixels in
patches of 14, four of which make one token, and a decoder of four layers of width 192 with a byte-level vocabulary of 512; 2.8 M
parameters. It describes a scene, answers the questions of `scene_words.py`, and says where something is as Qwen2.5-VL does: to
"Locate the red circle, output its bbox coordinates using JSON format.", `{"bbox_2d": [left, top, right, bottom]}` in pixels of
what it saw.

Two sizes are so small that the published settings would not do. The published rotary positions give columns of an image the
lowest frequencies, which tell nothing over six columns; here time, rows and columns take frequencies in turn. And all blocks of
the tower look at all patches, as a window would hold most of them anyway.

What makes it quick to train:

- the tower alone learns for the first quarter of the run, by a head that is thrown away, what each patch shows: kind, colour and
  edges of the shape there, and of the shape whose middle it holds. The decoder's second layer is taught the same of the image's
  tokens afterwards, edges then as they lie in the frame;
- the third layer is taught, before the first word of an answer, which patches show the shapes that the question is about;
- all questions about a picture share its tokens: they lie behind one another in one row, and none sees another;
- only answers have a loss, each weighing as the root of its length; questions become ids once;
- Muon, and weights averaged over the last steps.

Each picture comes in its eight symmetries, with the questions that are then right. An interrupted run resumes from `--out`. The
learning rate follows the share of `--minutes` that has passed. Every evaluation prints one line of JSON: on validation scenes the
share of questions whose answer is exactly right, in all and by kind, and that of boxes with an overlap of 0.5 at least. It writes a
folder that transformers loads, `RUN/model/`, which `make bundled-chat` exports.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from muon import optimizers
from numpy.typing import NDArray
from scene_views import LEAST_COVER, Batch, Pixels, Seen, Views, resized
from scene_words import (
    DESCRIPTION_QUESTIONS,
    QUESTION_KINDS,
    choose_phrase,
    choose_question,
    describe,
    held_out_phrases,
    held_out_questions,
    plural,
    simple_phrases,
)
from scenes import COLOURS, KINDS, Box, Phrase, Scene, drawn
from timm.utils import ModelEmaV3
from tokenizers import Tokenizer
from torch import Tensor, nn
from training_run import Run, make_parser
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from app.chat_grounding import BOX, QUESTION
from app.generate import Architecture, PreparedImage, Prompt, rope_positions, vision_rotary
from export.evaluate.grounding import ENOUGH, overlap
from export.sources.qwen2_5_vl import END_OF_TURN, make_config, train_tokenizer, write_files

DRAWN, SIDE, PATCH, MERGE = 256, 168, 14, 2
GRID = SIDE // PATCH
TOKENS = (GRID // MERGE) ** 2
MOST_PIXELS = (SIDE + 2) ** 2
"""Somewhat more than SIDE squared, so that rounding takes no row of patches from a square image."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCABULARY, LENGTH = 512, 1024
WIDTH, SEEING_WIDTH, SEEING_HEADS = 192, 128, 4
HEAD = SEEING_WIDTH // SEEING_HEADS
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "mrope_section": [1] * 16},
}
VISION: dict[str, Any] = {
    "depth": 5,
    "hidden_size": SEEING_WIDTH,
    "intermediate_size": 256,
    "num_heads": SEEING_HEADS,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "fullatt_block_indexes": list(range(5)),
    "initializer_range": 0.05,
}
SEEING_SHARE = 0.25
TAUGHT, POINTING = 2, 3
"""The layers of the decoder that are taught what the image's tokens show, and which of them a question is about."""
BEFORE_IMAGE, BEHIND_IMAGE = "<|im_start|>user\n<|vision_start|>", "<|vision_end|>"
BEFORE_ANSWER = f"{END_OF_TURN}\n<|im_start|>assistant\n"
BOX_TOKENS = 40


def vocabulary(scenes: Sequence[Scene]) -> Tokenizer:
    """Words of questions and answers, and every byte; the same for the same scenes."""
    rng = np.random.default_rng(0)
    texts = ["user\n", "assistant\n", *DESCRIPTION_QUESTIONS, *COLOURS, *KINDS, *map(plural, KINDS)]
    for scene in scenes[:1000]:
        for kind in QUESTION_KINDS:
            if (question := choose_question(scene, kind, rng)) is not None:
                texts += [question.text, question.answer]
        texts.append(describe(scene))
        texts += [text for phrase in simple_phrases(scene)[:4] for text in location(scene, phrase)]
    return train_tokenizer(texts, VOCABULARY)


def location(scene: Scene, phrase: Phrase) -> tuple[str, str]:
    """Question and answer about where a phrase leads, in pixels of what the network sees."""
    edges = ", ".join(str(round(edge * SIDE / scene.size)) for edge in scene.shapes[phrase.target].box)
    return QUESTION.format(phrase=phrase.text), f'{{"bbox_2d": [{edges}]}}'


def build(tokenizer: Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The network with random weights."""
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**make_config(tokenizer, TEXT, VISION)))


def save(network: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """What `python -m export transformers/FOLDER` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, make_config(tokenizer, TEXT, VISION), tokenizer, MOST_PIXELS)
    network.save_pretrained(folder)


# Seeing, all pictures of a batch at once: the library goes through them one by one.

ARCHITECTURE = Architecture(
    max_length=LENGTH,
    image_token_id=-1,
    end_token_ids=(),
    patch_size=PATCH,
    merge_size=MERGE,
    window_size=112,
    vision_head_dim=HEAD,
    vision_rope_theta=10_000.0,
)
ORDER = torch.arange(GRID * GRID).view(GRID // MERGE, MERGE, GRID // MERGE, MERGE).transpose(1, 2).flatten()
"""int64 [GRID*GRID]: the place in rows of each patch in the order of the tower, where those of one token are side by side."""


def patches(pixels: Pixels) -> Tensor:
    """uint8 [B,SIDE,SIDE,3] as float32 [B,GRID*GRID,3*PATCH*PATCH], normalised and in the order of the tower."""
    images = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    rows = images.view(-1, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4).flatten(1, 2)
    return rows[:, ORDER].flatten(2)


def see(tower: Any, seen: Tensor) -> Tensor:
    """float32 [B,TOKENS,width] of `patches`: what `tower` gives for square pictures, each of which is both of its frames."""
    cos, sin = (torch.from_numpy(table) for table in vision_rotary((1, GRID, GRID), ARCHITECTURE))
    x = seen @ tower.patch_embed.proj.weight.sum(2).flatten(1).T
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        q, k = (part * cos + torch.cat((-part[..., HEAD // 2 :], part[..., : HEAD // 2]), -1) * sin for part in (q, k))
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    merged: Tensor = tower.merger(x.contiguous())
    return merged.view(len(seen), TOKENS, -1)


# Reading and answering.


@dataclass(frozen=True)
class Rows:
    """For each of B pictures a row of its image's tokens and of its questions and answers behind one another."""

    ids: Tensor
    """int64 [B,L]."""
    segments: Tensor
    """int64 [B,L]: 0 up to the end of the image, then 1 for the first question and its answer, and so on; -1 for padding."""
    positions: Tensor
    """int64 [3,B,L]: in time, down and across; each question goes on behind the image."""
    labels: Tensor
    """int64 [B,L]: the token that an answer goes on with; -1 where there is none to learn."""
    weights: Tensor
    """float32 [B,L]: of the labels in the loss."""
    asked: Tensor
    """int64 [Q,2]: of each question in turn its row, and there the last place before its answer."""

    @property
    def mask(self) -> Tensor:
        """bool [B,1,L,L]: who sees whom."""
        one, other = self.segments[:, :, None], self.segments[:, None]
        earlier = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool).tril()
        return (((one == other) | (other == 0)) & earlier)[:, None]


class Reader:
    """Makes rows of conversations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id(END_OF_TURN)
        self.image = tokenizer.token_to_id("<|image_pad|>")
        before, behind = self.encode(BEFORE_IMAGE), self.encode(BEHIND_IMAGE)
        self.shared = (*before, *[self.image] * TOKENS, *behind)
        picture = PreparedImage(np.empty((GRID * GRID, 0), np.uint8), (1, GRID, GRID))
        prompt = Prompt(
            np.where(np.array(self.shared) == self.image, ARCHITECTURE.image_token_id, np.array(self.shared)), (picture,)
        )
        positions, self.next = rope_positions(prompt, ARCHITECTURE)
        self.positions = torch.from_numpy(positions)
        self.at = slice(len(before), len(before) + TOKENS)
        """Where in a row the image's tokens are."""
        self.question = cache(lambda text: self.encode(text + BEFORE_ANSWER))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def answer(self, text: str) -> tuple[int, ...]:
        return (*self.encode(text), self.end)

    def rows(self, talks: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> Rows:
        """`talks`: of each picture its questions, as `question` gives them, and as much as there is of their answers."""
        most = max(sum(len(asked) + len(said) for asked, said in talk) for talk in talks) + len(self.shared)
        ids, labels, segments = (torch.full((len(talks), most), fill, dtype=torch.int64) for fill in (0, -1, -1))
        positions, weights = torch.zeros(3, len(talks), most, dtype=torch.int64), torch.zeros(len(talks), most)
        ends: list[tuple[int, int]] = []
        for row, talk in enumerate(talks):
            start = len(self.shared)
            ids[row, :start], segments[row, :start] = torch.tensor(self.shared), 0
            positions[:, row, :start] = self.positions
            for number, (asked, said) in enumerate(talk, 1):
                answer, stop = start + len(asked), start + len(asked) + len(said)
                ends.append((row, answer - 1))
                ids[row, start:stop] = torch.tensor([*asked, *said])
                segments[row, start:stop] = number
                positions[:, row, start:stop] = torch.arange(self.next, self.next + stop - start)
                if said:
                    labels[row, answer - 1 : stop - 1] = torch.tensor(said)
                    weights[row, answer - 1 : stop - 1] = len(said) ** -0.5
                start = stop
        return Rows(ids, segments, positions, labels, weights, torch.tensor(ends))


def read(network: Qwen2_5_VLForConditionalGeneration, features: Tensor, rows: Rows, at: slice) -> tuple[tuple[Tensor, ...], Tensor]:
    """What each layer makes of the rows, from the embeddings on, and what the decoder does in the end; all [B,L,width]."""
    language = network.model.language_model
    embeds = language.embed_tokens(rows.ids)
    embeds = torch.cat([embeds[:, : at.start], features, embeds[:, at.stop :]], 1)
    out = language(
        inputs_embeds=embeds,
        position_ids=rows.positions,
        attention_mask={"full_attention": rows.mask},
        use_cache=False,
        output_hidden_states=True,
    )
    return out.hidden_states, out.last_hidden_state


class Lessons:
    """What is asked about the pictures of a batch."""

    def __init__(self, reader: Reader, questions: int) -> None:
        """`questions` of each picture, beside one for a box and, of each third, for a description."""
        self.reader, self.questions = reader, questions

    def rows(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Rows, list[tuple[int, ...]]]:
        """Rows, and of each question the shapes that it is about."""
        talks = [self._talk(scene, rng) for scene in scenes]
        rows = self.reader.rows([[(self.reader.question(ask), self.reader.answer(say)) for ask, say, _ in talk] for talk in talks])
        return rows, [about for talk in talks for _, _, about in talk]

    def _talk(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, tuple[int, ...]]]:
        kinds = [QUESTION_KINDS[index] for index in rng.integers(len(QUESTION_KINDS), size=self.questions)]
        questions = [question for kind in kinds if (question := choose_question(scene, kind, rng)) is not None]
        said = [(question.text, question.answer, question.about) for question in questions]
        if (phrase := choose_phrase(scene, rng)) is not None:
            said.append((*location(scene, phrase), (phrase.target,)))
        if rng.random() < 1 / 3 or not said:
            asked = DESCRIPTION_QUESTIONS[rng.integers(len(DESCRIPTION_QUESTIONS))]
            said.append((asked, describe(scene), tuple(range(len(scene.shapes)))))
        return said


class Meant(nn.Module):
    """The head, thrown away after training, by which a question points at the places that it is about: a query among keys."""

    def __init__(self, width: int, each: int) -> None:
        """`each` places to a feature of the image."""
        super().__init__()
        self.each, self.depth = each, 64
        self.norm, self.query, self.keys = nn.LayerNorm(width), nn.Linear(width, self.depth), nn.Linear(width, each * self.depth)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, image: Tensor, asking: Tensor, row: Tensor) -> Tensor:
        """Logits [Q,N] of features of images [B,N/each,width] and of questions [Q,width] about the images `row`, int64 [Q]."""
        keys = self.keys(self.norm(image)).unflatten(-1, (self.each, self.depth)).flatten(1, 2)
        logits: Tensor = (keys[row] @ self.query(self.norm(asking))[..., None])[..., 0] * self.depth**-0.5 + self.bias
        return logits


class Teacher(nn.Module):
    """The network with the heads that only training needs, and the loss of all."""

    def __init__(self, network: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.network = network
        self.seen = Seen(WIDTH, GRID, MERGE**2, middles=True)
        self.known = Seen(WIDTH, GRID, MERGE**2, absolute=True, middles=True)
        self.meant = Meant(WIDTH, MERGE**2)

    def forward(self, batch: Batch, asked: tuple[Rows, Sequence[Sequence[int]]] | None, at: slice) -> dict[str, Tensor]:
        """The terms of the loss; without rows and what their questions are about, those of the first lesson alone."""
        features = see(self.network.model.visual, patches(batch.pixels))
        losses = self.seen(features, ORDER, batch)
        if asked is None:
            return losses
        rows, about = asked
        states, last = read(self.network, features, rows, at)
        losses |= {f"known_{name}": loss for name, loss in self.known(states[TAUGHT][:, at], ORDER, batch).items()}
        row, place = rows.asked.unbind(1)
        found = self.meant(states[POINTING][:, at], states[POINTING][row, place], row)
        chosen = torch.tensor([[shape in shapes for shape in range(batch.cover.shape[1])] for shapes in about]).float()
        shown = (batch.cover[..., ORDER] >= LEAST_COVER).float()
        wanted = (chosen[:, None] @ shown[row])[:, 0].clamp(max=1)
        losses["meant"] = 10 * F.binary_cross_entropy_with_logits(found, wanted)
        learnt = rows.labels >= 0
        wrong = F.cross_entropy(self.network.lm_head(last[learnt]), rows.labels[learnt], reduction="none")
        weights = rows.weights[learnt]
        losses["answers"] = 4 * (wrong * weights).sum() / weights.sum()
        return losses


# Evaluation.


@torch.inference_mode()
def are_right(network: Qwen2_5_VLForConditionalGeneration, features: Tensor, rows: Rows, at: slice) -> NDArray[np.bool_]:
    """bool [B]: whether the only answer of each row is what greedy generation gives, which is so if each token follows from those
    before it."""
    _, last = read(network, features, rows, at)
    hits = (network.lm_head(last).argmax(-1) == rows.labels) | (rows.labels < 0)
    return hits.all(1).numpy()


@torch.inference_mode()
def continued(
    network: Qwen2_5_VLForConditionalGeneration, features: Tensor, reader: Reader, questions: Sequence[str], most: int
) -> list[str]:
    """Greedy answers of `most` tokens at most, one for each picture."""
    answers: list[list[int]] = [[] for _ in questions]
    for _ in range(most):
        rows = reader.rows([[(reader.question(text), said)] for text, said in zip(questions, answers, strict=True)])
        _, last = read(network, features, rows, reader.at)
        ends = (rows.segments >= 0).sum(1) - 1
        for said, token in zip(answers, network.lm_head(last[torch.arange(len(last)), ends]).argmax(-1).tolist(), strict=True):
            said.append(token)
        if all(reader.end in said for said in answers):
            break
    cut = (said[: said.index(reader.end)] if reader.end in said else said for said in answers)
    return [reader.tokenizer.decode(said) for said in cut]


def overlaps(answer: str, box: Box, size: int) -> bool:
    """Whether the box of an answer overlaps `box`, of a scene of `size` pixels, by a half at least."""
    found = BOX.search(answer)
    if found is None:
        return False
    edges = [float(edge) * size / SIDE for edge in found.groups()]
    one = (edges[0], edges[1], max(edges[0], edges[2]), max(edges[1], edges[3]))
    return overlap(one, box) >= ENOUGH


def evaluate(
    network: Qwen2_5_VLForConditionalGeneration, reader: Reader, pixels: Pixels, scenes: Sequence[Scene], boxes: int
) -> dict[str, Any]:
    """Exact match in all and by kind over a question about each scene, and accuracy at IoU 0.5 over `boxes` of them."""
    network.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    asked = held_out_questions(scenes, len(scenes))
    for start in range(0, len(asked), 50):
        some = asked[start : start + 50]
        rows = reader.rows([[(reader.question(question.text), reader.answer(question.answer))] for _, question in some])
        with torch.inference_mode():
            features = see(network.model.visual, patches(pixels[[index for index, _ in some]]))
        for (_, question), hit in zip(some, are_right(network, features, rows, reader.at), strict=True):
            right[question.kind].append(bool(hit))
    located = held_out_phrases(scenes, boxes)
    with torch.inference_mode():
        features = see(network.model.visual, patches(pixels[[index for index, _ in located]]))
    said = continued(network, features, reader, [QUESTION.format(phrase=phrase.text) for _, phrase in located], BOX_TOKENS)
    hits = [
        overlaps(text, scenes[i].shapes[phrase.target].box, scenes[i].size) for text, (i, phrase) in zip(said, located, strict=True)
    ]
    everything = [hit for kind in right.values() for hit in kind]
    return {"exact": share(everything), "by_kind": {kind: share(right[kind]) for kind in QUESTION_KINDS}, "boxes": share(hits)}


def share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / max(len(hits), 1), 4)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    disable_progress_bar()
    views = Views(drawn(options.data, "train", options.scenes, size=DRAWN), SIDE, GRID)
    validation = drawn(options.data, "validation", options.validation, size=DRAWN)
    seen = resized(validation.pixels, SIDE)
    tokenizer = vocabulary(views.scenes)
    reader = Reader(tokenizer)
    lessons = Lessons(reader, options.questions)
    teacher = Teacher(build(tokenizer))
    average = ModelEmaV3(teacher.network, decay=0.998, use_warmup=True, foreach=True)
    muon, adamw = optimizers(
        teacher, lr=options.lr, weight_decay=options.weight_decay, plain=("patch_embed", "lm_head", "seen", "known", "meant")
    )
    run = Run(
        options.out,
        minutes=options.minutes,
        every=options.evaluate_minutes,
        parts={"teacher": teacher, "average": average.module, "muon": muon, "adamw": adamw},
        steps=options.steps,
    )
    for step in run.steps():
        rng = np.random.default_rng((options.seed, step))
        seeing = run.progress < SEEING_SHARE
        batch = views.batch(options.pictures, rng)
        asked = None if seeing else lessons.rows(batch.scenes, rng)
        rate = run.rate(options.lr)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        teacher.train()
        losses = teacher(batch, asked, reader.at)
        teacher.zero_grad(set_to_none=True)
        torch.stack(tuple(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(teacher.parameters(), 5.0)
        muon.step()
        adamw.step()
        average.update(teacher.network, step=step)
        run.note(norm=float(norm), **{name: float(loss.detach()) for name, loss in losses.items()})
        if run.is_due:
            run.report(lr=round(rate, 6), **evaluate(average.module, reader, seen, validation.scenes, options.boxes))
            save(average.module, tokenizer, options.out / "model")


def main() -> None:
    parser = make_parser(__doc__, Path("runs/scene_chat"))
    parser.add_argument("--validation", type=int, default=500, help="scenes to evaluate on, a question each")
    parser.add_argument("--boxes", type=int, default=50, help="phrases of them to find the boxes of")
    parser.add_argument("--pictures", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--questions", type=int, default=4, help="questions about each, beside a box")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
