"""Plain FastAPI: a `def` endpoint, which runs in FastAPI's pool of threads; worker processes by uvicorn."""

from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI

from load_tests.peers.classifier import PORT, WORKERS, Classifier

app = FastAPI()
classifier: Classifier | None = None if __name__ == "__main__" and WORKERS > 1 else Classifier()


@app.get("/ready")
def ready() -> bool:
    return True


@app.post("/classify")
def classify(data: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
    assert classifier is not None
    return classifier.classify(data)


if __name__ == "__main__":
    uvicorn.run("server:app" if WORKERS > 1 else app, port=PORT, workers=WORKERS, access_log=False, log_level="warning")
