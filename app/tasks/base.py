"""The protocol of a task: what an engine's outputs mean for one image."""

from typing import Any, Protocol, TypeVar

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.manifest import Entry

Options_contra = TypeVar("Options_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Task(Protocol[Options_contra, Result_co]):
    """One kind of question about an image; `name` is its route (`/v1/NAME`), `role` the engine that answers it."""

    name: str
    role: str

    def finish(self, outputs: Tensors, entry: Entry, image: ImageInfo, options: Options_contra) -> Result_co:
        """Turn one row of the engine's outputs (the batch axis already taken off) into the answer for `image`."""


AnyTask = Task[Any, Any]
