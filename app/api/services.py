"""What the routes need; made by `app/main.py`."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.admission import Admission
from app.api.fetch import FetchPolicy
from app.api.keys import Access
from app.catalog import Catalog
from app.chat_grounding import ChatGrounding
from app.pipeline import Pipeline
from app.telemetry import Tracing
from app.text_vectors import TextVectors


@dataclass(frozen=True)
class Services:
    """`defaults` are the models that answer when none is named, `roles` the roles of engines that answer, both by task."""

    admission: Admission
    pipeline: Pipeline
    texts: TextVectors
    catalog: Catalog
    fetching: FetchPolicy
    access: Access
    defaults: Mapping[str, str]
    roles: Mapping[str, str]
    max_body_bytes: int
    max_images: int
    grounding: ChatGrounding
    tracing: Tracing | None = None

    def default_roles(self) -> dict[str, str]:
        """Of every task the role with which its default model answers."""
        return {task: self.grounding.role(task, role) for task, role in self.roles.items()}
