"""A narrow Qwen2.5-VL, from transformers' network to three published engines that give its tokens."""

import base64
import json
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from starlette.testclient import TestClient

from app import generate
from app.chat_prompt import chat_prompts, prepare_image
from app.generate import Generator, Prompt, Sampling
from app.main import create_app
from app.manifest import Entry, read_entry
from app.settings import Settings
from export import pipeline
from export.fuse_chat import fuse_chat
from export.load import load
from export.sources.qwen2_5_vl import MOST_PIXELS, write_folder
from export.spec import ChatReference, ExportError, ExportRequest, LoadedChat, Published, Staged, VerificationError
from export.verify_chat import verify_chat
from tests.factories import make_png

ROLES = ("vision", "embed", "decoder")


@dataclass
class Exported:
    """One published build, and the network that it was made of."""

    published: Published
    repository: Path
    loaded: LoadedChat

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(map(read_entry, self.published.paths))

    def generator(self) -> Generator:
        return Generator.open(self.repository, "narrow", 1, threads=1, max_streams=2)


def make_request(directory: Path, source: str = "qwen2_5_vl", **fields: Any) -> ExportRequest:
    defaults = {"source": source, "repository": directory / "repository", "name": "narrow", "weights": "random"}
    return ExportRequest(**defaults | fields)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    request = make_request(tmp_path_factory.mktemp("chat"))
    published = pipeline.export(request, lambda stage: None)
    loaded = load(request)
    assert isinstance(loaded, LoadedChat)
    return Exported(published, request.repository, loaded)


@pytest.fixture
def build(exported: Exported, tmp_path: Path) -> tuple[Staged, ...]:
    """A copy of the published engines, as they lie before verification."""
    copy = shutil.copytree(exported.repository, tmp_path / "staged")
    paths = [copy / path.relative_to(exported.repository.resolve()) for path in exported.published.paths]
    return tuple(Staged(path, read_entry(path).manifest) for path in paths)


def test_three_engines_of_one_model_are_published(exported: Exported) -> None:
    manifests = [entry.manifest for entry in exported.entries]
    assert [manifest.role for manifest in manifests] == list(ROLES)
    assert {manifest.roles for manifest in manifests} == {ROLES}
    assert len({manifest.build for manifest in manifests}) == 1
    assert sum(map(torch.numel, exported.loaded.network.parameters())) < 1_000_000
    for entry in exported.entries:
        assert entry.manifest.generation == exported.loaded.generation
        assert (entry.path / "tokenizer.json").read_bytes() == exported.loaded.tokenizer


def test_the_record_of_verification_says_what_was_compared(exported: Exported) -> None:
    verification = exported.published.manifest.verification
    assert verification is not None
    assert verification.passed
    checks = {check.name: check for check in verification.checks}
    for prompt in range(1, 6):
        assert checks[f"prompt {prompt}: token agreement"].value == 1
        assert checks[f"prompt {prompt}: logits"].value < checks[f"prompt {prompt}: logits"].limit == 1e-3
    assert checks["prompt 1: pixels"].limit == 1e-6
    for fault, answers in (("a black image", 4), ("a wrong grid", 3)):
        assert 1 <= checks[f"sees {fault}: other tokens"].value <= answers
        assert checks[f"sees {fault}: logits in every answer"].limit == pytest.approx(3e-3)


def test_no_size_is_fixed_but_those_of_the_network(exported: Exported) -> None:
    for entry in exported.entries:
        graph = onnx.load(entry.engine_file).graph
        for spec, value in zip((*entry.manifest.inputs, *entry.manifest.outputs), (*graph.input, *graph.output), strict=True):
            assert spec.name == value.name
            fixed = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
            assert fixed == list(spec.shape), (entry.name, spec.name)


def test_triton_is_told_the_same(exported: Exported) -> None:
    vision = (exported.repository / "narrow.vision" / "config.pbtxt").read_text()
    assert "max_batch_size" not in vision  # 0, protobuf's own default: the first axis is written
    assert 'name: "places"' in vision
    assert "dynamic_batching" not in vision
    decoder = (exported.repository / "narrow.decoder" / "config.pbtxt").read_text()
    assert 'backend: "python"' in decoder
    assert "decoupled: true" in decoder
    assert "dims: 1176" in decoder
    version = exported.published.paths[-1]
    assert (version / "app" / "generate.py").read_bytes() == Path(generate.__file__).read_bytes()
    assert (version / "model.py").is_file()


def test_normalisation_in_the_graph_is_that_of_the_library(exported: Exported) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    prepared = prepare_image(image, exported.loaded.generation)
    vision: Any = fuse_chat(exported.loaded)[0].graph
    expected = Qwen2VLImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    assert (vision.normalise(torch.from_numpy(prepared.patches)) - expected).abs().max() <= 1e-6


def test_streams_side_by_side_answer_as_they_do_alone(exported: Exported) -> None:
    """With images of two sizes, and one stream that joins later."""
    prompts, generator = chat_prompts(exported.entries[-1]), exported.generator()
    questions = []
    for seed, size in ((1, (100, 60)), (2, (60, 200))):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = prepare_image(Image.fromarray(pixels), prompts.generation)
        content = [{"type": "image"}, {"type": "text", "text": "Where?"}]
        questions.append(prompts.prompt([{"role": "user", "content": content}], [image]))
    alone = [answer(generator, prompt) for prompt in questions]
    assert alone[0] != alone[1]
    first = generator.start(questions[0], Sampling(max_tokens=12))
    generator.step()
    second = generator.start(questions[1], Sampling(max_tokens=12))
    while generator.streams:
        generator.step()
    assert [first.tokens, second.tokens] == alone


