"""The grounding networks that must export, verify and serve: each narrow (same code, seconds) and in its smallest published size.

Adding one is one entry here; every suite over grounding networks finds it by discovery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import ExportRequest, PreprocessingOverrides

SIZE = 64


@dataclass(frozen=True)
class GrounderFamily:
    """`narrow`: arguments of its factory. `smallest`: its published variant for the conformance suite.

    `figures`: of each published variant the parameters (M) without its text encoder, those of the text encoder, and the
    multiply-adds (G) of one image and phrase without the text encoder.
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


GROUNDERS: dict[str, GrounderFamily] = {
    family.name: family
    for family in (
        GrounderFamily(
            "transvg_pp",
            {
                "width": 48,
                "heads": 3,
                "depth": 3,
                "modulated": (1, 2),
                "image_size": SIZE,
                "patch": 8,
                "head": 32,
                "text": (2, 32, 4, 64),
                "vocabulary": 1200,
                "positions": 40,
            },
            "tiny",
            {"tiny": (6.65, 109.48, 21.1), "small": (25.03, 109.48, 60.2), "base": (97.18, 109.48, 192.3)},
        ),
    )
}
