"""What the host computes for a Qwen2.5-VL against transformers: pixels, windows, rotary tables, positions, prompts, samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLModel,
    Qwen2_5_VLVisionRotaryEmbedding,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from app.chat_prompt import ChatPrompts, fit, prepare_image
from app.errors import InvalidValueError
from app.generate import (
    Architecture,
    PreparedImage,
    Prompt,
    Sampling,
    choose,
    rope_positions,
    vision_inputs,
    vision_rotary,
    window_order,
)
from app.manifest import Generation
from export.phrases import grounding_phrases
from export.sources.qwen2_5_vl import CHAT_TEMPLATE, train_tokenizer
from tests.chat_repository import add_chat

GRIDS = [(1, 2, 2), (1, 4, 6), (1, 8, 8), (1, 10, 16), (1, 16, 8), (1, 18, 34), (1, 2, 50)]
QWEN = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "vision_head_dim": 80,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
}


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """Of the published models, but for the ids."""
    found = add_chat(tmp_path_factory.mktemp("repository"), **QWEN)[0].manifest.generation
    assert found is not None
    return found


@pytest.fixture(scope="module")
def architecture(generation: Generation) -> Architecture:
    return Architecture.read(generation.model_dump())


@pytest.fixture(scope="module")
def processor() -> Any:
    return Qwen2VLImageProcessorPil()


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(20, 30), (56, 56), (97, 133), (300, 112), (640, 480), (1500, 900), (11, 1500)])
def test_pixels_are_those_of_the_library(size: tuple[int, int], generation: Generation, processor: Any) -> None:
    image = picture(*size)
    prepared = prepare_image(image, generation)
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert raw["image_grid_thw"].tolist() == [list(prepared.grid_thw)]
    assert np.array_equal(raw["pixel_values"], prepared.patches)
    assert prepared.patches.dtype == np.uint8
    assert prepared.patches.flags.c_contiguous


def test_sizes_are_those_of_the_library(generation: Generation) -> None:
    random = np.random.default_rng(0)
    for height, width in np.exp(random.uniform(np.log(1), np.log(6000), (3000, 2))).astype(int).tolist():
        try:
            expected = smart_resize(height, width, 28, generation.min_pixels, generation.max_pixels)
        except ValueError:
            with pytest.raises(InvalidValueError, match="200 times"):
                fit(height, width, generation)
        else:
            assert fit(height, width, generation) == expected, (height, width)


def test_a_limit_of_pixels_below_the_models_own(generation: Generation) -> None:
    assert fit(700, 700, generation) == (700, 700)
    assert fit(700, 700, generation, max_pixels=448 * 448) == (448, 448)
    assert fit(3000, 3000, generation, max_pixels=10**9) == (980, 980)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_those_of_the_library(grid: tuple[int, int, int], architecture: Architecture) -> None:
    expected, bounds = get_vision_window_index(torch.tensor([grid]), 2, 112, 14)
    index, ends = window_order(grid, architecture)
    assert index.tolist() == expected.tolist()
    assert ends.tolist() == bounds.tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_lies_once_in_its_window(grid: tuple[int, int, int], architecture: Architecture) -> None:
    """Patches attend to one another where the library splits them together."""
    index, bounds = get_vision_window_index(torch.tensor([grid]), 2, 112, 14)
    order = (index[:, None] * 4 + torch.arange(4)).flatten().numpy()
    expected = np.empty(len(order), int)
    expected[order] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    inputs = vision_inputs(grid, architecture)
    windows, lengths, places = inputs["windows"], inputs["lengths"], inputs["places"]
    assert [sorted(row[:size]) for row, size in zip(windows.tolist(), lengths.tolist(), strict=True)] == [
        np.flatnonzero(expected == window).tolist() for window in range(len(lengths))
    ]
    assert windows.ravel()[places].tolist() == list(range(len(order)))
    assert (places // windows.shape[1]).tolist() == expected.tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_rotary_tables_are_those_of_the_library(grid: tuple[int, int, int], architecture: Architecture) -> None:
    config = Qwen2_5_VLConfig(vision_config={"hidden_size": 320, "num_heads": 4}).vision_config
    expected = Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(1), get_vision_position_ids(torch.tensor([grid]), 2))
    for ours, theirs in zip(vision_rotary(grid, architecture), expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs.numpy()).max() < 1e-5  # an angle of 50 is exact to 4e-6


def test_positions_are_those_of_the_library(architecture: Architecture) -> None:
    config = Qwen2_5_VLConfig()

    class Bare:
        """What `get_rope_index` reads of a model."""

        get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

        def __init__(self) -> None:
            self.config = config

    token = architecture.image_token_id
    for grids in ([], [(1, 4, 6)], [(1, 8, 2), (1, 2, 8)], [(1, 2, 2), (1, 10, 16), (1, 4, 4)]):
        ids = [1, 2, 3]
        for _, rows, columns in grids:
            ids += [7, *[token] * (rows * columns // 4), 8]
        images = tuple(PreparedImage(np.zeros((rows * columns, 1), np.uint8), (1, rows, columns)) for _, rows, columns in grids)
        positions, following = rope_positions(Prompt(np.array(ids), images), architecture)
        given = torch.tensor([ids])
        expected, deltas = Qwen2_5_VLModel.get_rope_index(
            Bare(),
            given,
            (given == token).int(),
            torch.tensor(grids) if grids else None,  # type: ignore[arg-type]
        )
        assert positions.tolist() == expected[:, 0].tolist()
        assert following == len(ids) + deltas.item()


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?\n"}]},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "漢 {{ 1 }} <b>"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Really?"},
    ],
]


@pytest.fixture(scope="module")
def prompts(generation: Generation, tmp_path_factory: pytest.TempPathFactory) -> ChatPrompts:
    tokenizer = train_tokenizer(grounding_phrases(), 300)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    found = {"chat_template": CHAT_TEMPLATE, "image_token_id": tokenizer.token_to_id("<|image_pad|>")}
    return ChatPrompts(file, generation.model_copy(update=found))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_reads_as_the_library_renders_it(messages: list[dict[str, Any]], prompts: ChatPrompts) -> None:
    rendered, _ = render_jinja_template(conversations=[messages], chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    assert prompts.render(messages) == rendered[0]


def test_an_image_takes_as_many_ids_as_it_has_tokens(prompts: ChatPrompts) -> None:
    images = [prepare_image(picture(60, 60), prompts.generation), prepare_image(picture(120, 60), prompts.generation)]
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    prompt = prompts.prompt([{"role": "user", "content": parts}], images)
    marks = prompt.input_ids == prompts.generation.image_token_id
    assert marks.sum() == 4 + 8
    assert prompts.tokenizer.decode(prompt.input_ids[~marks].tolist()) == "user\nand\nassistant\n"


@pytest.mark.parametrize("text", ["<|image_pad|>", "half \ud83d of a pair"])
def test_text_that_is_no_text_is_refused(text: str, prompts: ChatPrompts) -> None:
    with pytest.raises(InvalidValueError) as raised:
        prompts.prompt([{"role": "user", "content": text}], [])
    assert raised.value.field == "messages"


def test_a_template_cannot_leave_its_sandbox(generation: Generation, prompts: ChatPrompts, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    prompts.tokenizer.save(str(file))
    for template in ("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", "{{ raise_exception('only two turns') }}"):
        with pytest.raises(InvalidValueError):
            ChatPrompts(file, generation.model_copy(update={"chat_template": template})).render([])


def test_any_text_survives_the_random_vocabulary() -> None:
    """Whatever was not seen becomes bytes."""
    tokenizer = train_tokenizer(grounding_phrases(), 300)
    for text in ("漢字 🙂\x00", "Ünïcödé", "  two  blanks\n\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.5, "temperature": 0.7}, {"top_p": 0.01}]
)
def test_tokens_are_drawn_among_those_that_the_library_leaves(sampling: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)
    scores = torch.from_numpy(logits)[None]
    steps = [TemperatureLogitsWarper(float(sampling.get("temperature", 1.0)))]
    steps += [TopKLogitsWarper(sampling["top_k"])] if "top_k" in sampling else []
    steps += [TopPLogitsWarper(sampling["top_p"])] if "top_p" in sampling else []
    for step in steps:
        scores = step(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    random, fixed = np.random.default_rng(0), Sampling(**{"temperature": 1.0} | sampling)
    drawn = np.bincount([choose(logits, fixed, random) for _ in range(4000)], minlength=40) / 4000
    assert np.abs(drawn - expected).max() < 0.03
    assert not drawn[expected == 0].any()
