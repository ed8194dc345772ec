"""The smoke test of a loaded engine: images or tensors in, and how much of the answer may be off."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from app.admission import Ticket
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.golden import check_golden
from app.manifest import Entry, GoldenExample, ManifestError
from tests.tokenizer_repository import add_tokenizer, image_of

pytestmark = pytest.mark.anyio


async def smoke(entry: Entry) -> None:
    backend = OnnxRuntimeBackend()
    await backend.load(entry)
    try:
        await check_golden(backend, entry)
    finally:
        await backend.close()


@pytest.mark.parametrize("role", ["tokenize", "detokenize"])
async def test_an_engine_may_take_tensors_instead_of_an_image(role: str, tmp_path: Path) -> None:
    await smoke(add_tokenizer(tmp_path)[role])


@pytest.mark.parametrize(("outliers", "passes"), [(0.0, False), (0.05, False), (0.0625, True)])
async def test_no_more_values_than_allowed_may_be_off(tmp_path: Path, outliers: float, passes: bool) -> None:
    """One token of sixteen is another one."""
    example = GoldenExample(inputs="golden/inputs.npz", outputs="golden/outputs.npz", tolerance=0.5, outliers=outliers)
    entry = add_tokenizer(tmp_path, golden=(example,))["tokenize"]
    outputs = entry.path / example.outputs
    tokens = np.load(outputs)["tokens"]
    tokens[0, 1, 2] += 9
    np.savez(outputs, tokens=tokens)
    if passes:
        await smoke(entry)
    else:
        with pytest.raises(ManifestError, match=r"does not reproduce golden/inputs.npz: tokens is off by 9"):
            await smoke(entry)


async def test_unreadable_inputs_are_named(tmp_path: Path) -> None:
    entry = add_tokenizer(tmp_path)["detokenize"]
    (entry.path / "golden/inputs.npz").write_bytes(b"PK")
    with pytest.raises(ManifestError, match=r"golden example golden/inputs.npz of greys.detokenize@1 cannot be read"):
        await smoke(entry)


@pytest.mark.parametrize("given", [{}, {"image": "a.png", "inputs": "a.npz"}, {"phrase": "red", "inputs": "a.npz"}])
def test_an_example_has_one_input(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either an image or a phrase, or inputs"):
        GoldenExample(outputs="b.npz", tolerance=1, **given)


async def test_the_engines_do_what_the_tests_say(tmp_path: Path) -> None:
    entry = add_tokenizer(tmp_path)["detokenize"]
    backend = OnnxRuntimeBackend()
    await backend.load(entry)
    tokens = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    answer = await backend.infer(entry, {"tokens": tokens}, Ticket())
    await backend.close()
    np.testing.assert_array_equal(answer["image"], image_of(tokens))
