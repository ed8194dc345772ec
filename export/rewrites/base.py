"""What a rewrite is: a module that exports badly, and an exact equivalent that exports well."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Rewrite:
    """`replace` gives the equivalent of a module that `matches`; it never changes a parameter. `name` goes into the summary.

    Modules come as `Any`, because the attributes that a rewrite reads are those of a library without types.
    """

    name: str
    matches: Callable[[Any], bool]
    replace: Callable[[Any], nn.Module]


def is_a(module: nn.Module, qualified_name: str) -> bool:
    """Whether `module` is of this class, without importing the library it comes from."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == qualified_name for kind in type(module).__mro__)
