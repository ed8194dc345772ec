"""Muon (Jordan et al., 2024) in float32, with AdamW for what is no matrix: what the recipes for small models train with.

torch's and timm's Muon orthogonalise in bfloat16, which processors without that type emulate slowly.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Five steps of a quintic iteration, each with its own coefficients (Jiacheng You, 2024).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to [M,N], roughly: all singular values come near 1."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(Optimizer):
    """Steps along orthogonalised momentum; a convolution counts as a matrix [out, in * height * width].

    Steps are scaled to the size of those of AdamW (Moonshot AI, arXiv 2502.16982), so that one learning rate suits both.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        matrix = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, *, lr: float, weight_decay: float, plain: tuple[str, ...] = ()) -> list[Optimizer]:
    """Muon for the matrices of a model; AdamW for vectors, embeddings and parameters whose name contains a word of `plain`."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        small = parameter.ndim < 2 or min(parameter.flatten(1).shape) < 8
        if parameter.ndim < 2:
            rest.append(parameter)
        elif small or id(parameter) in embeddings or any(word in name for word in plain):
            decayed.append(parameter)
        else:
            matrices.append(parameter)
    adamw = AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    return [Muon(matrices, lr=lr, weight_decay=weight_decay), adamw]
