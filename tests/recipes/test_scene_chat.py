"""The chat model's lessons are what is served: the tower, the rows, the boxes, and that steps make the loss smaller."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from muon import optimizers
from PIL import Image
from scene_chat import (
    ARCHITECTURE,
    GRID,
    MOST_PIXELS,
    SIDE,
    TOKENS,
    Lessons,
    Meant,
    Reader,
    Teacher,
    are_right,
    build,
    continued,
    location,
    overlaps,
    patches,
    read,
    save,
    see,
    vocabulary,
)
from scene_views import Views, resized
from scene_words import simple_phrases
from scenes import Drawn
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration

from app.chat import SeenImage
from app.chat_grounding import read_box
from app.chat_prompt import ChatPrompts, prepare_image
from app.decode import ImageInfo
from app.generate import rope_positions
from export.load import load
from export.spec import ExportRequest, LoadedChat


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return scenes.drawn(tmp_path_factory.mktemp("scenes"), "train", 8)


@pytest.fixture(scope="module")
def tokenizer(data: Drawn) -> Tokenizer:
    return vocabulary(data.scenes)


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer) -> Reader:
    return Reader(tokenizer)


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    return build(tokenizer).eval()


@pytest.fixture(scope="module")
def loaded(
    network: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> LoadedChat:
    """What the exporter makes of the folder that the recipe writes."""
    folder = tmp_path_factory.mktemp("run") / "model"
    save(network, tokenizer, folder)
    found = load(ExportRequest(source=f"transformers/{folder}", repository=folder.parent, name="scenes", weights="pretrained"))
    assert isinstance(found, LoadedChat)
    return found


def test_the_exporter_takes_the_folder_with_its_weights(loaded: LoadedChat, network: Qwen2_5_VLForConditionalGeneration) -> None:
    for (name, one), (_, other) in zip(loaded.network.state_dict().items(), network.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert loaded.generation.max_pixels == MOST_PIXELS
    assert sum(map(torch.numel, network.parameters())) < 6_000_000


def test_a_picture_is_cut_as_the_gateway_cuts_it(loaded: LoadedChat, data: Drawn) -> None:
    ours = patches(resized(data.pixels, SIDE))
    mean, std = (torch.tensor(values)[:, None] for values in (loaded.preprocessing.mean, loaded.preprocessing.std))
    for picture, cut in zip(data.pixels, ours, strict=True):
        served = prepare_image(Image.fromarray(picture), loaded.generation)
        assert served.grid_thw == (1, GRID, GRID)
        frames = torch.from_numpy(served.patches.copy()).float().view(GRID * GRID, 3, 2, -1)
        theirs = (frames[:, :, 0] / 255 - mean) / std
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])
        assert torch.allclose(theirs.flatten(1), cut, atol=1e-5)


def test_all_pictures_at_once_are_seen_as_the_library_sees_each(network: Qwen2_5_VLForConditionalGeneration, data: Drawn) -> None:
    seen = patches(resized(data.pixels[:2], SIDE))
    twice = seen.view(2, -1, 3, 1, 196).expand(-1, -1, -1, 2, -1).flatten(0, 1).flatten(1)
    with torch.inference_mode():
        theirs = network.model.visual(twice, grid_thw=torch.tensor([[1, GRID, GRID]] * 2)).pooler_output
        ours = see(network.model.visual, seen)
    assert ours.shape == (2, TOKENS, 192)
    assert torch.allclose(ours.flatten(0, 1), theirs, atol=1e-4)


def test_a_row_reads_as_the_served_prompt(loaded: LoadedChat, reader: Reader, data: Drawn, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(loaded.tokenizer)
    image = prepare_image(Image.fromarray(data.pixels[0]), loaded.generation)
    content = [{"type": "image"}, {"type": "text", "text": "How many stars are there?"}]
    prompt = ChatPrompts(file, loaded.generation).prompt([{"role": "user", "content": content}], [image])
    rows = reader.rows([[(reader.question("How many stars are there?"), ())]])
    assert rows.ids[0].tolist() == prompt.input_ids.tolist()
    positions, _ = rope_positions(prompt, replace(ARCHITECTURE, image_token_id=loaded.generation.image_token_id))
    assert np.array_equal(rows.positions[:, 0], positions)


def test_questions_in_one_row_are_answered_as_alone(
    network: Qwen2_5_VLForConditionalGeneration, reader: Reader, data: Drawn
) -> None:
    talk = [
        (reader.question("How many stars are there?"), reader.answer("2")),
        (reader.question("Where is the red star?"), reader.answer("at the top left")),
    ]
    together, apart = reader.rows([talk]), reader.rows([talk[1:]])
    with torch.inference_mode():
        features = see(network.model.visual, patches(resized(data.pixels[:1], SIDE)))
        _, one = read(network, features, together, reader.at)
        _, other = read(network, features, apart, reader.at)
    learnt = together.segments[0] == 2
    assert torch.allclose(one[0, learnt], other[0, apart.segments[0] == 1], atol=1e-4)
    labels = together.labels[0]
    assert [label for label in labels.tolist() if label >= 0] == [*talk[0][1], *talk[1][1]]
    assert torch.equal(together.ids[0].roll(-1)[labels >= 0], labels[labels >= 0])


@torch.inference_mode()
def test_right_is_what_greedy_generation_says(network: Qwen2_5_VLForConditionalGeneration, reader: Reader, data: Drawn) -> None:
    questions = ["How many stars are there?", "Describe the image."]
    features = see(network.model.visual, patches(resized(data.pixels[:2], SIDE)))
    rows = reader.rows([[(reader.question(text), ())] for text in questions])
    said: list[list[int]] = [[], []]
    for _ in range(3):
        _, last = read(network, features, rows, reader.at)
        for index, answer in enumerate(said):
            end = int((rows.segments[index] >= 0).sum()) - 1
            answer.append(int(network.lm_head(last[index, end]).argmax()))
        rows = reader.rows([[(reader.question(text), answer)] for text, answer in zip(questions, said, strict=True)])
    assert are_right(network, features, rows, reader.at).tolist() == [True, True]
    assert continued(network, features, reader, questions, 3) == [reader.tokenizer.decode(answer) for answer in said]
    said[1][2] = (said[1][2] + 1) % 400
    rows = reader.rows([[(reader.question(text), answer)] for text, answer in zip(questions, said, strict=True)])
    assert are_right(network, features, rows, reader.at).tolist() == [True, False]


def test_questions_are_asked_where_their_answers_begin(reader: Reader, data: Drawn) -> None:
    rows, about = Lessons(reader, questions=3).rows(data.scenes, np.random.default_rng(0))
    assert len(about) == len(rows.asked)
    row, place = rows.asked.unbind(1)
    assert (rows.labels[row, place] >= 0).all(), "the first word of an answer is learnt there"
    assert (rows.labels[row, place - 1] < 0).all()
    assert all(
        0 <= shape < len(data.scenes[picture].shapes) for picture, shapes in zip(row, about, strict=True) for shape in shapes
    )


def test_a_question_points_at_the_places_of_its_own_picture() -> None:
    torch.manual_seed(0)
    meant = Meant(8, each=2)
    image, asking = torch.randn(2, 3, 8), torch.randn(3, 8)
    found = meant(image, asking, torch.tensor([1, 0, 1]))
    assert found.shape == (3, 6)
    keys = meant.keys(meant.norm(image[0])).view(6, 64)
    assert torch.allclose(found[1], keys @ meant.query(meant.norm(asking[1])) / 8 + meant.bias, atol=1e-6)


def test_a_box_is_said_in_pixels_of_what_is_seen(data: Drawn) -> None:
    info = ImageInfo("PNG", 256, 256, "RGB", 1, 1, (), 1)
    for scene in data.scenes:
        for phrase in simple_phrases(scene)[:3]:
            question, answer = location(scene, phrase)
            assert phrase.text in question
            box = scene.shapes[phrase.target].box
            seen = SeenImage(None, SIDE, SIDE, info)  # type: ignore[arg-type]
            assert np.abs(np.subtract(read_box(answer, seen), box)).max() <= 1
            assert overlaps(answer, box, scene.size)
            assert not overlaps(answer, (box[0] + 200, box[1], box[2] + 200, box[3]), scene.size)
    assert not overlaps("I do not know.", (0, 0, 9, 9), 256)


def test_foreign_words_become_their_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 512
    text = "Où est le cœur rouge? 赤いハート"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_steps_make_the_loss_smaller(tokenizer: Tokenizer, reader: Reader, data: Drawn) -> None:
    torch.manual_seed(0)
    teacher = Teacher(build(tokenizer))
    batch = Views(data, SIDE, GRID).batch(4, np.random.default_rng(0))
    asked = Lessons(reader, questions=3).rows(batch.scenes, np.random.default_rng(0))
    seen = {"kind", "colour", "edges", "middle_kind", "middle_colour"}
    assert set(teacher(batch, None, reader.at)) == seen
    training = optimizers(teacher, lr=2e-3, weight_decay=0.02, plain=("patch_embed", "lm_head", "seen", "known", "meant"))
    totals = []
    for _ in range(4):
        losses = teacher(batch, asked, reader.at)
        assert set(losses) == seen | {f"known_{name}" for name in seen} | {"meant", "answers"}
        total = torch.stack(tuple(losses.values())).sum()
        totals.append(total.item())
        teacher.zero_grad()
        total.backward()
        assert all(parameter.grad is not None for parameter in teacher.parameters())
        for optimizer in training:
            optimizer.step()
    assert totals[-1] < totals[0]
