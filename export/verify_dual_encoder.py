"""Verification of a dual encoder: ids and vectors of the served path against open_clip and torch, in ways that can fail."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import InvalidValueError
from app.manifest import Check, Embedding, Entry, GoldenExample
from app.text import phrase_tokenizer
from export.agreement import SENSITIVITY, at_least, at_most, compare_pixels
from export.golden import GoldenImage, golden_images
from export.phrases import broken_texts, difficult_phrases, grounding_phrases
from export.reference import reference_pixels
from export.runner import Infer
from export.served import Frames, ask, batches_for, served_pixels, staged_entry
from export.spec import DualReference, Staged, image_tensor
from export.verify_pair import verify_pair

Vectors = NDArray[Any]
REFERENCE = "open_clip's tokenizer, torchvision and the network before any rewriting"


@dataclass(frozen=True)
class VectorTolerance:
    """`cosine`: how far the cosine of two vectors may be from 1, on the same pixels and ids. `absolute`: of each number. `path`: as
    `cosine`, of the whole served path, whose pixels differ by a level here and there. `probability`: of a text for an image.
    `golden`: of each number in the smoke test."""

    cosine: float
    absolute: float
    path: float
    probability: float
    golden: float


TOLERANCES: dict[str, VectorTolerance] = {
    "fp32": VectorTolerance(1e-5, 1e-3, path=0.02, probability=0.01, golden=1e-3),
    "fp16": VectorTolerance(2e-3, 0.02, path=0.03, probability=0.1, golden=0.02),
    "bf16": VectorTolerance(0.02, 0.1, path=0.06, probability=0.4, golden=0.1),
}


def verify_dual_encoder(build: Sequence[Staged], reference: DualReference) -> tuple[Staged, ...]:
    """Hold the engines `image` and `text` of one build against `reference`, at batch 1, 3 and 8.

    The served side is the gateway's own code: decoding, resizing, cleaning, the tokenizer and the onnxruntime backend. The
    reference's side is Pillow, torchvision, open_clip's tokenizer and the network before any rewriting.

    Raises:
        VerificationError: with the checks of both engines that failed.
        ExportError: an engine does not run here; disk full.
    """
    entries = [staged_entry(staged) for staged in build]
    verifier = _Verifier(entries, reference, golden_images())
    return verify_pair(build, entries, verifier, (verifier.check_images, verifier.check_texts), REFERENCE)


class _Verifier:
    """Images and texts on both sides, and the comparisons between their vectors."""

    def __init__(self, entries: Sequence[Entry], reference: DualReference, images: Sequence[GoldenImage]) -> None:
        seeing, reading = (entry.manifest for entry in entries)
        assert reading.text is not None
        assert reading.embedding is not None
        self.reference, self.images = reference, images
        self.text, self.embedding = reading.text, reading.embedding
        self.tokenizer = phrase_tokenizer(entries[1])
        self.preprocessing = seeing.preprocessing
        self.tolerance = TOLERANCES[seeing.precision]
        self.batches = batches_for(seeing)
        self.texts = _texts()
        self.frames = np.stack([served_pixels(image.data, self.preprocessing)[0] for image in images])
        self.expected = np.stack([reference_pixels(image.data, self.preprocessing) for image in images])
        self.ids = np.stack([self.tokenizer.encode(text).input_ids for text in self.texts])
        with torch.inference_mode():
            self.on_frames, self.on_expected = self._see(self.frames), self._see(self.expected)
            rows = torch.from_numpy(reference.vocabulary.rows(self.texts))
            self.on_texts = torch.cat([reference.network.encode_texts(row[None]) for row in rows]).numpy()
        self.seen: Vectors = self.on_frames  # what the engine gives, once it was asked

    def check_images(self, infer: Infer) -> Iterator[Check]:
        """Every check of the engine `image`, in the order of the path."""
        yield from compare_pixels(self.frames, self.expected)
        alone = yield from self._compare(infer, "image", self.frames, self.on_frames)
        yield at_most("served path: image cosine", distance(alone, self.on_expected).max(), self.tolerance.path, "from 1")
        black = infer(np.zeros_like(self.frames[:1]))
        swapped = ask(infer, np.ascontiguousarray(self.frames[..., ::-1]))
        others = np.roll(alone, 1, axis=0)
        yield from self._sight(alone, {"a black image": black, "swapped channels": swapped, "another image": others})
        self.seen = alone

    def check_texts(self, infer: Infer) -> Iterator[Check]:
        """Every check of the engine `text`, and of images and texts together."""
        yield from self._compare_ids()
        alone = yield from self._compare(infer, "text", self.ids, self.on_texts)
        first_words = np.stack([self.tokenizer.encode(text.split()[0]).input_ids for text in self.texts])
        cut, others = ask(infer, first_words), np.roll(alone, 1, axis=0)
        yield from self._sight(alone, {"a text cut off": cut, "another text": others})
        ours, theirs = (_fit(*pair, self.embedding) for pair in ((self.seen, alone), (self.on_frames, self.on_texts)))
        yield at_most("images x texts: probabilities", np.abs(ours - theirs).max(), self.tolerance.probability)

    def write_golden(self, entry: Entry, infer: Infer) -> Iterator[GoldenExample]:
        """Images that travel, or texts; `app/golden.py` asks for their vectors wherever the engine is served."""
        tolerance = self.tolerance.golden
        if entry.manifest.role == "text":
            for row in range(3):
                outputs = f"golden/text-{row}.npz"
                np.savez(entry.path / outputs, embedding=infer(self.ids[row : row + 1]))
                yield GoldenExample(phrase=self.texts[row], outputs=outputs, tolerance=tolerance)
            return
        for image, frame in zip(self.images, self.frames, strict=True):
            if image.travels:
                outputs = f"golden/{image.name.partition('.')[0]}.npz"
                np.savez(entry.path / outputs, embedding=infer(frame[None]))
                yield GoldenExample(image=f"golden/{image.name}", outputs=outputs, tolerance=tolerance)

    def _compare(self, infer: Infer, what: str, rows: NDArray[Any], reference: Vectors) -> Generator[Check, None, Vectors]:
        """The engine in batches against the reference; returns what it gives row by row."""
        by_batch = {batch: ask(infer, rows, batch) for batch in self.batches}
        for batch, vectors in by_batch.items():
            yield from self._agree(f"engine, batch {batch}: {what}", vectors, reference)
        lengths = np.linalg.norm(by_batch[1].astype(np.float64), axis=1)
        yield at_most(f"engine: {what} length", np.abs(lengths - 1).max(), 1e-5, "from 1")
        for batch in self.batches[1:]:
            yield from self._agree(f"alone and in a batch of {batch}: {what}", by_batch[batch], by_batch[1])
        return by_batch[1]

    def _agree(self, what: str, vectors: Vectors, reference: Vectors) -> Iterator[Check]:
        yield at_most(f"{what} cosine", distance(vectors, reference).max(), self.tolerance.cosine, "from 1")
        yield at_most(f"{what} vectors", np.abs(vectors - reference).max(), self.tolerance.absolute)

    def _sight(self, alone: Vectors, others: dict[str, Vectors]) -> Iterator[Check]:
        """What a fault would do must be larger than what the tolerances let pass; else the comparison above is blind."""
        for what, vectors in others.items():
            needed = SENSITIVITY * self.tolerance.cosine
            yield at_least(f"sees {what}: cosine", np.median(distance(alone, vectors)), needed, "from 1")

    def _compare_ids(self) -> Iterator[Check]:
        """The gateway's ids, and whether it says that a text was cut off, on difficult strings."""
        texts = (*difficult_phrases(), *broken_texts())
        long = [self.reference.vocabulary.count(text) > self.text.length for text in texts]
        rows = self.reference.vocabulary.rows(texts)
        empty = self.reference.vocabulary.rows([""])[0]
        wrong = sum(not self._same_ids(text, ids, cut, empty) for text, ids, cut in zip(texts, rows, long, strict=True))
        yield at_most(f"tokenizer: other ids in {len(texts):,} strings", wrong, 0, "strings")
        yield at_least("tokenizer: cut off among them", sum(long), 1, "strings")

    def _same_ids(self, text: str, ids: NDArray[np.int64], cut: bool, empty: NDArray[np.int64]) -> bool:
        try:
            ours = self.tokenizer.encode(text)
        except InvalidValueError:
            return np.array_equal(ids, empty)  # nothing is left of it
        return np.array_equal(ours.input_ids, ids) and ours.truncated == cut

    def _see(self, frames: Frames) -> Vectors:
        """float32 [B,D], each on its own."""
        images = image_tensor(torch.from_numpy(frames), self.preprocessing)
        vectors: Vectors = torch.cat([self.reference.network.encode_images(image[None]) for image in images]).numpy()
        return vectors


def _texts() -> tuple[str, ...]:
    """Eight texts of different lengths, one of them too long for any encoder, one broken."""
    described = tuple(dict.fromkeys(grounding_phrases()))
    long = " ".join(described[:60])
    return (*described[:4], f"{described[4]}; {described[5]}", long, "Caf&amp;eacute; cr\u00c3\u00a8me on a tray", "the circle")


def distance(one: Vectors, other: Vectors) -> NDArray[np.float64]:
    """[rows]: 1 less the cosine of vectors [rows,D]."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    apart: NDArray[np.float64] = 1 - (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return apart


def _fit(images: Vectors, texts: Vectors, embedding: Embedding) -> NDArray[np.float64]:
    """[images,texts]: the probabilities of texts for images."""
    logits = embedding.scale * (images.astype(np.float64) @ texts.T.astype(np.float64)) + embedding.bias
    if embedding.activation == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponents / exponents.sum(1, keepdims=True))
