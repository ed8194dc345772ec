"""The peer: transformers' `generate` on all cores, in process, with its own processor, cache and attention as they come."""

import time
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from app.settings import available_cpus
from export.spec import LoadedChat
from export.verify_chat import with_pillow
from load_tests.chat.answers import Answer, Question


class Peer:
    """One network in float32."""

    def __init__(self, loaded: LoadedChat) -> None:
        torch.set_num_threads(available_cpus())
        self.network = loaded.network
        self.network.set_attn_implementation("sdpa")  # the library's default; the exporter compares with "eager"
        self.processor = with_pillow(loaded.processor)  # the pixels that the gateway gives, so that tokens can be compared

    def ask(self, question: Question, tokens: int) -> Answer:
        """Greedy, from the encoded photo on."""
        began = time.perf_counter()
        images = None if question.photo is None else [Image.open(BytesIO(question.photo)).convert("RGB")]
        prompt = self.processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[prompt], images=images, return_tensors="pt")
        clock = _Clock()
        with torch.inference_mode():
            output = self.network.generate(**inputs, do_sample=False, max_new_tokens=tokens, streamer=clock)
        ids = output[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(clock.times[1] - began, clock.times[-1] - began, len(ids), text)


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers has no types here
    """When the prompt and each token was told."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
