"""Architectures that no maintained library has, one file each, found by name: `python -m export NAME`.

A file `export/architectures/NAME.py` (a Python identifier, not starting with `_`) offers:

- optionally `TASK`, what its networks do: `"classify"`, which it is when left out, `"tokenize"`, `"detect"` or `"ground"`.
- `make`, which builds the network with random weights. Every `--model-arg k=v` is an argument of it; each has a default. The
  module's docstring gives the paper's title and the published parameters and MACs.
    - to classify: `def make(num_classes: int, **arguments) -> nn.Module`, from normalised float32 [B,3,H,W] to logits [B,C];
    - to tokenize: `def make(**arguments) -> Tokenizer`, see `export/tokenizer.py`;
    - to detect: `def make(**arguments) -> Detector`, see `export/detector.py`; `classes` is one of the arguments;
    - to ground: `def make(**arguments) -> Grounder`, see `export/grounder.py`.
- `PREPROCESSING`: a dictionary as timm's `pretrained_cfg` has it: `input_size` (3, H, W), `mean`, `std`, and `crop_pct`,
  `crop_mode`, `interpolation` where they differ from timm's defaults (0.875, center, bicubic). `crop_mode` may be `letterbox`
  too, with an `anchor` of `app.manifest.Preprocessing`.
- `PAPER`: for example `"arXiv:2201.03545"`.
- optionally `VARIANTS`, the published sizes by name; `make(variant=NAME)` builds one.
- optionally `LICENCE`, an SPDX identifier of the published weights; `TRAINING_ONLY`, patterns (`loss.*`) of the keys of the
  authors' checkpoints that only training needs, which are left out; and
  `def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]`, which renames the others.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

from export.spec import ExportError

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Task = Literal["classify", "tokenize", "detect", "ground"]


def names() -> tuple[str, ...]:
    """Every architecture there is, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def find(name: str) -> ModuleType:
    """The file of one architecture.

    Raises:
        ExportError: there is none of this name; lists those there are.
    """
    if name not in names():
        known = f"there are: {', '.join(names())}" if names() else "there are none yet"
        raise ExportError(f"No architecture {name!r} in export/architectures ({known}).")
    return importlib.import_module(f"{__name__}.{name}")


def task_of(module: ModuleType) -> Task:
    """What the networks of one file do.

    Raises:
        ExportError: something that no export knows.
    """
    task: Task = getattr(module, "TASK", "classify")
    if task not in get_args(Task):
        raise ExportError(f"{module.__name__} is for the task {task!r}; there are: {', '.join(get_args(Task))}.")
    return task
