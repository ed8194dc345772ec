"""Sixth stage of a model: the served path must give what torch gives, and the comparison must be able to fail."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from app.manifest import Check, GoldenExample, Manifest, Verification
from export.agreement import (
    SCALED,
    SENSITIVITY,
    TOLERANCES,
    Scores,
    Tolerance,
    at_least,
    at_most,
    compare,
    compare_pixels,
    distance,
)
from export.detector import Detector
from export.files import write_manifest, writing
from export.golden import GoldenImage, golden_images
from export.onnx_detector import OnnxDetector
from export.reference import reference_pixels
from export.runner import Infer, open_engine
from export.served import Frames, ask, batches_for, failure, served_pixels, staged_entry
from export.spec import (
    ChatReference,
    DualReference,
    ExportError,
    Fused,
    GroundingReference,
    Reference,
    Staged,
    VerificationError,
    image_tensor,
)
from export.tokenizer import Tokenizer
from export.verify_chat import verify_chat
from export.verify_detector import verify_detector
from export.verify_dual_encoder import verify_dual_encoder
from export.verify_grounder import verify_grounder
from export.verify_onnx_detector import verify_onnx_detector
from export.verify_tokenizer import verify_tokenizer


def verify(build: Sequence[Staged], fused: Sequence[Fused]) -> tuple[Staged, ...]:
    """Hold every engine of the build against its reference; `fused` are the graphs that the engines were made of, in their order.

    Raises:
        VerificationError, ExportError: see `verify_classifier` and the modules of the other tasks.
    """
    match fused[0].reference:
        case Tokenizer() | DualReference() | ChatReference() as reference:
            return _verify_together(build, reference)
        case OnnxDetector() as network:
            return (verify_onnx_detector(build[0], network, fused[0].inner),)
        case Detector() as network:
            return (verify_detector(build[0], network, fused[0].inner),)
        case GroundingReference() as reference:
            return (verify_grounder(build[0], reference),)
        case reference:
            return (verify_classifier(build[0], reference),)


def _verify_together(build: Sequence[Staged], reference: Tokenizer | DualReference | ChatReference) -> tuple[Staged, ...]:
    if isinstance(reference, Tokenizer):
        return verify_tokenizer(build, reference)
    return verify_chat(build, reference) if isinstance(reference, ChatReference) else verify_dual_encoder(build, reference)


def verify_classifier(staged: Staged, reference: Reference) -> Staged:
    """Hold the staged engine against `reference` on the golden images, at batch 1, 3 and 8 (as far as its maximum batch goes).

    The served side is the gateway's own code: `app.decode`, `app.resize` and the onnxruntime backend. The reference's side is
    Pillow, torchvision and the network before any rewriting. On success the golden outputs and the finished manifest are written.

    Raises:
        VerificationError: with the checks that failed.
        ExportError: the engine does not run here; disk full.
    """
    entry = staged_entry(staged)
    verifier = _Verifier(entry.manifest, reference, golden_images())
    with open_engine(entry) as infer:
        checks = tuple(verifier.run(infer))
        verification = Verification(
            reference="torchvision and the network before any rewriting",
            images=len(verifier.images),
            batch_sizes=verifier.batches,
            checks=checks,
            accuracy={},
        )
        if not verification.passed:
            raise VerificationError(failure(checks), verification)
        golden = tuple(_write_golden(staged, infer, verifier))
    allowed = any(not check.required for check in checks) and all(check.passed for check in checks)
    preprocessing = entry.manifest.preprocessing.model_copy(update={"scaled_decoding": allowed})
    findings = {"verification": verification, "preprocessing": preprocessing, "golden": golden}
    with writing(staged.path):
        write_manifest(staged.path, entry.manifest.model_copy(update=findings))
    return Staged(staged.path, staged_entry(staged).manifest)


class _Verifier:
    """The golden images on both sides, and the comparisons between them."""

    def __init__(self, manifest: Manifest, reference: Reference, images: Sequence[GoldenImage]) -> None:
        if manifest.activation is None:
            raise ExportError("A classifier's manifest says whether its probabilities come of softmax or sigmoid.")
        self.activation = manifest.activation
        self.preprocessing = manifest.preprocessing
        self.tolerance: Tolerance = TOLERANCES[manifest.precision]
        self.batches = batches_for(manifest)
        self.images = images
        self.frames = np.stack([served_pixels(image.data, self.preprocessing)[0] for image in images])
        self.expected = np.stack([reference_pixels(image.data, self.preprocessing) for image in images])
        self.on_frames = self._ask(reference, self.frames)
        self.on_expected = self._ask(reference, self.expected)

    def run(self, infer: Infer) -> Iterator[Check]:
        """Every check, in the order of the path."""
        yield from compare_pixels(self.frames, self.expected)
        limits = self.tolerance.engine
        by_batch = {batch: self._scores(ask(infer, self.frames, batch)) for batch in self.batches}
        for batch, served in by_batch.items():
            yield from compare(f"engine, batch {batch}", served, self.on_frames, limits)
        alone = by_batch[1]
        for batch in self.batches[1:]:
            apart = distance(by_batch[batch], alone, self.on_frames.scale).max()
            yield at_most(f"alone and in a batch of {batch}: logits", apart, limits.logits, "of their deviation")
        yield from compare("served path", alone, self.on_expected, self.tolerance.path)
        yield from self._sight(infer, alone)
        yield from self._scaled_decoding(infer)

    def _sight(self, infer: Infer, alone: Scores) -> Iterator[Check]:
        """What a fault would do must be larger than what the tolerances let pass; else the comparison above is blind."""
        needed = SENSITIVITY * self.tolerance.engine.logits
        black = self._scores(infer(np.zeros_like(self.frames[:1])))
        swapped = self._scores(ask(infer, np.ascontiguousarray(self.frames[..., ::-1])))
        others = alone.rows(np.roll(np.arange(len(self.frames)), 1))
        for what, scores in (("a black image", black), ("swapped channels", swapped), ("another image", others)):
            moved = np.median(distance(alone, scores, self.on_frames.scale))
            yield at_least(f"sees {what}: logits", moved, needed, "of their deviation")

    def _scaled_decoding(self, infer: Infer) -> Iterator[Check]:
        """The JPEGs that are large enough for it; no check when none is, and then it stays off."""
        decoded = [served_pixels(image.data, self.preprocessing, scaled=True) for image in self.images]
        rows = np.array([row for row, (_, scaled) in enumerate(decoded) if scaled > 1], dtype=int)
        if not len(rows):
            return
        served = self._scores(ask(infer, np.stack([decoded[row][0] for row in rows])))
        checks = compare("scaled decoding", served, self.on_expected.rows(rows), SCALED)
        yield from (check.model_copy(update={"required": False}) for check in checks)

    def _ask(self, reference: Reference, frames: Frames) -> Scores:
        with torch.inference_mode():
            logits = reference(image_tensor(torch.from_numpy(frames), self.preprocessing))
        return Scores.of_logits(logits.numpy(), self.activation)

    def _scores(self, probabilities: NDArray[np.float32]) -> Scores:
        return Scores.of_probabilities(probabilities, self.activation)


def _write_golden(staged: Staged, infer: Infer, verifier: _Verifier) -> Iterator[GoldenExample]:
    """The raw outputs of the images that travel; `app/golden.py` asks for them again wherever the engine is served."""
    tolerance = verifier.tolerance.golden
    for image, frame in zip(verifier.images, verifier.frames, strict=True):
        if image.travels:
            outputs = f"golden/{image.name.partition('.')[0]}.npz"
            with writing(staged.path):
                np.savez(staged.path / outputs, probabilities=infer(frame[None]))
            yield GoldenExample(image=f"golden/{image.name}", outputs=outputs, tolerance=tolerance)
