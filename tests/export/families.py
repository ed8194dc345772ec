"""The architectures that must export, verify and serve: each once narrow (same code, seconds) and once as published.

Adding a family is one entry here; every suite over families finds it by discovery.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.models.mlp_mixer
import timm.models.volo
from torch import nn

from export.spec import ExportRequest, PreprocessingOverrides

CLASSES = 10


@dataclass(frozen=True)
class Variant:
    """One network of a family: a source, or a transformers configuration to be written down as one."""

    source: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    input_size: int | None = None
    num_classes: int | None = CLASSES
    config: dict[str, Any] | None = None  # transformers: what stands in config.json
    processor: dict[str, Any] | None = None  # transformers: what stands in preprocessor_config.json

    def request(self, directory: Path) -> ExportRequest:
        """The command line that exports it with random weights into a repository under `directory`."""
        source = self.source
        if self.config is not None:
            home = directory / "source"
            home.mkdir()
            (home / "config.json").write_text(json.dumps(self.config))
            (home / "preprocessor_config.json").write_text(json.dumps(self.processor))
            source = f"transformers/{home}"
        size = None if self.input_size is None else (self.input_size, self.input_size)
        return ExportRequest(
            source=source,
            repository=directory / "repository",
            name="conformance",
            weights="random",
            num_classes=self.num_classes,
            model_args=self.model_args,
            preprocessing=PreprocessingOverrides(input_size=size),
        )


@dataclass(frozen=True)
class Family:
    """`rewrites`: the exact equivalents that its export needs, by name. `millions`: published parameters and MACs, in millions."""

    name: str
    narrow: Variant
    published: Variant
    millions: tuple[float, float]
    rewrites: frozenset[str]


def _timm(name: str, published: str, millions: tuple[float, float], input_size: int, *rewrites: str, **model_args: Any) -> Family:
    """A family whose narrow variant timm's own factory of the published one makes."""
    narrow = Variant(f"timm/{published}", model_args, input_size)
    return Family(name, narrow, Variant(f"timm/{published}", num_classes=None), millions, frozenset(rewrites))


def _own(name: str, published: str, millions: tuple[float, float], factory: Callable[[], nn.Module], *rewrites: str) -> Family:
    """A family whose narrow variant is a factory of this file, because timm's does not let the width be chosen."""
    narrow = Variant(f"python/{__file__}:{factory.__name__}")
    return Family(name, narrow, Variant(f"timm/{published}", num_classes=None), millions, frozenset(rewrites))


def _transformers(
    name: str, millions: tuple[float, float], processor: dict[str, Any], size: dict[str, int], *rewrites: str, **narrow: Any
) -> Family:
    """A family whose published variant is what its configuration class defaults to."""
    published = Variant(config={"model_type": name}, processor=processor, num_classes=1000)
    small = Variant(config={"model_type": name} | narrow, processor=processor | {"size": size})
    return Family(name, small, published, millions, frozenset(rewrites))


_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}

pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9}


def narrow_volo() -> nn.Module:
    widths, heads = (24, 48, 48, 48), (2, 4, 4, 4)
    return timm.models.volo.VOLO((1, 1, 1, 1), 64, num_classes=CLASSES, stem_hidden_dim=16, embed_dims=widths, num_heads=heads)


def narrow_mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(CLASSES, 64, patch_size=8, num_blocks=2, embed_dim=48)


EXPLICIT, MEAN = "explicit-attention", "global-mean"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _timm("convnext", "convnext_atto", (3.70, 550), 64, MEAN, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
        _timm("convit", "convit_tiny", (5.71, 1260), 64, "convit-baked-positions", embed_dim=24, depth=3, local_up_to_layer=2),
        _timm(
            "crossvit",
            "crossvit_tiny_240",
            (7.01, 1600),
            120,
            EXPLICIT,
            "crossvit-matrix-resize",
            embed_dim=(24, 48),
            depth=((1, 1, 0),),
        ),
        _own("volo", "volo_d1_224", (26.63, 6940), narrow_volo, EXPLICIT, "volo-one-hot-fold"),
        _timm(
            "pvt_v2",
            "pvt_v2_b0",
            (3.67, 570),
            64,
            EXPLICIT,
            embed_dims=(8, 16, 24, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 4),
        ),
        _timm("mobilevit", "mobilevit_xxs", (1.27, 420), 64, EXPLICIT, MEAN),
        _timm("mobilevit_v2", "mobilevitv2_050", (1.37, 480), 64, MEAN),
        _timm("efficientformer", "efficientformer_l1", (12.29, 1300), 224, embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 2)),
        _timm("efficientformer_v2", "efficientformerv2_s0", (3.60, 410), 64, embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 2)),
        _timm("deit", "deit_tiny_patch16_224", (5.72, 1260), 64, EXPLICIT, embed_dim=48, depth=2),
        _timm(
            "swin", "swin_tiny_patch4_window7_224", (28.29, 4510), 64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        _own("mixer", "mixer_s32_224", (19.10, 1000), narrow_mixer),
        _timm("hiera", "hiera_tiny_224", (27.91, 4910), 64, EXPLICIT, "hiera-gathered-unroll", embed_dim=24, stages=(1, 1, 1, 1)),
        _timm("vitamin", "vitamin_small_224", (22.17, 5900), 64, EXPLICIT, depth=2),
        _transformers(
            "cvt",
            (20.00, 4570),
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875, **_IMAGENET},
            {"shortest_edge": 64},
            "cvt-matmul-attention",
            embed_dim=[16, 24, 32],
            num_heads=[1, 2, 4],
            depth=[1, 2, 3],
        ),
        _transformers(
            "pvt",
            (13.23, 1930),
            {"image_processor_type": "PvtImageProcessor", "size": {"height": 224, "width": 224}, **_IMAGENET},
            {"height": 64, "width": 64},
            image_size=64,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4],
        ),
    )
}
