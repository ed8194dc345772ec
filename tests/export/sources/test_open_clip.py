"""What open_clip's networks are made of: names, tags, preprocessing, tokenizers and checkpoints, up to the door of its hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file

from export.load import load
from export.phrases import grounding_phrases
from export.spec import ExportError, ExportRequest, LoadedDualEncoder
from tests.export.dual_encoders import DUAL_ENCODERS, TEXT


def request_for(directory: Path, name: str = "vit-clip", **fields: Any) -> ExportRequest:
    return replace(DUAL_ENCODERS[name].request(directory), **fields)


def loaded(request: ExportRequest) -> LoadedDualEncoder:
    found = load(request)
    assert isinstance(found, LoadedDualEncoder)
    return found


def test_the_nearest_names_are_offered(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no model 'ViTamin-s'; near: .*ViTamin-S"):
        load(request_for(tmp_path, source="open_clip/ViTamin-s"))


def test_the_tags_that_there_are_are_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no weights 'best' of ViT-B-32; there are: openai, "):
        load(request_for(tmp_path, source="open_clip/ViT-B-32:best"))
    with pytest.raises(ExportError, match="Say which weights of ViT-B-32: open_clip/ViT-B-32:TAG"):
        load(request_for(tmp_path, source="open_clip/ViT-B-32", weights="pretrained"))


def test_without_a_network_fetching_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ExportError, match="could not fetch the weights laion2b_s34b_b79k of ViT-B-32"):
        load(request_for(tmp_path, source="open_clip/ViT-B-32:laion2b_s34b_b79k", weights="pretrained"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_classes": 3}, "no classes, a request names them; leave --num-classes out"),
        ({"activation": "sigmoid"}, "leave --activation out"),
        ({"tokenizer": Path("tokenizer.json")}, "CLIP's own byte pairs"),
        ({"model_args": {"trunk": {"widths": (8, 8), "depths": (1, 1, 1), "heads": 1}}}, "takes three widths"),
        ({"long_phrases": "truncate"}, "leave --tokenizer and --long-phrases out"),
        ({"model_args": {"text_cfg": {"layers": "two"}}}, "cannot be built"),
        ({"model_args": {"text_cfg": {"tokenizer_kwargs": {"reduction_mask": "random"}}}}, "only `clean` is known"),
        ({"model_args": {"text_cfg": {**TEXT, "vocab_size": 20}}}, "has 49408 tokens, the network knows 20"),
    ],
)
def test_what_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        load(request_for(tmp_path, **fields))


def test_a_tag_says_how_its_weights_see_images_also_from_a_file(tmp_path: Path) -> None:
    """SigLIP's are squeezed to a square, with a mean and deviation of its own; its tokenizer lies beside the checkpoint."""
    trained = loaded(request_for(tmp_path, "siglip"))
    save_file(trained.network.network.state_dict(), tmp_path / "siglip.safetensors")
    save_tokenizer(trained, tmp_path)
    request = request_for(tmp_path, "siglip", weights="checkpoint", checkpoint=tmp_path / "siglip.safetensors")
    found = loaded(request)
    assert (found.preprocessing.policy, found.preprocessing.mean, found.preprocessing.std) == ("stretch", (0.5,) * 3, (0.5,) * 3)
    assert found.embedding == trained.embedding
    assert (found.embedding.activation, found.embedding.bias) == ("sigmoid", -10.0)
    assert found.source.weights == "checkpoint"
    texts = ["The Red-circle, left!", *grounding_phrases()[:20]]
    assert (found.vocabulary.rows(texts) == trained.vocabulary.rows(texts)).all()
    ids = torch.from_numpy(found.vocabulary.rows(texts))
    with torch.inference_mode():
        torch.testing.assert_close(found.network.encode_texts(ids), trained.network.encode_texts(ids))


def save_tokenizer(trained: LoadedDualEncoder, directory: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(trained.vocabulary.file.decode())
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>").save_pretrained(
        directory
    )
    assert HFTokenizer(str(directory), clean="canonicalize")(["red"]).shape == (1, 77)


def test_without_a_tag_images_are_cut_as_clip_cuts_them(tmp_path: Path) -> None:
    found = loaded(request_for(tmp_path))
    assert (found.preprocessing.policy, found.preprocessing.interpolation) == ("shortest_edge", "bicubic")
    assert found.preprocessing.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert found.embedding.scale == pytest.approx(1 / 0.07)


def test_older_files_of_open_clip_are_converted(tmp_path: Path) -> None:
    """ViTamin keeps its text tower apart; files of before that have its keys at the top."""
    trained = loaded(request_for(tmp_path, "vitamin"))
    tensors = {key.removeprefix("text."): value for key, value in trained.network.network.state_dict().items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    save_file(tensors, tmp_path / "old.safetensors")
    found = loaded(request_for(tmp_path, "vitamin", weights="checkpoint", checkpoint=tmp_path / "old.safetensors"))
    ids = torch.from_numpy(found.vocabulary.rows(["a red circle"]))
    with torch.inference_mode():
        torch.testing.assert_close(found.network.encode_texts(ids), trained.network.encode_texts(ids))


def test_keys_that_are_missing_are_listed(tmp_path: Path) -> None:
    tensors = loaded(request_for(tmp_path)).network.network.state_dict()
    tensors.pop("ln_final.weight")
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ExportError, match=r"ln_final\.weight"):
        load(request_for(tmp_path, weights="checkpoint", checkpoint=tmp_path / "part.safetensors"))
