"""Verification of a grounding network: ids and boxes of the served path against transformers and torch, in ways that can fail."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.manifest import Check, Entry, GoldenExample, Verification
from app.text import phrase_tokenizer
from export.agreement import SENSITIVITY, at_least, at_most, compare_pixels
from export.files import write_manifest, writing
from export.golden import GoldenImage, golden_images
from export.grounder import corners
from export.reading import compare_ids, known_phrases
from export.reference import reference_pixels
from export.runner import Run, open_tensors
from export.served import Frames, ask_all, batches_for, failure, served_pixels, staged_entry
from export.spec import GroundingReference, Staged, VerificationError, image_tensor

Boxes = NDArray[Any]
_PHRASES = 4  # each image is asked about two of them
_OF_THE_FRAME = "of the frame"


@dataclass(frozen=True)
class BoxTolerance:
    """Sums of the differences of a box's four numbers, in shares of the frame. `engine`: on the same pixels and ids. `path`: of the
    whole served path, whose pixels differ by a level here and there. `golden`: of each number in the smoke test."""

    engine: float
    path: float
    golden: float


TOLERANCES: dict[str, BoxTolerance] = {
    "fp32": BoxTolerance(1e-3, 0.05, golden=1e-3),
    "fp16": BoxTolerance(0.02, 0.07, golden=0.02),
    "bf16": BoxTolerance(0.1, 0.2, golden=0.1),
}


def verify_grounder(staged: Staged, reference: GroundingReference) -> Staged:
    """Hold the staged engine against `reference` on golden images, two phrases each, at batch 1, 3 and 8.

    The served side is the gateway's own code: decoding, resizing, the tokenizer and the onnxruntime backend. The reference's side
    is Pillow, torchvision, the tokenizer of transformers and the network before any rewriting.

    Raises:
        VerificationError: with the checks that failed.
        ExportError: the engine does not run here; disk full.
    """
    entry = staged_entry(staged)
    verifier = _Verifier(entry, reference, golden_images())
    with open_tensors(entry) as run:
        checks = tuple(verifier.run(run))
        verification = Verification(
            reference="transformers' tokenizer, torchvision and the network before any rewriting",
            images=len(verifier.images),
            batch_sizes=verifier.batches,
            checks=checks,
            accuracy={},
        )
        if not verification.passed:
            raise VerificationError(failure(checks), verification)
        with writing(staged.path):
            golden = tuple(verifier.write_golden(run))
            write_manifest(staged.path, entry.manifest.model_copy(update={"verification": verification, "golden": golden}))
    return Staged(staged.path, staged_entry(staged).manifest)


class _Verifier:
    """Pairs of an image and a phrase on both sides: image i with the phrases i and i + 1, in turn."""

    def __init__(self, entry: Entry, reference: GroundingReference, images: Sequence[GoldenImage]) -> None:
        assert entry.manifest.text is not None
        self.entry, self.reference, self.images = entry, reference, images
        self.tokenizer = phrase_tokenizer(entry)
        self.preprocessing = entry.manifest.preprocessing
        self.text = entry.manifest.text
        self.tolerance = TOLERANCES[entry.manifest.precision]
        self.batches = batches_for(entry.manifest)
        self.phrases = known_phrases(reference.vocabulary, self.text.length, _PHRASES)
        self.of_image = np.arange(len(images)).repeat(2)
        self.of_phrase = (self.of_image + np.arange(len(self.of_image)) % 2) % _PHRASES
        self.frames = np.stack([served_pixels(image.data, self.preprocessing)[0] for image in images])
        self.expected = np.stack([reference_pixels(image.data, self.preprocessing) for image in images])
        ids, mask = reference.vocabulary.rows(self.phrases, self.text.length)
        self.ids, self.mask = ids[self.of_phrase], mask[self.of_phrase]
        self.on_frames = self._ask_reference(self.frames)
        self.on_expected = self._ask_reference(self.expected)

    def run(self, run: Run) -> Iterator[Check]:
        """Every check, in the order of the path."""
        yield from compare_pixels(self.frames, self.expected)
        yield compare_ids(self.tokenizer, self.reference.vocabulary, self.text)
        inputs, limit = self._served(self.frames), self.tolerance.engine
        by_batch = {batch: ask_all(run, inputs, batch)["box"] for batch in self.batches}
        for batch, boxes in by_batch.items():
            yield at_most(f"engine, batch {batch}: box", distance(boxes, self.on_frames).max(), limit, _OF_THE_FRAME)
        alone = by_batch[1]
        for batch in self.batches[1:]:
            apart = distance(by_batch[batch], alone).max()
            yield at_most(f"alone and in a batch of {batch}: box", apart, limit, _OF_THE_FRAME)
        yield at_most("served path: box", distance(alone, self.on_expected).max(), self.tolerance.path, _OF_THE_FRAME)
        yield from self._sight(run, inputs, alone)

    def write_golden(self, run: Run) -> Iterator[GoldenExample]:
        """The images that travel, each with its first phrase; `app/golden.py` asks for the boxes wherever the engine is served."""
        inputs = self._served(self.frames)
        for row in range(0, len(self.of_image), 2):
            image, phrase = self.images[self.of_image[row]], self.phrases[self.of_phrase[row]]
            if image.travels:
                outputs = f"golden/{image.name.partition('.')[0]}.npz"
                box = run({name: rows[row : row + 1] for name, rows in inputs.items()})["box"]
                np.savez(self.entry.path / outputs, box=box)
                yield GoldenExample(image=f"golden/{image.name}", phrase=phrase, outputs=outputs, tolerance=self.tolerance.golden)

    def _sight(self, run: Run, inputs: Tensors, alone: Boxes) -> Iterator[Check]:
        """What a fault would do must be larger than what the tolerances let pass; else the comparison above is blind."""
        black = ask_all(run, {**inputs, "image": np.zeros_like(inputs["image"])})["box"]
        swapped = ask_all(run, {**inputs, "image": np.ascontiguousarray(inputs["image"][..., ::-1])})["box"]
        first, second = alone[0::2], alone[1::2]  # the second phrase of an image is the first of the next
        moved = {
            "a black image": distance(alone, black),
            "swapped channels": distance(alone, swapped),
            "another image": distance(second[:-1], first[1:]),
            "another phrase": distance(first, second),
        }
        for what, apart in moved.items():
            needed = SENSITIVITY * self.tolerance.engine
            yield at_least(f"sees {what}: box", np.median(apart), needed, _OF_THE_FRAME)

    def _served(self, frames: Frames) -> dict[str, NDArray[Any]]:
        """The engine's inputs, one row for each pair, with the gateway's ids."""
        encoded = [self.tokenizer.encode(phrase) for phrase in self.phrases]
        ids, mask = (np.stack([getattr(one, name) for one in encoded]) for name in ("input_ids", "attention_mask"))
        return {"image": frames[self.of_image], "input_ids": ids[self.of_phrase], "attention_mask": mask[self.of_phrase]}

    def _ask_reference(self, frames: Frames) -> Boxes:
        """float32 [pairs,4], each on its own."""
        images = image_tensor(torch.from_numpy(frames), self.preprocessing)
        ids, mask = torch.from_numpy(self.ids), torch.from_numpy(self.mask)
        with torch.inference_mode():
            rows = [
                self.reference.network(images[image, None], ids[row, None], mask[row, None])
                for row, image in enumerate(self.of_image)
            ]
            boxes: Boxes = corners(torch.cat(rows)).numpy()
        return boxes


def distance(one: Boxes, other: Boxes) -> NDArray[Any]:
    """[rows]: the sum of the differences of the four numbers of each box [rows,4]."""
    apart: NDArray[Any] = np.abs(one.astype(np.float64) - other).sum(-1)
    return apart
