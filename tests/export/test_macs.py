"""Multiply-adds over the graph are those that torch counts."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.fuse import fuse_classifier
from export.macs import count_macs
from export.to_onnx import to_onnx
from tests.export.small import PREPROCESSING, make_loaded


def torch_macs(network: nn.Module) -> int:
    """Attention as the matrix products that it is: of torch's fused kernels, which depend on the processor, not all are counted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 3, PREPROCESSING.height, PREPROCESSING.width))
    total: int = counter.get_total_flops()
    return total // 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("pvt_v2_b0", {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}),
    ],
)
def test_count_agrees_with_torch(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    loaded = make_loaded(timm.create_model(name, num_classes=7, **arguments).eval())
    assert isinstance(loaded.network, nn.Module)

    engine = to_onnx(fuse_classifier(loaded), tmp_path / "model.onnx", "fp32")

    assert engine.macs == pytest.approx(torch_macs(loaded.network), rel=0.01)


def graph(node: onnx.NodeProto, inputs: dict[str, list[int]], output: list[Any]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    return helper.make_model(helper.make_graph([node], "g", values, [result]), opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("node", "inputs", "macs"),
    [
        (helper.make_node("MatMul", ["a", "b"], ["y"]), {"a": [4, 5, 6], "b": [4, 6, 7]}, 4 * 5 * 6 * 7),
        (
            helper.make_node("Einsum", ["a", "b"], ["y"], equation="bhlk, bhtk -> bhlt"),
            {"a": [4, 5, 6], "b": [4, 7, 6]},
            4 * 5 * 6 * 7,
        ),
        (helper.make_node("Gemm", ["a", "b"], ["y"], transA=1), {"a": [6], "b": [7]}, 6 * 7),
        (helper.make_node("Gemm", ["a", "b"], ["y"], transB=1), {"a": [6], "b": [6]}, 6),
        (helper.make_node("Relu", ["a"], ["y"]), {"a": [6]}, 0),
    ],
)
def test_products(node: onnx.NodeProto, inputs: dict[str, list[int]], macs: int) -> None:
    assert count_macs(graph(node, inputs, [])) == macs


def test_transposed_convolution() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 3, 3, 3], [0.0] * 8 * 27)
    model = graph(helper.make_node("ConvTranspose", ["a", "w"], ["y"], strides=[2, 2]), {"a": [8, 5, 5]}, [])
    model.graph.initializer.append(weight)

    assert count_macs(model) == 8 * 25 * 27


def test_an_unknown_shape_gives_no_count() -> None:
    model = graph(helper.make_node("MatMul", ["a", "b"], ["y"]), {"a": [4, 6], "b": [6, 7]}, [])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "rows"

    assert count_macs(model) is None
