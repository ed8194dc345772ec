"""The protocol of a task: what its engines are given for one item of a request, and what their outputs mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.manifest import Entry

Options_contra = TypeVar("Options_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Plan:
    """`roles`: the engines that answer, each given what the one before it gave. `heavy`: `finish` computes for milliseconds."""

    roles: tuple[str, ...]
    heavy: bool = False


class Task(Protocol[Options_contra, Result_co]):
    """One kind of question; `name` is its route (`/v1/NAME`), `role` the engine by which a model is known to answer it.

    An item is an image (the pipeline decodes and resizes it) or a value that came as it is, such as a grid of tokens.
    """

    name: str
    role: str

    def plan(self, options: Options_contra) -> Plan:
        """What it takes to answer with `options`."""

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: Options_contra) -> Tensors:
        """The inputs of the plan's first engine for one item: tensors [n,...], n rows of them all, mostly one.

        `value` is the frame uint8 [H,W,3] of an image, which `image` tells of, or the value that came.

        Raises:
            InvalidValueError: an option has a value that this model cannot use; concerns the whole request.
        """

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: Options_contra) -> Result_co:
        """Turn what became of one item into its answer: `flow` is what `prepare` gave, then what each engine of the plan gave.

        Raises:
            InferenceError: an engine gave something that cannot be; concerns this item.
            InvalidValueError: an option has a value that this model cannot use; concerns the whole request.
        """


AnyTask = Task[Any, Any]
