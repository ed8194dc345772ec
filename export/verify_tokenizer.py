"""Verification of a tokenizer: tokens and restored images of both served engines against torch, in ways that can fail."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.manifest import Check, Entry, GoldenExample, Manifest, Preprocessing
from export.agreement import at_least, compare_pixels
from export.golden import GoldenImage, golden_images
from export.reference import reference_pixels
from export.runner import Infer
from export.served import Frames, ask, batches_for, served_pixels, staged_entry
from export.spec import Staged, image_tensor
from export.token_agreement import (
    MOVED,
    TOLERANCES,
    ReferenceTokens,
    compare_restored,
    compare_tokens,
    count_distinct,
    moved_pixels,
)
from export.tokenizer import Tokenizer
from export.verify_pair import verify_pair

Tokens = NDArray[Any]
REFERENCE = "torchvision and the network before any rewriting, nearest codes in float64"
_ONE_LEVEL = 1.0


def verify_tokenizer(build: Sequence[Staged], network: Tokenizer) -> tuple[Staged, ...]:
    """Hold the engines `tokenize` and `detokenize` of one build against `network` on the golden images, at batch 1, 3 and 8.

    The served side is the gateway's own code, the reference's side Pillow, torchvision and the network, whose nearest code is that
    of the smallest distance in float64. On success the golden outputs and the finished manifests are written.

    Raises:
        VerificationError: with the checks of both engines that failed.
        ExportError: an engine does not run here; disk full.
    """
    entries = [staged_entry(staged) for staged in build]
    verifier = _Verifier(entries[0].manifest, network, golden_images())
    return verify_pair(build, entries, verifier, (verifier.check_tokens, verifier.check_images), REFERENCE)


class _Verifier:
    """The golden images on both sides, and the comparisons between them."""

    def __init__(self, manifest: Manifest, network: Tokenizer, images: Sequence[GoldenImage]) -> None:
        self.preprocessing = manifest.preprocessing
        self.shape = manifest.outputs[0].shape[1:]
        self.tolerance = TOLERANCES[manifest.precision]
        self.batches = batches_for(manifest)
        self.images = images
        self.frames = np.stack([served_pixels(image.data, self.preprocessing)[0] for image in images])
        self.expected = np.stack([reference_pixels(image.data, self.preprocessing) for image in images])
        with torch.inference_mode():
            self.on_frames = ReferenceTokens.of(network, image_tensor(torch.from_numpy(self.frames), self.preprocessing))
            on_expected = ReferenceTokens.of(network, image_tensor(torch.from_numpy(self.expected), self.preprocessing))
            given = torch.from_numpy(self.on_frames.tokens)
            restored = torch.cat([network.detokenize(tokens[None]) for tokens in given])
        self.tokens_on_expected = on_expected.tokens
        self.restored = _levels(restored, self.preprocessing)

    def check_tokens(self, infer: Infer) -> Iterator[Check]:
        """Every check of the engine `tokenize`, in the order of the path."""
        yield from compare_pixels(self.frames, self.expected)
        by_batch = {batch: self._with_codebooks(ask(infer, self.frames, batch)) for batch in self.batches}
        for batch, served in by_batch.items():
            yield from compare_tokens(f"engine, batch {batch}", served, self.on_frames, self.tolerance)
        alone = by_batch[1]
        for batch in self.batches[1:]:
            same = np.mean(by_batch[batch] == alone)
            yield at_least(f"alone and in a batch of {batch}: token agreement", same, self.tolerance.agreement, "of tokens")
        same = np.mean(alone == self.tokens_on_expected)
        yield at_least("served path: token agreement", same, self.tolerance.path, "of tokens")
        yield count_distinct("engine", alone, self.on_frames.codes.shape[1])
        black = self._with_codebooks(infer(np.zeros_like(self.frames[:1])))
        swapped = self._with_codebooks(ask(infer, np.ascontiguousarray(self.frames[..., ::-1])))
        for what, tokens in (("a black image", black), ("swapped channels", swapped), ("another image", np.roll(alone, 1, axis=0))):
            moved = np.median(np.mean(alone != tokens, axis=(1, 2, 3)))
            yield at_least(f"sees {what}: tokens", moved, MOVED, "of tokens")

    def check_images(self, infer: Infer) -> Iterator[Check]:
        """Every check of the engine `detokenize`, on the reference's own tokens."""
        tokens = self._given()
        by_batch = {batch: ask(infer, tokens, batch) for batch in self.batches}
        for batch, images in by_batch.items():
            yield compare_restored(f"engine, batch {batch}", images, self.restored, self.tolerance)
        alone = by_batch[1]
        for batch in self.batches[1:]:
            yield compare_restored(f"alone and in a batch of {batch}", by_batch[batch], alone, self.tolerance)
        next_codes = ask(infer, (tokens + 1) % self.on_frames.codes.shape[1])
        for what, images in (("other codes", next_codes), ("another image", np.roll(alone, 1, axis=0))):
            moved = np.median([moved_pixels(one, other) for one, other in zip(alone, images, strict=True)])
            yield at_least(f"sees {what}: pixels", moved, MOVED, "of pixels")

    def write_golden(self, entry: Entry, infer: Infer) -> Iterator[GoldenExample]:
        """The raw outputs of the images that travel; `app/golden.py` asks for them again wherever the engine is served."""
        manifest, outliers = entry.manifest, self.tolerance.golden
        for image, frame, tokens in zip(self.images, self.frames, self._given(), strict=True):
            if not image.travels:
                continue
            stem = f"golden/{image.name.partition('.')[0]}"
            outputs = f"{stem}.npz"
            if manifest.role == "tokenize":
                np.savez(entry.path / outputs, tokens=infer(frame[None]))
                yield GoldenExample(image=f"golden/{image.name}", outputs=outputs, tolerance=0.5, outliers=outliers)
            else:
                inputs = f"{stem}.tokens.npz"
                np.savez(entry.path / inputs, tokens=tokens[None])
                np.savez_compressed(entry.path / outputs, image=infer(tokens[None]))
                yield GoldenExample(inputs=inputs, outputs=outputs, tolerance=_ONE_LEVEL, outliers=outliers)

    def _given(self) -> Tokens:
        """The reference's tokens as the engine takes them, int32 [B,h,w] or [B,K,h,w]."""
        return self.on_frames.tokens.reshape(-1, *self.shape).astype(np.int32)

    def _with_codebooks(self, tokens: Tokens) -> Tokens:
        """[B,h,w] as [B,1,h,w]; [B,K,h,w] as it is."""
        return tokens.reshape(len(tokens), *self.on_frames.tokens.shape[1:])


def _levels(images: Tensor, preprocessing: Preprocessing) -> Frames:
    """Normalised images float32 [B,3,H,W] as pixels uint8 [B,H,W,3]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    levels = ((images * std + mean) / preprocessing.scale).round().clamp(0, 255)
    frames: Frames = levels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return frames
