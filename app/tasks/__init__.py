"""The task table: adding a task is one file beside this one and one line here."""

from app.tasks.base import AnyTask
from app.tasks.classify import Classify
from app.tasks.detect import Detect
from app.tasks.detokenize import Detokenize
from app.tasks.embed import Embed
from app.tasks.ground import Ground
from app.tasks.reconstruct import Reconstruct
from app.tasks.similarity import Similarity
from app.tasks.tokenize import Tokenize

TASKS: dict[str, AnyTask] = {
    task.name: task for task in (Classify(), Detect(), Ground(), Tokenize(), Detokenize(), Reconstruct(), Embed(), Similarity())
}
