"""The task table: adding a task is one file beside this one and one line here."""

from app.tasks.base import AnyTask
from app.tasks.classify import Classify

TASKS: dict[str, AnyTask] = {task.name: task for task in (Classify(),)}
