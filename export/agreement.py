"""How verification compares, and the tolerances of each precision."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.manifest import Check
from export.spec import Activation

Array = NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """The largest differences that pass.

    `logits`: share of the standard deviation of the reference's logits. `probabilities`: absolute. `ties`: how far below the
    reference's k-th best a class may lie and still stand among the served top k, as `logits`.
    """

    logits: float
    probabilities: float
    ties: float


@dataclass(frozen=True)
class Tolerance:
    """`engine`: against the reference on the same pixels. `path`: the whole served path against the whole torchvision path, whose
    pixels differ by a level here and there. `golden`: absolute, of the smoke test wherever the engine is served."""

    engine: Limits
    path: Limits
    golden: float


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(Limits(1e-3, 1e-4, 2e-3), Limits(0.3, 0.1, 0.2), golden=0.01),
    "fp16": Tolerance(Limits(0.05, 0.02, 0.1), Limits(0.33, 0.11, 0.25), golden=0.03),
    "bf16": Tolerance(Limits(0.2, 0.05, 0.4), Limits(0.5, 0.15, 0.5), golden=0.1),
}
# With JPEGs decoded at a fraction of their size; decides whether that is allowed.
SCALED = Limits(0.5, 0.2, 0.2)

PIXEL_SHARE = 0.002  # of the values may be off by more than one level
PIXEL_LEVELS = 16  # and none by more than this
SENSITIVITY = 3  # what must be seen moves the logits of the median image by this many times the tolerance
_NEAR_ONE = 1e-4  # distances from 1 below it are too coarse in float32
_FAINT = -80.0  # log-probabilities below it are lost in float32
_LEAST = np.finfo(np.float32).smallest_subnormal  # stands for a zero, whose logarithm JSON cannot hold


@dataclass(frozen=True)
class Scores:
    """What one side says of the images: log-probabilities [B,C], each with the same meaning on both sides."""

    log: Array
    activation: Activation
    scale: float = 1.0  # standard deviation of the logits

    @classmethod
    def of_logits(cls, logits: Array, activation: Activation) -> "Scores":
        """The reference. Softmax knows logits up to a constant per image, so that is taken off before their spread."""
        logits = logits.astype(np.float64)
        centred = logits - logits.mean(axis=1, keepdims=True) if activation == "softmax" else logits
        normaliser = np.logaddexp.reduce(logits, axis=1, keepdims=True) if activation == "softmax" else np.logaddexp(0, logits)
        log = logits - normaliser
        return cls(log, activation, scale=max(float(centred.std()), 1e-12))

    @classmethod
    def of_probabilities(cls, probabilities: Array, activation: Activation) -> "Scores":
        """The engine."""
        return cls(np.log(np.maximum(probabilities, _LEAST).astype(np.float64)), activation)

    @property
    def probabilities(self) -> Array:
        return np.exp(self.log)

    @property
    def log_complement(self) -> Array:
        """log(1 - p). Below 1 float32 has steps of 6e-8, so that what lies within a thousand of them counts as equal."""
        return np.log(np.maximum(-np.expm1(self.log), _NEAR_ONE))

    def rows(self, rows: Array) -> "Scores":
        return Scores(self.log[rows], self.activation, self.scale)


def compare(what: str, served: Scores, reference: Scores, limits: Limits) -> Iterator[Check]:
    """Log-probabilities, probabilities, and the order of the best classes."""
    yield at_most(f"{what}: logits", distance(served, reference, reference.scale).max(), limits.logits, "of their deviation")
    yield at_most(f"{what}: probabilities", np.abs(served.probabilities - reference.probabilities).max(), limits.probabilities)
    for k in (1, 5):
        if k < reference.log.shape[1]:
            yield from _order(f"{what}: top-{k}", served, reference, k, limits.ties * reference.scale)


def distance(one: Scores, other: Scores, scale: float) -> Array:
    """[B]: the largest difference of log-probability per image, over classes that float32 can still tell from zero."""
    visible = ~(np.maximum(one.log, other.log) <= _FAINT)  # not a number is visible
    difference = np.abs(one.log - other.log)
    if one.activation == "sigmoid":  # a confident yes shows in its distance from 1, as far as float32 tells it
        difference = np.maximum(difference, np.abs(one.log_complement - other.log_complement))
    largest: Array = np.where(visible, difference, 0).max(axis=1) / scale
    return largest


def _order(what: str, served: Scores, reference: Scores, k: int, slack: float) -> Iterator[Check]:
    """The served top k must be the reference's.

    A class whose reference log-probability is within `slack` of the k-th best is a near-tie: rounding may order it either way. It
    passes, but it is counted, and more than half of the images may not need it.
    """
    best = np.argsort(-served.log, axis=1, kind="stable")[:, :k]
    threshold = np.sort(reference.log, axis=1)[:, -k]
    shortfall = threshold - np.take_along_axis(reference.log, best, axis=1).min(axis=1)
    yield at_least(f"{what} agreement", np.mean(shortfall <= slack), 1.0, "of images")
    yield at_most(f"{what} near-ties", np.mean((shortfall > 0) & (shortfall <= slack)), 0.5, "of images")


def compare_pixels(served: Array, reference: Array) -> Iterator[Check]:
    """Frames uint8 [B,H,W,3] of the served path against torchvision's."""
    difference = np.abs(served.astype(np.int16) - reference)
    yield at_most("pixels: off by more than one level", np.mean(difference > 1), PIXEL_SHARE, "of values")
    yield at_most("pixels: largest difference", difference.max(), PIXEL_LEVELS, "levels")


def at_most(name: str, value: Any, limit: float, unit: str = "") -> Check:
    """NaN never passes."""
    return Check(name=name, value=float(value), limit=limit, passed=bool(value <= limit), unit=unit, required=True)


def at_least(name: str, value: Any, limit: float, unit: str = "") -> Check:
    return Check(name=name, value=float(value), limit=limit, passed=bool(value >= limit), unit=unit, required=True)
