"""The detectors that must export, verify and serve: each narrow (same code, seconds) and in its smallest published variant.

Adding one is one entry here; every suite over detectors finds it by discovery.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.spec import ExportRequest, PreprocessingOverrides

CLASSES = 7
SIZE = (96, 136)  # neither a square nor a multiple of anything, so that rows are not columns and padding is needed


@dataclass(frozen=True)
class DetectorFamily:
    """`narrow`: arguments of its factory, or what stands in the config.json of transformers. `smallest`: its published variant for
    the conformance suite; of transformers that which its configuration's defaults are, but for `published`.

    `millions`: the parameters of each published variant. `processor`: of transformers, what stands in preprocessor_config.json.
    `rewrites`: the exact equivalents that its export needs, by name.
    """

    name: str
    narrow: dict[str, Any]
    smallest: str = ""
    millions: dict[str, float] = field(default_factory=dict)
    processor: dict[str, Any] | None = None
    published: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = SIZE
    published_size: tuple[int, int] = (512, 512)
    phrases: bool = False
    rewrites: frozenset[str] = frozenset()

    def request(self, directory: Path, *, published: bool = False, **fields: Any) -> ExportRequest:
        """The command line that exports it with random weights into a repository under `directory`."""
        arguments: dict[str, Any] = {"variant": self.smallest} if published else self.narrow
        described: dict[str, Any] = {"source": self.name, "model_args": arguments, "num_classes": None if published else CLASSES}
        if self.processor is not None:
            described |= {"source": f"transformers/{self.describe(directory, published=published)}", "model_args": {}}
        if self.phrases:
            described["num_classes"] = None
        size = self.published_size if published else self.size
        described["preprocessing"] = PreprocessingOverrides(input_size=size)
        defaults = {"repository": directory / "repository", "name": self.name.replace("_", "-"), "weights": "random"}
        return ExportRequest(**described | defaults | fields)

    def describe(self, directory: Path, *, published: bool = False) -> Path:
        """Write the configuration files of transformers, and give the directory they are in."""
        home = directory / "source"
        home.mkdir(exist_ok=True)
        config = {"model_type": self.name} | (self.published if published else self.narrow)
        (home / "config.json").write_text(json.dumps(config))
        (home / "preprocessor_config.json").write_text(json.dumps(self.processor))
        return home


def _residual(*stages: int) -> dict[str, Any]:
    """The configuration of a narrow ResNet that gives these of its four stages."""
    shape = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return {"model_type": "resnet", "out_features": [f"stage{stage}" for stage in stages], **shape}


def _processor(kind: str) -> dict[str, Any]:
    size = {"shortest_edge": 800, "longest_edge": 1333}
    normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
    return {"image_processor_type": kind, "size": size, "do_pad": True, **normalisation}


_DECODER = {
    "d_model": 32,
    "num_queries": 12,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
}


_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

DETECTORS: dict[str, DetectorFamily] = {
    family.name: family
    for family in (
        DetectorFamily(
            "vidt_plus",
            {
                "width": 16,
                "depths": (1, 2, 1, 1),
                "heads": (1, 2, 2, 4),
                "window": 4,
                "queries": 20,
                "channels": 32,
                "decoder_heads": 4,
                "layers": 2,
                "points": 2,
                "hidden": 48,
                "bottleneck": 16,
                "groups": 8,
                "coefficients": 12,
                "mask_side": 16,
                "rows": 15,
            },
            "nano",
            {"nano": 16.5, "tiny": 38.3, "small": 60.8, "base": 100.0},
        ),
        DetectorFamily(
            "detr",
            _DECODER | {"backbone_config": _residual(4), "decoder_layers": 1},
            processor=_processor("DetrImageProcessor"),
            rewrites=frozenset(("detr-plain-masks",)),
        ),
        DetectorFamily(
            "deformable_detr",
            _DECODER
            | {
                "backbone_config": _residual(2, 3, 4),
                "decoder_layers": 2,
                "with_box_refine": True,
                "num_feature_levels": 3,
                "encoder_n_points": 2,
                "decoder_n_points": 2,
            },
            processor=_processor("DeformableDetrImageProcessor"),
            rewrites=frozenset(("gathered-deformable-attention",)),
        ),
        DetectorFamily(
            "rt_detr",
            _DECODER
            | {
                "backbone_config": _residual(2, 3, 4) | {"model_type": "rt_detr_resnet"},
                "freeze_backbone_batch_norms": False,
                "encoder_in_channels": [12, 16, 24],
                "encoder_hidden_dim": 32,
                "hidden_expansion": 0.5,
                "decoder_in_channels": [32, 32, 32],
                "decoder_n_points": 2,
                "decoder_layers": 2,
                "num_denoising": 0,
            },
            processor={
                "image_processor_type": "RTDetrImageProcessor",
                "size": {"height": 640, "width": 640},
                "do_normalize": False,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "resample": 2,
            },
            published={  # PekingU/rtdetr_r18vd
                "backbone_config": {
                    "model_type": "rt_detr_resnet",
                    "hidden_sizes": [64, 128, 256, 512],
                    "depths": [2, 2, 2, 2],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
                "encoder_in_channels": [128, 256, 512],
                "hidden_expansion": 0.5,
                "decoder_layers": 3,
                "num_labels": 80,
            },
            size=(96, 160),  # its maps are doubled until they fit one another
            rewrites=frozenset(("gathered-deformable-attention", "rt-detr-any-batch")),
        ),
        DetectorFamily(
            "yolos",
            {
                "image_size": [64, 96],
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "num_detection_tokens": 12,
            },
            processor=_processor("YolosImageProcessor"),
            rewrites=frozenset(("yolos-baked-positions",)),
        ),
        DetectorFamily(
            "owlv2",
            {
                "text_config": _ENCODER | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513},
                "vision_config": _ENCODER | {"image_size": 96, "patch_size": 16},
                "projection_dim": 32,
            },
            processor={
                "image_processor_type": "Owlv2ImageProcessor",
                "size": {"height": 960, "width": 960},
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 2,
            },
            published={"vision_config": {"image_size": 960}},  # google/owlv2-base-patch16
            size=(96, 96),
            published_size=(960, 960),
            phrases=True,
        ),
    )
}