def test_the_route_of_openai_gives_the_networks_own_answer(exported: Exported) -> None:
    photo = make_png(120, 90)
    processor, network = exported.loaded.processor, exported.loaded.network
    content = [{"type": "text", "text": "Where is"}, {"type": "image"}, {"type": "text", "text": "the red circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(BytesIO(photo))], return_tensors="pt")
    tokens = network.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    url = f"data:image/png;base64,{base64.b64encode(photo).decode()}"
    parts = [content[0], {"type": "image_url", "image_url": {"url": url}}, content[2]]
    settings = Settings(_env_file=None, repository=exported.repository, repository_poll=0)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        asked = {"model": "narrow", "max_tokens": 24, "messages": [{"role": "user", "content": parts}]}
        answer = client.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["message"]["content"] == processor.decode(tokens, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answer["vitrine"]["images"] == [{"width": 112, "height": 84}]


def answer(generator: Generator, prompt: Prompt) -> list[int]:
    stream = generator.start(prompt, Sampling(max_tokens=12))
    while generator.streams:
        generator.step()
    return stream.tokens


@pytest.mark.parametrize("part", ["visual.blocks.0.norm1", "language_model.layers.1.self_attn.k_proj"])
def test_a_part_that_differs_is_noticed(part: str, exported: Exported, build: tuple[Staged, ...]) -> None:
    """By a tenth of one layer's weights, in a layer with windows and in one of the decoder."""
    weight = exported.loaded.network.model.get_submodule(part).weight
    weight *= 1.1
    try:
        with pytest.raises(VerificationError, match="logits"):
            verify_chat(build, ChatReference(exported.loaded.network, exported.loaded.processor))
    finally:
        weight /= 1.1


def test_positions_of_plain_text_are_noticed(
    exported: Exported, build: tuple[Staged, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(prompt: Prompt, architecture: Any) -> Any:
        length = len(prompt.input_ids)
        return np.tile(np.arange(length), (3, 1)), length

    monkeypatch.setattr(generate, "rope_positions", count)
    with pytest.raises(VerificationError, match="prompt 1: logits"):
        verify_chat(build, ChatReference(exported.loaded.network, exported.loaded.processor))


def test_blindness_is_noticed(exported: Exported, build: tuple[Staged, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and reference agree, and neither sees: the merger gives the same for all images."""
    merger = exported.loaded.network.model.visual.merger.mlp[2].weight
    kept = merger.clone()
    look = Generator._look
    bias = exported.loaded.network.model.visual.merger.mlp[2].bias.numpy()
    monkeypatch.setattr(Generator, "_look", lambda self, image: np.broadcast_to(bias, look(self, image).shape))
    merger.zero_()
    try:
        with pytest.raises(VerificationError) as raised:
            verify_chat(build, ChatReference(exported.loaded.network, exported.loaded.processor))
    finally:
        merger.copy_(kept)
    failed = [check.name for check in raised.value.verification.checks if not check.passed]
    assert {"sees a black image: other tokens", "sees a black image: logits in every answer"} <= set(failed)


def test_a_directory_of_transformers_is_a_source(tmp_path: Path) -> None:
    write_folder(tmp_path, text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
    loaded = load(make_request(tmp_path, f"transformers/{tmp_path}"))
    assert isinstance(loaded, LoadedChat)
    loaded.network.save_pretrained(tmp_path)
    again = load(make_request(tmp_path, f"transformers/{tmp_path}", weights="pretrained"))
    assert isinstance(again, LoadedChat)
    assert again.source.weights == "pretrained"
    for name, weight in loaded.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}, "linear"),
    ],
)
def test_what_is_not_exported_is_refused(text: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path, text_config=text)
    with pytest.raises(ExportError, match=message):
        load(make_request(tmp_path, f"transformers/{tmp_path}"))


def test_pixels_are_bounded_below_what_published_processors_allow(tmp_path: Path) -> None:
    write_folder(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    for most, expected in ((12_845_056, MOST_PIXELS), (448 * 448, 448 * 448)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 3136, "longest_edge": most}}))
        loaded = load(make_request(tmp_path, f"transformers/{tmp_path}"))
        assert isinstance(loaded, LoadedChat)
        assert (loaded.generation.min_pixels, loaded.generation.max_pixels) == (3136, expected)


def test_half_precision_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bf16"):
        load(make_request(tmp_path, precision="bf16"))


def test_the_random_source_has_no_weights_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no weights of its own"):
        load(make_request(tmp_path, weights="pretrained"))


def test_a_processor_that_is_missing_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ExportError, match="processor"):
        load(make_request(tmp_path, f"transformers/{tmp_path}"))


def test_a_name_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose door is its cache here, laid out as a download leaves it."""
    cached = tmp_path / "models--someone--chat"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    write_folder(cached / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert isinstance(load(make_request(tmp_path, "transformers/someone/chat")), LoadedChat)
    with pytest.raises(ExportError, match="neither a directory"):
        load(make_request(tmp_path, "transformers/someone/else"))
