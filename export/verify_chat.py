"""Verification of a chat model: tokens and logits of its three engines, run by the gateway's own loop, against transformers."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from app.chat_prompt import ChatPrompts, chat_prompts, prepare_image
from app.decode import DecodeLimits, decode, open_image
from app.generate import Generator, PreparedImage, Prompt, PromptError, Sampling
from app.manifest import Check, Generation, Preprocessing, Verification
from export.agreement import SENSITIVITY, at_least, at_most
from export.files import write_manifest, writing
from export.golden import golden_images
from export.served import failure, staged_entry
from export.spec import ChatReference, ExportError, Staged, VerificationError

STEPS = 32
_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
_QUESTIONS = (
    (("landscape.jpg",), "What is in the image?"),
    (("portrait.png",), "How many circles are there, and where? Answer with a box."),
    (("square.png",), "Describe the colours. 用中文回答 🙂"),
    (("landscape.jpg", "rotated.jpg"), "What is the difference between the two?"),
    ((), "Name three colours."),
)


@dataclass(frozen=True)
class ChatTolerance:
    """`agreement`: the smallest share of a prompt's tokens before the first other one. `logits`: the largest difference of any
    token's logit in any step until then."""

    agreement: float
    logits: float


TOLERANCES = {"fp32": ChatTolerance(1.0, 1e-3), "fp16": ChatTolerance(1 / STEPS, 0.3)}
_PIXELS = 1e-6


