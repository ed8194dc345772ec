"""The gateway's loop of tokens in process, and below it nothing but the calls of the sessions that it makes."""

import time
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from app.chat_prompt import chat_prompts
from app.generate import Generator, Prompt, Sampling, open_session, rope_positions
from app.manifest import Entry
from app.settings import available_cpus
from load_tests.chat.answers import Answer, Question


def read(entry: Entry, question: Question) -> Prompt:
    """A question without a photo as the model reads it."""
    return chat_prompts(entry).prompt(question.messages, [])


class Loop:
    """`app/generate.py` with one stream, as the gateway's thread runs it."""

    def __init__(self, entry: Entry, threads: int | None = None) -> None:
        """`threads` of an inference, by default those that the gateway takes."""
        root, self.threads = entry.path.parent.parent, threads or available_cpus()
        self.tokenizer = chat_prompts(entry).tokenizer
        self.generator = Generator.open(root, entry.manifest.model, entry.version, threads=self.threads, max_streams=1)
        self.tokens: list[int] = []
        self.logits: NDArray[np.float32] | None = None

    def ask(self, prompt: Prompt, tokens: int) -> Answer:
        """`self.tokens` are those of the answer, `self.logits` [vocabulary] those that the last was chosen by."""
        began = time.perf_counter()
        stream = self.generator.start(prompt, Sampling(max_tokens=tokens))
        self.generator.step()
        first = time.perf_counter()
        while self.generator.streams:
            self.generator.step()
        last = time.perf_counter()
        self.tokens, self.logits = stream.tokens, stream.logits
        return Answer(first - began, last - began, len(stream.tokens), self.tokenizer.decode(stream.tokens))


class Bare:
    """The answer of a `Loop` again, whose tokens are known: all inputs are there beforehand, nothing is chosen, nothing told.

    The cache stays in the engine here too; its values are bound from one call to the next.
    """

    def __init__(self, entry: Entry, prompt: Prompt, answered: Loop) -> None:
        self.text = answered.tokenizer.decode(answered.tokens)
        engines = {role: entry.path.parent.parent / f"{entry.manifest.model}.{role}" for role in ("embed", "decoder")}
        files = {role: path / str(entry.version) / entry.engine_file.name for role, path in engines.items()}
        self._embed = open_session(files["embed"], 1, ["CPUExecutionProvider"])
        self._decoder = open_session(files["decoder"], answered.threads, ["CPUExecutionProvider"])
        positions, following = rope_positions(prompt, answered.generator.architecture)
        self._inputs = [(prompt.input_ids[None], positions[None])]
        for place, token in enumerate(answered.tokens[:-1], following):
            self._inputs.append((np.array([[token]], np.int64), np.full((1, 3, 1), place, np.int64)))
        past = [each for each in self._decoder.get_inputs() if each.name.startswith("past.")]
        self._past = [each.name for each in past]
        self._present = [name.replace("past.", "present.", 1) for name in self._past]
        empty = (np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in past)
        self._empty = [onnxruntime.OrtValue.ortvalue_from_numpy(each) for each in empty]
        self.logits: Any = None

    def ask(self) -> Answer:
        """`self.logits` are the last call's, onnxruntime's own value of [1,vocabulary]."""
        began = time.perf_counter()
        cache = self._call(*self._inputs[0], self._empty)
        first = time.perf_counter()
        for ids, positions in self._inputs[1:]:
            cache = self._call(ids, positions, cache)
        return Answer(first - began, time.perf_counter() - began, len(self._inputs), self.text)

    def _call(self, ids: NDArray[np.int64], positions: NDArray[np.int64], cache: list[Any]) -> list[Any]:
        embeds = self._embed.run(["inputs_embeds"], {"input_ids": ids})[0]
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds)
        binding.bind_cpu_input("position_ids", positions)
        for name, value in zip(self._past, cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self._present:
            binding.bind_output(name)
        self._decoder.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        self.logits = outputs[0]
        return outputs[1:]
