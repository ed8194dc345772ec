"""What models exist: the entries of the repository grouped into models, the default per task, and what is wrong with the rest."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from app import metrics
from app.backends.base import Backend
from app.errors import (
    BackendUnavailableError,
    CapacityError,
    DeadlineError,
    InferenceError,
    ModelNotChosenError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from app.manifest import Entry, Manifest, ManifestError, check_hashes, read_entry
from app.withdrawn import Withdrawn

log = logging.getLogger("vitrine.catalog")

Smoke = Callable[[Backend, Entry], Awaitable[None]]
Signature = frozenset[tuple[str, int, int]]

KEPT_VERSIONS = 2  # as many as the version policy of config.pbtxt keeps in Triton


@dataclass(eq=False)
class ModelVersion:
    """All engines of one build of a model, by role. `fault` says why it cannot serve, `loading` is the load that is under way."""

    number: int
    entries: dict[str, Entry]
    fault: str | None = None
    hashed: bool = False
    loaded: bool = False
    loading: "asyncio.Task[None] | None" = None

    @cached_property
    def roles(self) -> frozenset[str]:
        """Those of the build, also where an engine of it is missing here."""
        return frozenset(role for entry in self.entries.values() for role in entry.manifest.roles)

    @property
    def manifest(self) -> Manifest:
        """That of the first of the build's roles which is there."""
        manifests = {role: entry.manifest for role, entry in self.entries.items()}
        any_of_them = next(iter(manifests.values()))
        return next((manifests[role] for role in any_of_them.roles if role in manifests), any_of_them)

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

    @property
    def faults(self) -> list[str]:
        """What is wrong with its versions, one sentence each."""
        return [f"version {version.number}: {version.fault}" for version in self.versions if version.fault] + self.problems

    @property
    def random(self) -> bool:
        return any(entry.manifest.source.weights == "random" for version in self.versions for entry in version.entries.values())

    def answers(self, role: str) -> bool:
        return any(role in version.roles for version in self.versions)


