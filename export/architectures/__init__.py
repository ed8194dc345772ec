"""Architectures that no maintained library has, one file each, found by name: `python -m export NAME`.

A file `export/architectures/NAME.py` (a Python identifier, not starting with `_`) offers:

- `def make(num_classes: int, **arguments) -> nn.Module`: the network from normalised float32 [B,3,H,W] to logits [B,C], with
  random weights. Every `--model-arg k=v` is one of `arguments`; each needs a default. The module's docstring gives the paper's
  title and the published parameters and MACs.
- `PREPROCESSING`: a dictionary as timm's `pretrained_cfg` has it: `input_size` (3, H, W), `mean`, `std`, and `crop_pct`,
  `crop_mode`, `interpolation` where they differ from timm's defaults (0.875, center, bicubic).
- `PAPER`: for example `"arXiv:2201.03545"`.
- optionally `LICENCE`, an SPDX identifier of the published weights, and
  `def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]`, which renames the keys of the authors' checkpoints.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from export.spec import ExportError

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


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
