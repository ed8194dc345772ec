"""One inference through a newly built local Triton, before `install.sh` calls it ready: python smoke.py HOME."""

import http.client
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from app.local_triton import HOST, LocalTriton, free_ports  # noqa: E402

RED, BLUE = (255, 0, 0), (0, 0, 255)
CLASSES = 6  # red green blue cyan magenta yellow


def ask(port: int, colours: list[tuple[int, int, int]]) -> list[float]:
    """The probabilities, row by row, for plain 4x4 images of these colours."""
    pixels = [channel for colour in colours for _ in range(16) for channel in colour]
    image = {"name": "image", "datatype": "UINT8", "shape": [len(colours), 4, 4, 3], "data": pixels}
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request("POST", "/v2/models/colours/versions/1/infer", json.dumps({"inputs": [image]}))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise SystemExit(f"The smoke inference failed: {answer}")
    return answer["outputs"][0]["data"]


def main(home: Path) -> None:
    """End with a sentence and status 1 unless red and blue come back as such."""
    ports = free_ports()
    with LocalTriton(HERE / "smoke", ports, home) as _:
        scores = ask(ports.http, [RED, BLUE])
    rows = [scores[:CLASSES], scores[CLASSES:]]
    best = [row.index(max(row)) for row in rows if len(row) == CLASSES]
    if best != [0, 2]:
        raise SystemExit(f"The smoke inference answered {scores}, not red and blue.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
