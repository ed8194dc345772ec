"""Checkpoints as they are published: every key for inference must match, and what only training needs is left out by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import architectures
from export.load import load
from export.spec import ExportError, LoadedTokenizer
from tests.export.tokenizers import TOKENIZERS

# Names that the published files have, one for each kind of layer.
PUBLISHED = {
    "vit_vqgan": """
        encoder.to_patch_embedding.0.weight encoder.to_patch_embedding.0.bias encoder.en_pos_embedding
        encoder.transformer.layers.0.0.norm.weight encoder.transformer.layers.0.0.fn.to_qkv.weight
        encoder.transformer.layers.0.0.fn.to_out.bias encoder.transformer.layers.1.1.norm.bias
        encoder.transformer.layers.1.1.fn.net.0.weight encoder.transformer.layers.1.1.fn.net.2.bias encoder.transformer.norm.weight
        decoder.de_pos_embedding decoder.transformer.layers.0.0.fn.to_qkv.weight decoder.transformer.norm.bias
        decoder.to_pixel.1.weight decoder.to_pixel.1.bias pre_quant.weight post_quant.bias quantizer.embedding.weight
    """,
    "vqgan_lc": """
        encoder.conv_in.weight encoder.down.0.block.0.norm1.weight encoder.down.0.block.0.conv2.bias
        encoder.down.2.block.0.nin_shortcut.weight encoder.down.0.downsample.conv.weight encoder.down.3.attn.0.proj_out.weight
        encoder.mid.block_1.conv1.weight encoder.mid.attn_1.q.weight encoder.mid.block_2.norm2.bias encoder.norm_out.weight
        encoder.conv_out.bias decoder.conv_in.weight decoder.mid.attn_1.norm.weight decoder.up.3.attn.1.k.bias
        decoder.up.0.block.1.conv1.weight decoder.up.3.upsample.conv.bias decoder.norm_out.bias decoder.conv_out.weight
        tok_embeddings.weight codebook_projection.weight codebook_projection.bias quant_conv.weight post_quant_conv.bias
    """,
    "fqgan": """
        encoder.conv_in.weight encoder.conv_blocks.0.res.0.norm1.weight encoder.conv_blocks.3.res.0.nin_shortcut.weight
        encoder.conv_blocks.3.attn.0.v.weight encoder.conv_blocks.0.downsample.conv.bias encoder.mid.0.conv1.weight
        encoder.mid.1.proj_out.bias encoder.visual_head.0.positional_embedding encoder.semantic_head_mid.0.ln_pre.weight
        encoder.semantic_head_high.0.transformer.0.attn.in_proj_weight encoder.visual_head.0.transformer.0.attn.out_proj.bias
        encoder.visual_head.0.transformer.0.mlp.c_fc.weight encoder.visual_head.0.transformer.0.ln_2.bias
        encoder.visual_head.0.ln_post.weight encoder.norm_out_sem_mid.weight encoder.conv_out_vis.bias quant_conv_sem_high.weight
        quantize_vis.embedding.weight post_quant_conv.weight decoder.conv_blocks.0.attn.1.q.weight
        decoder.conv_blocks.0.upsample.conv.weight decoder.conv_out.bias
    """,
}
TRAINING = {
    "vit_vqgan": ["loss.discriminator.blocks.0.weight", "loss.perceptual_loss.scaling_layer.shift"],
    "vqgan_lc": ["discriminator.main.0.weight", "perceptual_loss.net.slice1.0.weight"],
    "fqgan": ["mid_sem_feat_pred.upscale.0.weight", "high_sem_feat_pred.ln_post.bias", "quantize_vis.codebook_used"],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parameters_have_the_published_names(name: str) -> None:
    with torch.device("meta"):
        keys = architectures.find(name).make(**TOKENIZERS[name].narrow).state_dict().keys()
    assert set(PUBLISHED[name].split()) <= keys


def test_the_dual_variant_has_names_of_its_own() -> None:
    with torch.device("meta"):
        keys = architectures.find("fqgan").make("dual_ds16").state_dict().keys()
    heads = {"encoder.semantic_head.0.ln_post.weight", "encoder.conv_out_sem.weight", "quantize_sem.embedding.weight"}
    assert heads <= keys


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_published_checkpoint_loads_without_what_only_training_needs(name: str, tmp_path: Path) -> None:
    family = TOKENIZERS[name]
    torch.manual_seed(5)
    trained = architectures.find(name).make(**family.narrow)
    trained.set_codebooks(torch.randn(trained.codebooks().shape))
    extra = {key: torch.zeros(3) for key in TRAINING[name]}
    torch.save({"state_dict": trained.state_dict() | extra, "epoch": 3}, tmp_path / "published.ckpt")
    loaded = load(replace(family.request(tmp_path), weights="checkpoint", checkpoint=tmp_path / "published.ckpt"))
    assert isinstance(loaded, LoadedTokenizer)
    own, theirs = loaded.network.state_dict(), trained.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert loaded.weights is not None
    assert loaded.weights.unexpected
    assert not loaded.weights.missing
    assert all("*" in pattern for pattern in loaded.weights.unexpected)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_anything_else_must_match(name: str, tmp_path: Path) -> None:
    family = TOKENIZERS[name]
    weights = architectures.find(name).make(**family.narrow).state_dict()
    lost = next(key for key in weights if key.startswith("decoder"))
    del weights[lost]
    weights["decoder.extra"] = torch.zeros(1)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ExportError, match=rf"1 missing: {lost}; 1 unexpected: decoder.extra"):
        load(replace(family.request(tmp_path), weights="checkpoint", checkpoint=tmp_path / "other.pth"))
