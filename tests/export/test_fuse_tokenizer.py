"""The search for the nearest code: exact, in pieces, within a bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import export.fuse_tokenizer
from app.manifest import TensorSpec
from export.fuse_tokenizer import Search
from export.spec import Fused, Interface
from export.to_onnx import to_onnx
from export.tokenizer import distances

PEAK = r"""
import re, sys
from pathlib import Path
import numpy as np, onnxruntime

def kilobytes(key):
    return int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
latents = np.random.default_rng(0).standard_normal((8, int(sys.argv[2]), 8), dtype=np.float32)
before = kilobytes("VmRSS")
session.run(None, {"image": latents})
print(kilobytes("VmHWM") - before)
"""


def expected(latents: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    points = nn.functional.normalize(latents, dim=-1) if cosine else latents
    return torch.stack([distances(image.double(), codes.double()).argmin(-1) for image in points])


def write(search: Search, positions: int, path: Path) -> Path:
    spec = TensorSpec(name="image", dtype="float32", shape=(-1, positions, 8))
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(-1, positions))
    fused = Fused(search, Interface("tokenize", (spec,), (tokens,)), lambda image: image, parameters=0)
    return to_onnx(fused, path, "fp32").path


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "euclid"])
@pytest.mark.parametrize("pieces", [1, 7])
def test_the_nearest_code_is_found(cosine: bool, pieces: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole numbers are compared without rounding, so that ties stay ties: of equals the first is found."""
    if cosine:
        codes, latents = nn.functional.normalize(torch.randn(500, 8), dim=-1), torch.randn(2, 30, 8)
    else:
        codes, latents = torch.randint(-3, 4, (500, 8)).float(), torch.randint(-3, 4, (2, 30, 8)).float()
        codes[400:] = codes[:100]
    monkeypatch.setattr(export.fuse_tokenizer, "_SCORES", 4 * 8 * 30 * (500 if pieces == 1 else 72))
    search = Search(codes, cosine, positions=30)
    assert len(search.starts) == pieces
    assert torch.equal(search(latents), expected(latents, codes, cosine))
    session = onnxruntime.InferenceSession(str(write(search, 30, tmp_path / "search.onnx")), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": latents.numpy()})[0]
    np.testing.assert_array_equal(found, expected(latents, codes, cosine))


def test_the_bias_is_needed() -> None:
    """The control of the test above: codes of different lengths that were searched by angle give other tokens."""
    codes, latents = torch.randn(500, 8), torch.randn(2, 30, 8)
    assert not torch.equal(Search(codes, True, positions=30)(latents), expected(latents, codes, False))


@pytest.mark.parametrize("positions", [256, 1024], ids=["f16", "f8"])
def test_the_search_of_a_hundred_thousand_codes_stays_below_200_mb(positions: int, tmp_path: Path) -> None:
    """At batch 8 all scores together would be 0.8 GB (f16) and 3.3 GB (f8)."""
    path = write(Search(torch.randn(100_000, 8), False, positions), positions, tmp_path / "search.onnx")
    command = [sys.executable, "-c", PEAK, str(path), str(positions)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 20_000 < grown < 200_000
    products = [node for node in onnx.load(path).graph.node if node.op_type == "MatMul"]
    assert len(products) == {256: 13, 1024: 49}[positions]
