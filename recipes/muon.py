"""Muon (Jordan et al., 2024) in float32: the optimiser of timm orthogonalises in bfloat16, which a CPU without that type emulates,
twenty times slower."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn

COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Each matrix moves by its momentum made orthogonal, as long as a step of AdamW would be (Liu et al., 2025, arXiv 2502.16982).

    Convolutions count as matrices [out, in * height * width].
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                matrix = momentum.flatten(1)
                update = zeropower_via_newtonschulz(matrix, STEPS, COEFFICIENTS, dtype=torch.float32).view_as(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


class MuonWithAdam:
    """Muon for the matrices of a network, AdamW for everything else."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            Muon([parameter for parameter in parameters if parameter.ndim > 1], lr),
            torch.optim.AdamW(
                [parameter for parameter in parameters if parameter.ndim < 2], lr, betas=(0.9, 0.95), weight_decay=0.0
            ),
        )

    def step(self, loss: Tensor, lr: float) -> None:
        """Differentiate `loss` and move by it."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
            for group in part.param_groups:
                group["lr"] = lr
        loss.backward()  # type: ignore[no-untyped-call]
        for part in self.parts:
            nn.utils.clip_grad_norm_([parameter for group in part.param_groups for parameter in group["params"]], 1.0)
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])
