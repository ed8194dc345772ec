"""Measure the bundled detector and grounding model on held-out scenes through the REST API.

    python recipes/measure_boxes.py --url http://127.0.0.1:8000 --record model_repository --document docs/scenes.md \\
        --pictures docs/pictures

It draws 500 scenes of `scenes.py` with two phrases each and evaluates as `python -m export eval` does. With `--record` the figures
are written into the manifests of the versions that answered, with `--document` between the marks of that file, and with
`--pictures` a few scenes are kept as the gateway renders its answers.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from measure_accuracy import record
from PIL import Image
from rate_distortion import encode_png
from scenes import SPLITS, Picture, choose, draw, write

from app.client import DEFAULT_URL, Client
from app.client import Picture as Rendered
from export.evaluate.measuring import Asking, Measured
from export.evaluate.plans import PLANS, Given, find

PHRASES = 2  # of each scene
SHOWN = (1, 4, 5, 11)  # places in the held-out split of the scenes that are kept as pictures
SHOWN_SIDE = 400  # pixels
THRESHOLD = 0.5  # the lowest score that is drawn
KEPT = {"detect": ("AP", "AP50", "AP75"), "ground": ("accuracy", "mean_iou")}
TITLES = {"mean_iou": "mean IoU"}
MARKS = re.compile(r"(?<=<!-- figures: written by recipes/measure_boxes.py -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """What one model reached: `name` is NAME@VERSION."""

    name: str
    task: str
    measured: Measured

    @property
    def figures(self) -> dict[str, float]:
        """As a manifest holds them."""
        found = {name: _known(self.measured.figures, name) for name in KEPT[self.task]}
        return {self.measured.unit: self.measured.count} | found

    def table(self) -> str:
        """Markdown: a row for each group, the whole last."""
        names = KEPT[self.task]
        head = [f"| {self.measured.grouped_by} | {' | '.join(TITLES.get(name, name) for name in names)} |"]
        head.append(f"| --- |{' --: |' * len(names)}")
        groups = {**self.measured.groups, f"**all {self.measured.count} {self.measured.unit}**": self.measured.figures}
        rows = [f"| {title} | {' | '.join(f'{_known(row, name):.3f}' for name in names)} |" for title, row in groups.items()]
        return "\n".join((*head, *rows))


def _known(figures: Mapping[str, float | None], name: str) -> float:
    value = figures[name]
    assert value is not None, name
    return round(value, 4)


def measure(client: Client, model: str, data: Path) -> Result:
    """A model on scenes that `scenes.write` has written to `data`."""
    subject = find(client, model)
    file = data / ("annotations.json" if subject.task == "detect" else "phrases.jsonl")
    measured = PLANS[subject.task](subject, Given(file, data / "images")).measure(client, Asking(subject.name))
    assert not measured.failures, measured.failures
    return Result(subject.name, subject.task, measured)


def show(client: Client, detector: str, grounder: str, directory: Path) -> None:
    """`scenes-detected.jpg` and `scenes-grounded.jpg`: the same scenes as the gateway draws its answers."""
    pictures = [draw(SPLITS["held-out"][place], size=SHOWN_SIDE) for place in SHOWN]
    _in_a_row([_detected(client, picture, detector) for picture in pictures], directory / "scenes-detected.jpg")
    _in_a_row([_grounded(client, picture, grounder) for picture in pictures], directory / "scenes-grounded.jpg")


def _detected(client: Client, picture: Picture, model: str) -> Rendered | None:
    return (
        client.detect(encode_png(Image.fromarray(picture.pixels)), model=model, threshold=THRESHOLD, render=True)
        .results[0]
        .rendered
    )


def _grounded(client: Client, picture: Picture, model: str) -> Rendered | None:
    phrases = [phrase.text for phrase in choose(picture.scene, PHRASES)]
    return client.ground(encode_png(Image.fromarray(picture.pixels)), phrases, model=model, render=True).results[0].rendered


def _in_a_row(rendered: Sequence[Rendered | None], file: Path) -> None:
    row = Image.new("RGB", (SHOWN_SIDE * len(rendered), SHOWN_SIDE))
    for index, picture in enumerate(rendered):
        assert picture is not None
        row.paste(Image.open(BytesIO(picture.data)), (SHOWN_SIDE * index, 0))
    row.save(file, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=500, help="of the held-out split")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--detector", default="scenes-detector")
    parser.add_argument("--grounder", default="scenes-grounding")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifests there")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the figures between the marks of this file")
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="draw the pictures there")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, Client(options.url) as client:
        data = Path(folder)
        write(SPLITS["held-out"][: options.scenes], data, seed=0, size=256, suffix="png", phrases_per_scene=PHRASES)
        results = [measure(client, model, data) for model in (options.detector, options.grounder)]
        if options.pictures:
            show(client, options.detector, options.grounder, options.pictures)
    text = "\n\n".join(result.table() for result in results) + "\n"
    for result in results:
        print(f"{result.name}: {json.dumps(result.figures)}")
        if options.record:
            record(options.record / result.name.replace("@", "/"), result.figures)
    print(f"\n{text}")
    if options.document:
        options.document.write_text(MARKS.sub(lambda _: text, options.document.read_text()))


if __name__ == "__main__":
    main()
