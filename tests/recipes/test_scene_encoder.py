"""The encoder's lessons: what is right and what is confused, how accuracy is counted, and that a step makes the loss smaller."""

import numpy as np
import pytest
import scenes
import torch
from muon import optimizers
from scene_encoder import (
    GRID,
    LENGTH,
    SIDE,
    Teacher,
    build,
    confused,
    matching,
    pairs_of,
    read,
    tokens,
    vocabulary,
    zero_shot,
)
from scene_views import Views
from scene_words import DESCRIPTIONS, describe, draws, summarise
from scenes import COLOURS, KINDS, Drawn
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return scenes.drawn(tmp_path_factory.mktemp("scenes"), "train", 12, size=128)


@pytest.fixture(scope="module")
def tokenizer(data: Drawn) -> PreTrainedTokenizerFast:
    return vocabulary(data.scenes)


def test_a_confused_scene_has_the_same_colours_and_kinds_but_is_described_otherwise(data: Drawn) -> None:
    for scene in data.scenes:
        other = confused(scene, np.random.default_rng(0))
        assert describe(other) != describe(scene)
        assert [shape.kind for shape in other.shapes] == [shape.kind for shape in scene.shapes]
        if len({shape.colour for shape in scene.shapes}) > 1 and len({shape.kind for shape in scene.shapes}) > 1:
            changed = [i for i, shape in enumerate(scene.shapes) if other.shapes[i].colour != shape.colour]
            assert len(changed) in (1, 2)
            if len(changed) == 2:
                assert sorted(s.colour for s in other.shapes) == sorted(s.colour for s in scene.shapes)


def test_pairs_are_the_colours_of_kinds(data: Drawn) -> None:
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    for scene, row in zip(data.scenes, pairs_of(data.scenes), strict=True):
        assert {pairs[i] for i in torch.where(row == 1)[0]} == {(shape.colour, shape.kind) for shape in scene.shapes}


def test_several_right_answers_share_the_loss() -> None:
    logits = torch.tensor([[5.0, 5.0, -20.0], [0.0, 0.0, 0.0]])
    assert matching(logits, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).item() == pytest.approx((np.log(2) + np.log(3)) / 2)


def test_draws_have_no_description_twice() -> None:
    texts = ["a", "b", "a", "c", "b", "a", "d", "e"]
    assert draws(texts, 3) == [[0, 1, 3], [4, 5, 6]]


def test_zero_shot_counts_whose_own_text_fits_best() -> None:
    vectors = np.eye(6, dtype=np.float32)
    texts = vectors.copy()
    assert zero_shot(vectors, texts, [[0, 1, 2], [3, 4, 5]]) == 1
    texts[[4, 5]] = texts[[5, 4]]
    assert zero_shot(vectors, texts, [[0, 1, 2], [3, 4, 5]]) == pytest.approx(4 / 6, abs=1e-4)


def test_reading_without_padding_gives_the_tower_s_vectors(data: Drawn, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = build().eval()
    ids = tokens(tokenizer, [summarise(scene) for scene in data.scenes])
    padded = torch.zeros(len(ids), LENGTH, dtype=torch.int64)
    padded[:, : ids.shape[1]] = ids
    with torch.inference_mode():
        assert ids.shape[1] < LENGTH
        assert torch.allclose(read(encoder, ids), encoder.encode_text(padded), atol=1e-5)


def test_foreign_words_become_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a Zürich tram, 路面電車"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_steps_make_the_loss_smaller(data: Drawn, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    teacher = Teacher(build())
    batch = Views(data, SIDE, GRID).batch(8, np.random.default_rng(0))
    texts = [DESCRIPTIONS["places"](scene) for scene in batch.scenes]
    wrong = [DESCRIPTIONS["places"](confused(scene, np.random.default_rng(0))) for scene in batch.scenes]
    ids = tokens(tokenizer, [*texts, *wrong])
    training = optimizers(teacher, lr=2e-3, weight_decay=0.02, plain=("positional_embedding", "conv2_kxk", "seen", "pairs"))
    totals = []
    for _ in range(4):
        losses = teacher(batch, texts, wrong, ids)
        assert set(losses) == {"to_text", "to_image", "pairs_seen", "pairs_read", "kind", "colour", "edges"}
        total = torch.stack(tuple(losses.values())).sum()
        totals.append(total.item())
        teacher.zero_grad()
        total.backward()
        assert all(parameter.grad is not None for parameter in teacher.parameters())
        for optimizer in training:
            optimizer.step()
    assert totals[-1] < totals[0]
