"""Which models an administrator has unloaded: names that every process of this gateway sees, so that all stay away from them."""

from contextlib import suppress
from pathlib import Path


class Withdrawn:
    """Names, kept as empty files of a directory that the processes share; without one, in this process alone. Event loop only."""

    def __init__(self, directory: Path | None = None) -> None:
        self.names: frozenset[str] = frozenset()
        self._directory = directory
        self.refresh()

    def refresh(self) -> None:
        """Look again at what the other processes were told."""
        if self._directory is not None:
            self.names = frozenset(file.name for file in self._directory.iterdir())

    def add(self, name: str) -> None:
        """`name` is that of a model of the repository, so it is no path."""
        if self._directory is not None:
            (self._directory / name).touch()
        self.names |= {name}

    def remove(self, name: str) -> None:
        if self._directory is not None:
            with suppress(FileNotFoundError):
                (self._directory / name).unlink()
        self.names -= {name}
