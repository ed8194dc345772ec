"""The tokenizers that must export, verify and serve: each narrow (same code, seconds) and in its smallest published variant.

Adding one is one entry here; every suite over tokenizers finds it by discovery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import ExportRequest, PreprocessingOverrides

SIZE = 64


@dataclass(frozen=True)
class TokenizerFamily:
    """`narrow`: arguments of its factory. `smallest`: its published variant for the conformance suite.

    `figures`: of each variant the parameters (M) and the multiply-adds (G) of encoder and decoder, without the search.
    """

    name: str
    narrow: dict[str, Any]
    smallest: str
    figures: dict[str, tuple[float, float, float]]

    def request(self, directory: Path, *, published: bool = False, **fields: Any) -> ExportRequest:
        """The command line that exports it with random weights into a repository under `directory`."""
        arguments = {"variant": self.smallest} if published else self.narrow
        size = None if published else (SIZE, SIZE)
        defaults = {"repository": directory / "repository", "name": self.name.replace("_", "-"), "weights": "random"}
        overrides = PreprocessingOverrides(input_size=size)
        return ExportRequest(**{"source": self.name, "model_args": arguments, "preprocessing": overrides} | defaults | fields)


TOKENIZERS: dict[str, TokenizerFamily] = {
    family.name: family
    for family in (
        TokenizerFamily(
            "vit_vqgan",
            {"size": (2, 48, 2, 96), "image_size": SIZE, "codes": 512, "code_channels": 16},
            "small",
            {"nano": (2.6, 1.7, 3.3), "small": (50.9, 34.5, 34.5), "base": (170.7, 106.5, 106.5), "large": (613.5, 34.5, 670.3)},
        ),
        TokenizerFamily(
            "vqgan_lc",
            {
                "channels": 32,
                "blocks": 1,
                "multipliers": (1, 1, 2, 1),
                "attention": (3,),
                "latent": 16,
                "codes": 9000,
                "features": 24,
            },
            "f16",
            {"f16": (71.8, 69.2, 126.4), "f8": (64.7, 110.0, 230.9)},
        ),
        TokenizerFamily(
            "fqgan",
            {
                "variant": "triple_ds8",
                "image_size": SIZE,
                "channels": 32,
                "blocks": 1,
                "multipliers": (1, 1, 1, 2),
                "latent": 16,
                "depth": 1,
                "heads": 4,
                "codes": 512,
            },
            "dual_ds16",
            {
                "dual_ds16": (111.3, 80.0, 126.4),
                "triple_ds16": (131.7, 85.5, 126.4),
                "dual_ds8": (110.3, 167.0, 237.4),
                "triple_ds8": (131.1, 194.0, 237.4),
            },
        ),
    )
}
