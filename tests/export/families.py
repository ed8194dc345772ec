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
    """`rewrites`: the exact equivalents that its export needs, by name."""

    name: str
    narrow: Variant
    published: Variant
    rewrites: tuple[str, ...] = ()


def _timm(name: str, published: str, input_size: int, rewrites: tuple[str, ...] = (), **model_args: Any) -> Family:
    """A family whose narrow variant timm's own factory of the published one makes."""
    narrow = Variant(f"timm/{published}", model_args, input_size)
    return Family(name, narrow, Variant(f"timm/{published}", num_classes=None), rewrites)


def _own(name: str, factory: Callable[[], nn.Module], published: str, rewrites: tuple[str, ...] = ()) -> Family:
    """A family whose narrow variant is a factory of this file, because timm's does not let the width be chosen."""
    narrow = Variant(f"python/{__file__}:{factory.__name__}")
    return Family(name, narrow, Variant(f"timm/{published}", num_classes=None), rewrites)


def _transformers(name: str, narrow: dict[str, Any], published: dict[str, Any], processor: dict[str, Any]) -> Family:
    labels = {str(index): f"class {index}" for index in range(CLASSES)}
    config = {"model_type": name, "id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    size = narrow.pop("size")
    return Family(
        name,
        Variant(config=config | narrow, processor=processor | {"size": size}),
        Variant(config=config | published, processor=processor),
        REWRITES_OF.get(name, ()),
    )


REWRITES_OF = {"cvt": ("cvt-matmul-attention",)}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}

pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9}


def narrow_volo() -> nn.Module:
    widths, heads = (24, 48, 48, 48), (2, 4, 4, 4)
    return timm.models.volo.VOLO((1, 1, 1, 1), 64, num_classes=CLASSES, stem_hidden_dim=16, embed_dims=widths, num_heads=heads)


def narrow_mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(CLASSES, 64, patch_size=8, num_blocks=2, embed_dim=48)


EXPLICIT = ("explicit-attention",)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _timm("convnext", "convnext_atto", 64, ("global-mean",), depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
        _timm("convit", "convit_tiny", 64, ("convit-baked-positions",), embed_dim=24, depth=3, local_up_to_layer=2),
        _timm("crossvit", "crossvit_tiny_240", 120, ("crossvit-matrix-resize",), embed_dim=(24, 48), depth=((1, 1, 0),)),
        _own("volo", narrow_volo, "volo_d1_224", ("explicit-attention", "volo-one-hot-fold")),
        _timm("pvt_v2", "pvt_v2_b0", 64, EXPLICIT, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
        _timm("mobilevit", "mobilevit_xxs", 64, ("explicit-attention", "global-mean")),
        _timm("mobilevit_v2", "mobilevitv2_050", 64, ("global-mean",)),
        _timm("efficientformer", "efficientformer_l1", 224, embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 2)),
        _timm(
            "efficientformer_v2", "efficientformerv2_s0", 64, embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 2), mlp_ratios=(2,) * 4
        ),
        _timm("deit", "deit_tiny_patch16_224", 64, EXPLICIT, embed_dim=48, depth=2),
        _timm("swin", "swin_tiny_patch4_window7_224", 64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4),
        _own("mixer", narrow_mixer, "mixer_s32_224"),
        _timm("hiera", "hiera_tiny_224", 64, ("explicit-attention", "hiera-gathered-unroll"), embed_dim=24, stages=(1, 1, 1, 1)),
        _timm("vitamin", "vitamin_small_224", 64, EXPLICIT, depth=2),
        _transformers(
            "cvt",
            {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "size": {"shortest_edge": 64}},
            {},
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875, **_IMAGENET},
        ),
        _transformers(
            "pvt",
            {
                "image_size": 64,
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 3, 4],
                "size": {"height": 64, "width": 64},
            },
            {},
            {"image_processor_type": "PvtImageProcessor", "size": {"height": 224, "width": 224}, **_IMAGENET},
        ),
    )
}
