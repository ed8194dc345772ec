"""Verification of a detector: every query of the engine against torch before any is chosen, and the rows that are chosen."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from app.manifest import Check, Entry, GoldenExample, TensorSpec, Verification
from app.resize import content_size
from app.text import phrase_tokenizer
from export.agreement import at_least, at_most, compare_pixels
from export.detector import Detector
from export.files import write_manifest, writing
from export.golden import GoldenImage, golden_images
from export.phrase_detector import PhraseDetector
from export.reading import compare_ids, short_phrases
from export.reference import reference_content, reference_pixels
from export.row_agreement import (
    DISTINCT,
    SENSITIVITY,
    TOLERANCES,
    Told,
    at_same_places,
    box_distance,
    compare_queries,
    compare_rows,
    proposal_distance,
    score_distance,
)
from export.runner import Run, open_tensors
from export.served import Frames, ask_all, batches_for, failure, served_image, staged_entry
from export.spec import Staged, VerificationError, image_tensor

Arrays = dict[str, NDArray[Any]]
_PHRASES = 4  # of the places that there are; the others stay empty


def verify_detector(staged: Staged, network: Detector, inner: Sequence[TensorSpec]) -> Staged:
    """Hold the staged engine against `network` on the golden images, at batch 1, 3 and 8 (as far as its maximum batch goes).

    The served side is the gateway's own code, the reference's side Pillow, torchvision, the library's tokenizer where there are
    phrases to look for, and the network. `inner` are the values of
    every query that an ONNX engine holds; they are laid open and compared one by one. A TensorRT plan shows its rows alone.

    On success the golden outputs and the finished manifest are written.

    Raises:
        VerificationError: with the checks that failed.
        ExportError: the engine does not run here; disk full.
    """
    return run_verifier(staged, DetectorVerifier(staged_entry(staged), network, golden_images()), inner)


def run_verifier(staged: Staged, verifier: "DetectorVerifier", inner: Sequence[TensorSpec]) -> Staged:
    """Make every check of `verifier`, and write the golden outputs and the finished manifest.

    Raises:
        VerificationError, ExportError: see `verify_detector`.
    """
    entry = verifier.entry
    with _laid_open(entry, inner) as whole, open_tensors(whole) as run:
        checks = tuple(verifier.run(run))
    verification = Verification(
        reference="torchvision and the network before any rewriting",
        images=len(verifier.images),
        batch_sizes=verifier.batches,
        checks=checks,
        accuracy={},
    )
    if not verification.passed:
        raise VerificationError(failure(checks), verification)
    with open_tensors(entry) as run, writing(staged.path):
        golden = tuple(verifier.write_golden(staged, run))
        write_manifest(staged.path, entry.manifest.model_copy(update={"verification": verification, "golden": golden}))
    return Staged(staged.path, staged_entry(staged).manifest)


@contextmanager
def _laid_open(entry: Entry, inner: Sequence[TensorSpec]) -> Iterator[Entry]:
    """The engine with its inner values as outputs, where it is an ONNX file: the same nodes in a directory of its own."""
    if entry.manifest.engine.kind != "onnx":
        yield entry
        return
    with TemporaryDirectory(prefix="vitrine-verify-") as directory:
        model = onnx.load(entry.engine_file)
        for spec in inner:
            shape = ["batch", *(size if size > 0 else None for size in spec.shape[1:])]
            model.graph.output.append(helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape))
        path = Path(directory)
        onnx.save(model, path / entry.manifest.engine.file)
        outputs = (*entry.manifest.outputs, *inner)
        yield replace(entry, path=path, manifest=entry.manifest.model_copy(update={"outputs": outputs}))


class DetectorVerifier:
    """The golden images on both sides, and the comparisons between them."""

    shift = 1  # from a query to the neighbour whose box must be another

    def __init__(self, entry: Entry, network: Detector, images: Sequence[GoldenImage]) -> None:
        manifest = entry.manifest
        self.entry = entry
        self.phrases: tuple[str, ...] = ()
        if isinstance(network, PhraseDetector):
            self.phrases = short_phrases(network.vocabulary, network.length, _PHRASES)
            network.ask(self.phrases)
        self.preprocessing = manifest.preprocessing
        self.names = {spec.name for spec in manifest.inputs}
        self.tolerance = TOLERANCES[manifest.precision]
        self.batches = batches_for(manifest)
        self.network = network
        self.images = images
        served = [served_image(image.data, self.preprocessing) for image in images]
        self.frames = np.stack([frame for frame, _ in served])
        self.content = np.array([content_size(info.width, info.height, self.preprocessing) for _, info in served], np.int32)
        self.expected = np.stack([reference_pixels(image.data, self.preprocessing) for image in images])
        self.expected_content = np.array([reference_content(image.data, self.preprocessing) for image in images], np.int32)
        self.on_frames = self.ask_network(self.frames, self.content)
        self.on_expected = self.ask_network(self.expected, self.expected_content)

    def run(self, run: Run) -> Iterator[Check]:
        """Every check, in the order of the path; queries where the engine shows them."""
        yield from compare_pixels(self.frames, self.expected)
        if isinstance(self.network, PhraseDetector) and self.entry.manifest.text is not None:
            yield compare_ids(phrase_tokenizer(self.entry), self.network.vocabulary, self.entry.manifest.text)
        yield at_most("content: largest difference", np.abs(self.content - self.expected_content).max(), 0.0, "pixels")
        by_batch = {batch: ask_all(run, self._inputs(self.frames), batch) for batch in self.batches}
        for batch, served in by_batch.items():
            what = f"engine, batch {batch}"
            reference = self.on_frames
            if "query_boxes" in served:
                told = self.told(served)
                reference = self._starting(self.on_frames, self.frames, self.content, told.starts)
                yield from compare_queries(what, told, self.match(told, reference), self.tolerance)
            yield from self.compare_rows(what, served, reference)
        alone = by_batch[1]
        if "query_boxes" not in alone:
            return
        told = self.told(alone)
        for batch in self.batches[1:]:
            together, apart = at_same_places(self.told(by_batch[batch]), told)
            yield from compare_queries(f"alone and in a batch of {batch}", together, self.match(together, apart), self.tolerance)
        yield from self._path(told)
        neighbours = box_distance(told.boxes, np.roll(told.boxes, self.shift, axis=1))
        yield at_least("engine: distance of neighbouring boxes", self.typical(neighbours), DISTINCT, "of the frame")
        yield from self._sight(run, told)
        if "content" in self.names:
            yield from self._padding(run, told)
        if self.phrases:
            others = self.told(ask_all(run, self._inputs(self.frames, phrases=self.phrases[::-1])))
            moved = np.median(score_distance(told.scores, others.scores))
            yield at_least("sees other phrases: query scores", moved, SENSITIVITY * self.tolerance.score)

    def told(self, served: Mapping[str, NDArray[Any]]) -> Told:
        """What the engine says of every query, as it is compared."""
        return Told(served["query_scores"], served["query_boxes"], served.get("query_masks"), served.get("proposals"))

    def match(self, told: Told, reference: Told) -> Told:
        """The reference's queries in the order of the engine's."""
        return reference

    def typical(self, moved: NDArray[Any]) -> Any:
        """The difference that stands for those of all queries [B,Q]."""
        return np.median(moved)

    def compare_rows(self, what: str, served: Mapping[str, NDArray[Any]], reference: Told) -> Iterator[Check]:
        """The rows that were chosen."""
        yield from compare_rows(what, dict(served), reference, self.network, self.tolerance)

    def write_golden(self, staged: Staged, run: Run) -> Iterator[GoldenExample]:
        """The raw outputs of the images that travel; `app/golden.py` asks for them again wherever the engine is served."""
        inputs = self._inputs(self.frames, phrases=self.phrases[:1])
        phrase = self.phrases[0] if self.phrases else None
        for index, image in enumerate(self.images):
            if image.travels:
                outputs = f"golden/{image.name.partition('.')[0]}.npz"
                answer = run({name: rows[index : index + 1] for name, rows in inputs.items()})
                np.savez_compressed(staged.path / outputs, allow_pickle=False, **answer)
                tolerance, outliers = self.tolerance.golden, self.tolerance.outliers
                example = GoldenExample(image=f"golden/{image.name}", outputs=outputs, tolerance=tolerance, outliers=outliers)
                yield example.model_copy(update={"phrase": phrase})

    def _path(self, told: Told) -> Iterator[Check]:
        """The whole served path: the median query of the image that moves most."""
        reference = self._starting(self.on_expected, self.expected, self.expected_content, told.starts)
        expected = self.match(told, reference)
        boxes = np.median(box_distance(told.boxes, expected.boxes), axis=1).max()
        scores = np.median(score_distance(told.scores, expected.scores), axis=1).max()
        yield at_most("served path: query boxes", boxes, self.tolerance.path_box, "of the frame")
        yield at_most("served path: query scores", scores, self.tolerance.path_score)
        if told.proposals is not None and expected.proposals is not None:
            proposals = np.median(proposal_distance(told.proposals, expected.proposals, expected.proposals), axis=1).max()
            yield at_most("served path: proposals", proposals, self.tolerance.path_score, "of their spread")

    def _sight(self, run: Run, told: Told) -> Iterator[Check]:
        """What a fault would do must be larger than what the tolerances let pass; else the comparison above is blind."""
        black = self.told(ask_all(run, self._inputs(np.zeros_like(self.frames))))
        swapped = self.told(ask_all(run, self._inputs(np.ascontiguousarray(self.frames[..., ::-1]))))
        others = told.rows(np.roll(np.arange(len(self.frames)), 1))
        for what, other in (("a black image", black), ("swapped channels", swapped), ("another image", others)):
            yield from self._moved(f"sees {what}", told, other)

    def _padding(self, run: Run, told: Told) -> Iterator[Check]:
        """What lies in the padding must not matter, and where it begins must."""
        noise = np.random.default_rng(0).integers(0, 256, self.frames.shape, np.uint8)
        rows, columns = (
            np.arange(size)[None] < self.content[:, axis : axis + 1] for axis, size in enumerate(self.frames.shape[1:3])
        )
        filled = np.where((rows[:, :, None] & columns[:, None])[..., None], self.frames, noise)
        yield from compare_queries("noise in the padding", self.told(ask_all(run, self._inputs(filled))), told, self.tolerance)
        smaller = np.maximum(self.content * 3 // 4, 1)
        yield from self._moved("sees where padding begins", told, self.told(ask_all(run, self._inputs(self.frames, smaller))))

    def _moved(self, what: str, told: Told, other: Told) -> Iterator[Check]:
        boxes, scores = box_distance(told.boxes, other.boxes), score_distance(told.scores, other.scores)
        yield at_least(f"{what}: query boxes", self.typical(boxes), SENSITIVITY * self.tolerance.box, "of the frame")
        yield at_least(f"{what}: query scores", self.typical(scores), SENSITIVITY * self.tolerance.score)
        if told.proposals is not None and other.proposals is not None:
            proposals = np.median(proposal_distance(told.proposals, other.proposals, told.proposals))
            yield at_least(f"{what}: proposals", proposals, SENSITIVITY * self.tolerance.score, "of their spread")

    def _starting(self, told: Told, frames: Frames, content: NDArray[np.int32], starts: NDArray[Any] | None) -> Told:
        """`told` as the network tells it of `frames` with its queries starting at `starts`; its proposals stay its own."""
        if starts is None or (told.starts is not None and np.array_equal(told.starts, starts)):
            return told
        return replace(self.ask_network(frames, content, starts), proposals=told.proposals)

    def ask_network(self, frames: Frames, content: NDArray[np.int32], starts: NDArray[Any] | None = None) -> Told:
        given = torch.from_numpy(content) if "content" in self.names else None
        with torch.inference_mode():
            return Told.of(self.network, image_tensor(torch.from_numpy(frames), self.preprocessing), given, starts)

    def _inputs(self, frames: Frames, content: NDArray[np.int32] | None = None, phrases: Sequence[str] | None = None) -> Arrays:
        inputs: Arrays = {"image": frames, "content": self.content if content is None else content}
        if self.phrases:
            ids = phrase_tokenizer(self.entry).encode_together(self.phrases if phrases is None else phrases, "phrases")
            inputs["input_ids"] = np.repeat(ids, len(frames), axis=0)
        return {name: rows for name, rows in inputs.items() if name in self.names}
