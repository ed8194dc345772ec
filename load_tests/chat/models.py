"""The two chat models that are measured, exported as any other. Their weights are random, which no timing minds.

A seed is chosen so that neither network ends its answer before the tokens that are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.manifest import MANIFEST_FILE, Entry, read_entry
from export import pipeline
from export.load import load
from export.spec import ExportRequest, LoadedChat
from load_tests.cache import cache

_TURNS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}


def repository() -> Path:
    """Of these two alone, so that a gateway on it has nothing else in its memory."""
    return cache() / "chat"


@dataclass(frozen=True)
class Chat:
    """A Qwen2.5-VL by its sizes, with the small vocabulary of the exporter's own."""

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    seed: int = 0

    @property
    def entry(self) -> Entry:
        """Its decoder, which stands for all three engines."""
        return read_entry(self._directory)

    def make(self) -> None:
        """Export it where it is not there yet."""
        if not (self._directory / MANIFEST_FILE).is_file():
            pipeline.export(self._request, lambda stage: print(f"{self.name}: {stage}", flush=True))

    def network(self) -> LoadedChat:
        """What was exported, with the same weights."""
        loaded = load(self._request)
        assert isinstance(loaded, LoadedChat), "the source is of chat models"
        return loaded

    @property
    def _directory(self) -> Path:
        return repository() / f"{self.name}.decoder" / "1"

    @property
    def _request(self) -> ExportRequest:
        sizes = {"text_config": dict(self.text) | _TURNS, "vision_config": dict(self.vision)}
        return ExportRequest(
            "qwen2_5_vl", repository=repository(), name=self.name, weights="random", seed=self.seed, model_args=sizes
        )


# Widths of Qwen2.5-0.5B and half of its layers.
LARGE = Chat(
    "chat-200m",
    text={
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 12,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    vision={"depth": 8, "hidden_size": 512, "intermediate_size": 1368, "num_heads": 8, "fullatt_block_indexes": [3, 7]},
)
TINY = Chat(
    "chat-6m",
    text={
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    vision={"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": [1]},
)