@dataclass(frozen=True, eq=False)
class _Answer:
    """Tokens up to the one that ends the answer, which counts, and the logits [steps,vocabulary] that they were chosen by."""

    tokens: list[int]
    logits: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Question:
    """One conversation on both sides."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    prompt: Prompt


def verify_chat(build: Sequence[Staged], reference: ChatReference) -> tuple[Staged, ...]:
    """Hold the engines `vision`, `embed` and `decoder` of one build, as `app/generate.py` runs them, against `reference`.

    The served side is the gateway's own decoding, template, tokenizer, preprocessing and loop; the reference's side is the
    library's processor with Pillow and its `generate`, greedy. On success the finished manifests are written.

    Raises:
        VerificationError: with the checks that failed.
        ExportError: the engines do not run here; disk full.
    """
    entry = staged_entry(build[-1])
    generation = entry.manifest.generation
    if generation is None:
        raise ExportError("The manifest of a chat model says how it generates.")
    repository, number = entry.path.parent.parent, entry.version
    generator = Generator.open(repository, entry.manifest.model, number, threads=os.cpu_count() or 1, max_streams=len(_QUESTIONS))
    verifier = _Verifier(generator, chat_prompts(entry), generation, reference, TOLERANCES[entry.manifest.precision])
    checks = tuple(verifier.run(entry.manifest.preprocessing))
    verification = Verification(
        reference="transformers' processor with Pillow, and its greedy generate in float32",
        images=sum(len(question.images) for question in verifier.questions),
        batch_sizes=(1,),
        checks=checks,
        accuracy={},
    )
    if not verification.passed:
        raise VerificationError(failure(checks), verification)
    for staged in build:
        with writing(staged.path):
            write_manifest(staged.path, staged.manifest.model_copy(update={"verification": verification}))
    return tuple(Staged(staged.path, staged_entry(staged).manifest) for staged in build)


class _Verifier:
    """The questions on both sides, and the comparisons between them."""

    def __init__(
        self,
        generator: Generator,
        prompts: ChatPrompts,
        generation: Generation,
        reference: ChatReference,
        tolerance: ChatTolerance,
    ) -> None:
        self.generator = generator
        self.generation = generation
        self.network = reference.network
        self.processor = with_pillow(reference.processor)
        self.tolerance = tolerance
        self.questions = [_question(names, text, prompts) for names, text in _QUESTIONS]

    def run(self, preprocessing: Preprocessing) -> Iterator[Check]:
        """Every check, in the order of the path."""
        served = self._answer([question.prompt for question in self.questions])
        for index, (question, answer) in enumerate(zip(self.questions, served, strict=True), 1):
            inputs, expected = self._ask_reference(question)
            yield from self._compare_inputs(f"prompt {index}", question, inputs, preprocessing)
            share = _agreeing(answer.tokens, expected.tokens) / max(len(answer.tokens), len(expected.tokens))
            yield at_least(f"prompt {index}: token agreement", share, self.tolerance.agreement, "of tokens")
            yield at_most(f"prompt {index}: logits", _apart(answer, expected), self.tolerance.logits)
        yield from self._sight(served)

    def _compare_inputs(self, name: str, question: _Question, inputs: Any, preprocessing: Preprocessing) -> Iterator[Check]:
        prompt = question.prompt
        same = np.array_equal(inputs["input_ids"][0].numpy(), prompt.input_ids)
        yield at_least(f"{name}: same ids", same, 1.0)
        if prompt.images:
            patches = np.concatenate([image.patches for image in prompt.images])
            pixels = patches.reshape(len(patches), len(preprocessing.mean), -1)
            mean, std = (np.array(values, np.float32)[:, None] for values in (preprocessing.mean, preprocessing.std))
            normalised = ((pixels * np.float32(preprocessing.scale) - mean) / std).reshape(len(pixels), -1)
            apart = np.abs(normalised - inputs["pixel_values"].numpy()).max()
            yield at_most(f"{name}: pixels", apart, _PIXELS, "of their deviation")

    def _sight(self, served: Sequence[_Answer]) -> Iterator[Check]:
        """What a fault would do must show in tokens, and in every answer by more than the tolerance lets pass; else the comparison
        above is blind. A trained model may well give the same short answer to two images."""
        seen = [(question.prompt, answer) for question, answer in zip(self.questions, served, strict=True) if question.images]
        black = self._answer([_with_images(prompt, _blacken) for prompt, _ in seen])
        turned = [(prompt, answer) for prompt, answer in seen if any(rows != columns for _, rows, columns in _grids(prompt))]
        wrong = self._answer([_with_images(prompt, _turn) for prompt, _ in turned])
        for what, pairs, others in (("a black image", seen, black), ("a wrong grid", turned, wrong)):
            answers = [(answer, other) for (_, answer), other in zip(pairs, others, strict=True)]
            yield at_least(f"sees {what}: other tokens", sum(one.tokens != other.tokens for one, other in answers), 1.0, "answers")
            moved = min(_apart(one, other) for one, other in answers)
            yield at_least(f"sees {what}: logits in every answer", moved, SENSITIVITY * self.tolerance.logits)

    def _answer(self, prompts: Sequence[Prompt]) -> list[_Answer]:
        """All of them side by side, by the gateway's loop."""
        try:
            streams = [self.generator.start(prompt, Sampling(max_tokens=STEPS)) for prompt in prompts]
        except PromptError as error:
            raise ExportError(f"The context is too short for verification: {error}") from error
        logits: list[list[NDArray[np.float32]]] = [[] for _ in streams]
        tokens: list[list[int]] = [[] for _ in streams]
        while self.generator.streams:
            for event in self.generator.step():
                if event.finish == "error":
                    raise ExportError(f"The engines do not run in onnxruntime here: {event.error}")
                place = streams.index(event.stream)
                assert event.stream.logits is not None
                logits[place].append(event.stream.logits)
                tokens[place].append(int(event.stream.logits.argmax()) if event.token is None else event.token)
        return [_Answer(ids, np.stack(steps)) for ids, steps in zip(tokens, logits, strict=True)]

    def _ask_reference(self, question: _Question) -> tuple[Any, _Answer]:
        text = self.processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[text], images=question.images or None, return_tensors="pt")
        with torch.inference_mode():
            output = self.network.generate(
                **inputs,
                **_GREEDY,
                max_new_tokens=STEPS,
                eos_token_id=list(self.generation.end_token_ids),
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return inputs, _Answer(tokens, torch.cat(output.logits).float().numpy())


def _question(names: Sequence[str], text: str, prompts: ChatPrompts) -> _Question:
    data = {image.name: image.data for image in golden_images()}
    images = [decode(open_image(data[name], DecodeLimits()))[0] for name in names]
    parts = [*({"type": "image"} for _ in names), {"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    prepared = [prepare_image(image, prompts.generation) for image in images]
    return _Question(messages, images, prompts.prompt(messages, prepared))


def with_pillow(processor: Any) -> Any:
    """`processor` with the library's image processor that resizes with Pillow; the other resizes tensors, other to a level."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: PLC0415  slow to import

    images = processor.image_processor
    names = ("size", "image_mean", "image_std", "rescale_factor", "patch_size", "temporal_patch_size", "merge_size")
    pillow = Qwen2VLImageProcessorPil(**{name: getattr(images, name) for name in names})
    return type(processor)(
        image_processor=pillow,
        tokenizer=processor.tokenizer,
        video_processor=processor.video_processor,
        chat_template=processor.chat_template or processor.tokenizer.chat_template,
    )


def _agreeing(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens come before the first other one."""
    shorter = min(len(tokens), len(others))
    return next((place for place in range(shorter) if tokens[place] != others[place]), shorter)


def _apart(one: _Answer, other: _Answer) -> float:
    """The largest difference of any token's logit in any step until the answers part."""
    steps = min(_agreeing(one.tokens, other.tokens) + 1, len(one.logits), len(other.logits))
    return float(np.abs(one.logits[:steps] - other.logits[:steps]).max())


def _grids(prompt: Prompt) -> list[tuple[int, int, int]]:
    return [image.grid_thw for image in prompt.images]


def _with_images(prompt: Prompt, change: Any) -> Prompt:
    return replace(prompt, images=tuple(change(image) for image in prompt.images))


def _blacken(image: PreparedImage) -> PreparedImage:
    return replace(image, patches=np.zeros_like(image.patches))


def _turn(image: PreparedImage) -> PreparedImage:
    frames, rows, columns = image.grid_thw
    return replace(image, grid_thw=(frames, columns, rows))
