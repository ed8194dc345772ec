"""The dual encoders that must export, verify and serve: each narrow (same code, seconds) and in its smallest published size.

Adding one is one entry here; every suite over dual encoders finds it by discovery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import ExportRequest, PreprocessingOverrides

SIZE = 64


TEXT = {"width": 32, "heads": 2, "layers": 2}


@dataclass(frozen=True)
class DualFamily:
    """`source`: the published network; `narrow`: the arguments that make it small. `figures`: of the published one the parameters
    (M) of the image and of the text tower, and the multiply-adds (G) of an image."""

    name: str
    source: str
    narrow: dict[str, Any]
    figures: tuple[float, float, float]

    def request(self, directory: Path, *, published: bool = False, **fields: Any) -> ExportRequest:
        """The command line that exports it with random weights into a repository under `directory`."""
        defaults = {"repository": directory / "repository", "name": self.name, "weights": "random"}
        overrides = PreprocessingOverrides(input_size=None if published else (SIZE, SIZE))
        arguments = {} if published else self.narrow
        return ExportRequest(**{"source": self.source, "model_args": arguments, "preprocessing": overrides} | defaults | fields)


DUAL_ENCODERS: dict[str, DualFamily] = {
    family.name: family
    for family in (
        DualFamily(
            "vitamin",
            "open_clip/ViTamin-S",
            {"embed_dim": 24, "trunk": {"widths": (16, 24, 48), "depths": (1, 2, 2), "heads": 3}, "text_cfg": TEXT},
            (22.03, 40.44, 5.9),
        ),
        DualFamily(
            "vit-clip",
            "open_clip/ViT-S-32",
            {"embed_dim": 24, "vision_cfg": {"width": 32, "layers": 2, "head_width": 16, "patch_size": 16}, "text_cfg": TEXT},
            (22.64, 40.44, 1.14),
        ),
        DualFamily(
            "siglip",
            "open_clip/ViT-B-16-SigLIP:webli",
            {
                "embed_dim": 64,
                "vision_cfg": {"timm_model_name": "test_vit"},
                "text_cfg": {**TEXT, "width": 64, "vocab_size": 400},
            },
            (92.88, 110.27, 17.9),
        ),
    )
}
