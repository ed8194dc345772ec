"""Muon makes steps whose directions count alike, and leaves to AdamW what is no matrix."""

import pytest
import torch
from muon import Muon, optimizers, orthogonalised
from torch import nn


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_the_singular_values_of_a_step_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.shape == (min(shape),)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_every_parameter_has_one_optimiser() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(20, 16), "conv": nn.Conv2d(8, 16, 3), "norm": nn.LayerNorm(16), "score": nn.Linear(16, 8)}
    )
    muon, adamw = optimizers(model, lr=1e-3, weight_decay=0.1, plain=("score",))
    by_muon, by_adamw = ([p for group in o.param_groups for p in group["params"]] for o in (muon, adamw))
    assert [parameter.shape for parameter in by_muon] == [model["conv"].weight.shape]
    assert {id(p) for p in (*by_muon, *by_adamw)} == {id(p) for p in model.parameters()}
    assert len(by_muon) + len(by_adamw) == len(list(model.parameters()))


def test_it_descends() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, weight = torch.randn(8, 24, generator=generator), nn.Parameter(torch.zeros(8, 24))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (weight - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
