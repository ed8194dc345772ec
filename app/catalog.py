"""What models exist: the entries of the repository grouped into models, the default per task, and what is wrong with the rest."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app import metrics
from app.backends.base import Backend
from app.errors import (
    BackendUnavailableError,
    InferenceError,
    ModelNotChosenError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from app.manifest import MANIFEST_FILE, Entry, ManifestError, check_hashes, read_entry

log = logging.getLogger("vitrine.catalog")

Smoke = Callable[[Backend, Entry], Awaitable[None]]


@dataclass(eq=False)
class ModelVersion:
    """All engines of one build of a model, by role. `fault` says why it cannot serve."""

    number: int
    entries: dict[str, Entry]
    fault: str | None = None
    loaded: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def build(self) -> str:
        return next(iter(self.entries.values())).manifest.build

    @property
    def status(self) -> str:
        return "failed" if self.fault else "ready" if self.loaded else "available"


@dataclass(eq=False)
class Model:
    """One name with its versions, newest first; `problems` tells of version directories that could not be read."""

    name: str
    versions: list[ModelVersion] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def current(self) -> ModelVersion | None:
        """The version that answers when none is named."""
        return next((version for version in self.versions if version.fault is None), None)

    def answers(self, role: str) -> bool:
        return any(role in version.entries for version in self.versions)


class Catalog:
    """Reads the repository, loads engines on first use, finds the model for a request. Lives on one event loop."""

    def __init__(self, root: Path, backend: Backend, smoke: Smoke, defaults: Mapping[str, str]) -> None:
        self.root = root
        self.backend = backend
        self.models: dict[str, Model] = {}
        self._smoke = smoke
        self._defaults = defaults
        self._signature: frozenset[tuple[str, int]] = frozenset()

    async def refresh(self) -> None:
        """Look at the repository again; unchanged versions keep their state, vanished ones are unloaded."""
        signature = await asyncio.to_thread(_signature, self.root)
        if signature == self._signature:
            return
        models = await asyncio.to_thread(_scan, self.root, self.backend)
        before = {(name, v.number, v.build): v for name, model in self.models.items() for v in model.versions}
        for model in models.values():
            model.versions = [before.pop((model.name, v.number, v.build), v) for v in model.versions]
            for problem in model.problems:
                log.warning("%s: %s", model.name, problem)
        self.models, self._signature = models, signature
        for version in before.values():
            await self._unload(version)

    async def watch(self, seconds: float) -> None:
        """Refresh for ever, every `seconds`; check the hashes of new entries in passing, so that faults are listed early."""
        while True:
            await self.audit()
            await asyncio.sleep(seconds)
            await self.refresh()

    async def audit(self) -> None:
        """Hash the files of versions that nobody has loaded yet and record what is wrong with them."""
        for model in list(self.models.values()):
            for version in model.versions:
                if version.status == "available" and not version.lock.locked():
                    await self._check_hashes(model, version)

    def choose(self, name: str | None, task: str, role: str) -> tuple[Model, int | None]:
        """The model, and the version when the request names one (`name@version`).

        Raises:
            ModelNotFoundError: no such model, no such version, or a model for other tasks.
            ModelNotChosenError: none is named, several could answer and no default is set.
        """
        candidates = sorted(model.name for model in self.models.values() if model.answers(role))
        if name is None:
            return self.models[self._default(task, candidates)], None
        base, _, number = name.partition("@")
        model = self.models.get(base)
        if model is None:
            raise ModelNotFoundError(f"There is no model {base!r}. Models for {task}: {_list(candidates)}.", field="model")
        if model.versions and not model.answers(role):
            raise ModelNotFoundError(f"{base} is not a model for {task}. Models for {task}: {_list(candidates)}.", field="model")
        if not number:
            return model, None
        known = [version.number for version in model.versions]
        if not number.isdecimal() or int(number) not in known:
            raise ModelNotFoundError(f"{base} has no version {number!r}; it has {_list(map(str, known))}.", field="model")
        return model, int(number)

    async def acquire(self, name: str | None, task: str, role: str) -> Entry:
        """The engine for a request, loaded. A broken newest version leaves the one before it serving.

        Raises:
            ModelNotFoundError, ModelNotChosenError: see `choose`.
            ModelUnavailableError: no version of it can serve.
            BackendUnavailableError: the inference server does not answer.
        """
        model, number = self.choose(name, task, role)
        for version in model.versions:
            if number is not None and version.number != number:
                continue
            if not version.loaded and not version.fault:
                await self._load(model, version)
            if version.loaded and role in version.entries:
                return version.entries[role]
        faults = [f"version {v.number}: {v.fault}" for v in model.versions if v.fault] + model.problems
        raise ModelUnavailableError(f"{model.name} cannot serve: {'; '.join(faults)}.")

    def _default(self, task: str, candidates: list[str]) -> str:
        """The model when none is named. A default that is there but broken is not replaced by another."""
        default = self._defaults.get(task)
        if default in self.models:
            return default
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise ModelNotChosenError(f"Name a model; these answer {task}: {_list(candidates)}.", field="model")
        problems = [f"{model.name}: {problem}" for model in self.models.values() for problem in model.problems]
        if problems:
            raise ModelUnavailableError(f"No model for {task} can serve: {'; '.join(problems)}.")
        raise ModelNotFoundError(f"There is no model for {task} in the repository; export one with `python -m export`.")

    async def _load(self, model: Model, version: ModelVersion) -> None:
        async with version.lock:
            if version.loaded or version.fault or not await self._check_hashes(model, version):
                return
            try:
                for entry in version.entries.values():
                    await self.backend.load(entry)
                    await self._smoke(self.backend, entry)
            except BackendUnavailableError:
                raise
            except (ManifestError, InferenceError) as error:
                _fail(model, version, str(error))
                await self._unload(version)
                return
            version.loaded = True
            for entry in version.entries.values():
                _publish_info(entry, self.backend.name)
            log.info("loaded %s@%d", model.name, version.number)

    async def _check_hashes(self, model: Model, version: ModelVersion) -> bool:
        try:
            for entry in version.entries.values():
                await asyncio.to_thread(check_hashes, entry)
        except ManifestError as error:
            _fail(model, version, str(error))
        return version.fault is None

    async def _unload(self, version: ModelVersion) -> None:
        version.loaded = False
        for entry in version.entries.values():
            await self.backend.unload(entry)


def _publish_info(entry: Entry, backend: str) -> None:
    metrics.MODEL_INFO.labels(entry.manifest.model, str(entry.version), backend, entry.manifest.precision).set(1)


def _fail(model: Model, version: ModelVersion, reason: str) -> None:
    version.fault = reason
    log.warning("%s@%d cannot serve: %s", model.name, version.number, reason)


def _list(names: "Iterator[str] | list[str] | map[str]") -> str:
    return ", ".join(names) or "none"


def _version_directories(root: Path) -> Iterator[Path]:
    if root.is_dir():
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from (path for path in entry.iterdir() if path.is_dir() and path.name.isdecimal())


def _signature(root: Path) -> frozenset[tuple[str, int]]:
    """Changes whenever a version appears, vanishes or is written anew."""
    found = set()
    for path in _version_directories(root):
        manifest = path / MANIFEST_FILE
        changed = manifest if manifest.exists() else path
        found.add((str(path), changed.stat().st_mtime_ns))
    return frozenset(found)


def _scan(root: Path, backend: Backend) -> dict[str, Model]:
    """Read every version directory and group the engines of one build; whatever is broken becomes a problem of its model."""
    models: dict[str, Model] = {}
    groups: dict[tuple[str, int], dict[str, Entry]] = {}
    for path in _version_directories(root):
        try:
            entry = read_entry(path)
        except ManifestError as error:
            name = path.parent.name.partition(".")[0]
            models.setdefault(name, Model(name)).problems.append(f"version {path.name}: {error}")
            continue
        models.setdefault(entry.manifest.model, Model(entry.manifest.model))
        groups.setdefault((entry.manifest.model, entry.version), {})[entry.manifest.role] = entry
    for (name, number), entries in sorted(groups.items(), key=lambda group: -group[0][1]):
        models[name].versions.append(ModelVersion(number, entries, _fault(entries, backend)))
    return models


def _fault(entries: Mapping[str, Entry], backend: Backend) -> str | None:
    """Why this group of engines can never serve here; None when it can."""
    manifest = next(iter(entries.values())).manifest
    if missing := set(manifest.roles) - entries.keys():
        return f"the engines for {_list(sorted(missing))} are missing"
    if len({entry.manifest.build for entry in entries.values()}) > 1:
        return "its engines come from different builds; publish them again together"
    return next((reason for entry in entries.values() if (reason := backend.refuses(entry))), None)