class Catalog:
    """Reads the repository, loads engines on first use, finds the model for a request. Lives on one event loop."""

    def __init__(
        self,
        root: Path,
        backend: Backend,
        smoke: Smoke,
        defaults: Mapping[str, str],
        *,
        grace: float = 0.0,
        chat_grace: float = 0.0,
        withdrawn: Withdrawn | None = None,
    ) -> None:
        """`grace`: seconds that a vanished or withdrawn version stays loaded for the requests that still hold it; `chat_grace` of
        a chat model, whose answers take longer."""
        self.root = root
        self.withdrawn = withdrawn or Withdrawn()
        self.backend = backend
        self.models: dict[str, Model] = {}
        self._smoke = smoke
        self._defaults = defaults
        self._grace = grace
        self._chat_grace = chat_grace
        self._signature: Signature = frozenset()
        self._leaving: set[ModelVersion] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def refresh(self) -> None:
        """Look at the repository again. Unchanged sound versions keep their state, vanished ones are unloaded."""
        self.withdrawn.refresh()
        self._let_go()
        signature = await asyncio.to_thread(_signature, self.root)
        if signature == self._signature:
            return
        models = await asyncio.to_thread(_scan, self.root, self.backend)
        before = {(name, version.number): version for name, model in self.models.items() for version in model.versions}
        for model in models.values():
            for index, version in enumerate(model.versions):
                old = before.get((model.name, version.number))
                if old is not None and old.fault is None and old.entries == version.entries:
                    model.versions[index] = before.pop((model.name, version.number))
            for problem in model.problems:
                log.warning("%s: %s", model.name, problem)
        for name in self.models.keys() - models.keys():
            metrics.MODEL_FAULTS.labels(name).set(0)
        for model in models.values():
            metrics.MODEL_FAULTS.labels(model.name).set(len(model.faults))
        self.models, self._signature = models, signature
        for version in before.values():
            self._spawn(self._retire(version))

    async def watch(self, seconds: float) -> None:
        """Refresh for ever, every `seconds`; check the hashes of new entries and load new versions of what serves in passing, so
        that faults are listed early and nobody waits for a load."""
        while True:
            try:
                await self.refresh()
                await self.audit()
                self.advance()
            except Exception:
                log.exception("looking at the repository failed; trying again in %g s", seconds)
            await asyncio.sleep(seconds)

    async def audit(self) -> None:
        """Hash the files of versions that nobody has loaded yet, once each, and record what is wrong with them."""
        for model in list(self.models.values()):
            for version in model.versions:
                if version.status == "available" and version.loading is None:
                    await self._check_hashes(model, version)

    def advance(self) -> None:
        """Begin to load the newest sound version of every model of which an older one serves; it takes over once it is there."""
        for model in self.models.values():
            newest = model.current
            serves = model.name not in self.withdrawn.names and any(version.loaded for version in model.versions)
            if newest is not None and not newest.loaded and serves:
                self._load_in_background(model, newest)

    def withdraw(self, name: str) -> Model:
        """Have a model answer no more, and forget its engines once the requests that hold them have had their time.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        model = self._named(name)
        self.withdrawn.add(model.name)
        self._let_go()
        return model

    async def restore(self, name: str) -> Model:
        """Load the newest sound version of a model, and let the model answer again if it was withdrawn.

        Raises:
            ModelNotFoundError: there is no such model.
            ModelUnavailableError: no version of it can serve.
            BackendUnavailableError: the inference server does not answer.
        """
        model = self._named(name)
        self.withdrawn.remove(model.name)
        while (newest := model.current) is not None and not newest.loaded:
            await asyncio.shield(self._load_in_background(model, newest))
        if newest is None:
            raise _unavailable(model)
        return model

    def status(self, model: Model) -> str:
        """`ready`, `available` (loads on first use), `failed`, or `unloaded` by an administrator."""
        if model.name in self.withdrawn.names:
            return "unloaded"
        return "failed" if model.current is None else model.current.status

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def choose(self, name: str | None, task: str, role: str) -> tuple[Model, int | None]:
        """The model, and the version when the request names one (`name@version`).

        Raises:
            ModelNotFoundError: no such model, no such version, or a model for other tasks.
            ModelNotChosenError: none is named, several could answer and no default is set.
        """
        candidates = sorted(model.name for model in self.models.values() if model.answers(role))
        base, _, number = (self._default(task, candidates) if name is None else name).partition("@")
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

    async def acquire(self, name: str | None, task: str, role: str) -> ModelVersion:
        """The version for a request, all its engines loaded. While the newest loads, and when it is broken, the one before answers.

        Raises:
            ModelNotFoundError, ModelNotChosenError: see `choose`.
            ModelUnavailableError: no version of it can serve.
            BackendUnavailableError: the inference server does not answer.
        """
        model, number = self.choose(name, task, role)
        if model.name in self.withdrawn.names:
            raise ModelUnavailableError(f"{model.name} was unloaded by an administrator of this server.")
        versions = [version for version in model.versions if number in (None, version.number) and role in version.roles]
        away: BackendUnavailableError | None = None
        for index, version in enumerate(versions):
            if not version.loaded and version.fault is None:
                loading = self._load_in_background(model, version)
                if any(older.loaded for older in versions[index + 1 :]):
                    continue
                try:
                    await asyncio.shield(loading)
                except BackendUnavailableError as error:
                    away = error
            if version.loaded:
                return version
        if away is not None:
            raise away
        raise _unavailable(model)

    def _default(self, task: str, candidates: list[str]) -> str:
        """The model when none is named. A default that is there but broken is not replaced by another, and a model with random
        weights answers only by name."""
        default = self._defaults.get(task)
        if default in self.models:
            return default
        if len(candidates) == 1 and not self.models[candidates[0]].random:
            return candidates[0]
        if candidates:
            raise ModelNotChosenError(f"Name a model; these answer {task}: {_list(candidates)}.", field="model")
        problems = "; ".join(f"{model.name}: {problem}" for model in self.models.values() for problem in model.problems)
        if problems and not any(model.versions for model in self.models.values()):
            raise ModelUnavailableError(f"No model for {task} can serve: {problems}.")
        unread = f" Not read: {problems}." if problems else ""  # of which task, nobody knows
        raise ModelNotFoundError(f"There is no model for {task} in the repository; export one with `python -m export`.{unread}")

    def _load_in_background(self, model: Model, version: ModelVersion) -> "asyncio.Task[None]":
        """One load for everyone who waits; a request that gives up does not end it."""
        if version.loading is None:
            version.loading = self._spawn(self._load(model, version))
        return version.loading

    async def _load(self, model: Model, version: ModelVersion) -> None:
        try:
            if not await self._check_hashes(model, version):
                return
            for entry in version.entries.values():
                await self.backend.load(entry)
                await self._smoke(self.backend, entry)
        except (CapacityError, DeadlineError) as error:
            raise BackendUnavailableError(f"{model.name}@{version.number} did not load in time: {error.detail}") from error
        except (ManifestError, InferenceError) as error:
            _fail(model, version, str(error))
            await self._unload(version)
        else:
            version.loaded = True
            for entry in version.entries.values():
                _info(entry, self.backend.name).set(1)
            log.info("loaded %s@%d", model.name, version.number)
        finally:
            version.loading = None

    async def _check_hashes(self, model: Model, version: ModelVersion) -> bool:
        if not version.hashed:
            try:
                for entry in version.entries.values():
                    await asyncio.to_thread(check_hashes, entry)
            except ManifestError as error:
                _fail(model, version, str(error))
            version.hashed = True
        return version.fault is None

    def _named(self, name: str) -> Model:
        if name not in self.models:
            raise ModelNotFoundError(f"There is no model {name!r}; see /v1/models.", field="name")
        return self.models[name]

    def _let_go(self) -> None:
        """Begin to unload what is withdrawn, here or by another process, and loaded or about to be."""
        for name in self.withdrawn.names & self.models.keys():
            for version in self.models[name].versions:
                if version not in self._leaving and (version.loaded or version.loading is not None):
                    self._leaving.add(version)
                    self._spawn(self._leave(name, version))

    async def _leave(self, name: str, version: ModelVersion) -> None:
        """Nothing is unloaded when the model was restored meanwhile."""
        await self._wait_for_users(version)
        self._leaving.discard(version)
        if name in self.withdrawn.names:
            await self._unload(version)

    async def _retire(self, version: ModelVersion) -> None:
        await self._wait_for_users(version)
        await self._unload(version)

    async def _wait_for_users(self, version: ModelVersion) -> None:
        """Those that wait for its load are given it, too."""
        if version.loading is not None:
            await asyncio.wait([version.loading])
        await asyncio.sleep(self._grace_of(version))

    def _grace_of(self, version: ModelVersion) -> float:
        return self._grace if version.manifest.generation is None else self._chat_grace

    async def _unload(self, version: ModelVersion) -> None:
        if version.loaded:
            for entry in version.entries.values():
                _info(entry, self.backend.name).set(0)
        version.loaded = False
        # All at once: a load that begins meanwhile must not find one that is yet to go.
        await asyncio.gather(*(self.backend.unload(entry) for entry in version.entries.values()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even when nobody waits
        return task


def _info(entry: Entry, backend: str) -> Gauge:
    return metrics.MODEL_INFO.labels(entry.manifest.model, str(entry.version), backend, entry.manifest.precision)


def _unavailable(model: Model) -> ModelUnavailableError:
    return ModelUnavailableError(f"{model.name} cannot serve: {'; '.join(model.faults)}.")


def _fail(model: Model, version: ModelVersion, reason: str) -> None:
    version.fault = reason
    metrics.MODEL_FAULTS.labels(model.name).set(len(model.faults))
    log.warning("%s@%d cannot serve: %s", model.name, version.number, reason)


def _list(names: "Iterator[str] | list[str] | map[str]") -> str:
    return ", ".join(names) or "none"


def _version_directories(root: Path) -> Iterator[Path]:
    """The newest version directories of every entry, as many as are kept."""
    for entry in sorted(_directories(root)):
        if not entry.name.startswith("."):
            versions = [path for path in _directories(entry) if path.name.isdecimal()]
            yield from sorted(versions, key=lambda path: int(path.name))[-KEPT_VERSIONS:]


def _directories(parent: Path) -> list[Path]:
    """Empty for what vanished meanwhile."""
    try:
        return [path for path in parent.iterdir() if path.is_dir()]
    except OSError:
        return []


def _signature(root: Path) -> Signature:
    """Name, size and time of every file of the versions: changes whenever one appears, vanishes or is written anew."""
    found = set()
    for version in _version_directories(root):
        found.add((str(version), 0, 0))
        for directory, _, names in os.walk(version):
            for path in (Path(directory, name) for name in names):
                with suppress(OSError):
                    status = path.stat()
                    found.add((str(path), status.st_size, status.st_mtime_ns))
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
    if len({entry.manifest.codebook for entry in entries.values()}) > 1:
        return "its engines have different codebooks; publish them again together"
    return next((reason for entry in entries.values() if (reason := backend.refuses(entry))), None)
