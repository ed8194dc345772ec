"""What the verifications of two engines of one build have in common: each is asked, and both pass or neither does."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from app.manifest import Check, Entry, GoldenExample, Verification
from export.files import write_manifest, writing
from export.golden import GoldenImage
from export.runner import Infer, open_engine
from export.served import failure, staged_entry
from export.spec import Staged, VerificationError

ChecksOf = Callable[[Infer], Iterator[Check]]
"""Asks an engine and gives every check of it."""


class PairVerifier(Protocol):
    """`images` and `batches` are what the engines are asked with."""

    images: Sequence[GoldenImage]
    batches: tuple[int, ...]

    def write_golden(self, entry: Entry, infer: Infer) -> Iterator[GoldenExample]:
        """The raw outputs that travel with an engine; `app/golden.py` asks for them again wherever it is served."""


def verify_pair(
    build: Sequence[Staged], entries: Sequence[Entry], verifier: PairVerifier, checks: Sequence[ChecksOf], reference: str
) -> tuple[Staged, ...]:
    """Make the `checks` of each engine, and write the golden outputs and the finished manifests.

    Args:
        entries: the staged versions of `build`, as the gateway reads them.
        checks: for each engine.
        reference: what the engines are held against, in words for the manifest.

    Raises:
        VerificationError: with the checks of both engines that failed.
        ExportError: an engine does not run here; disk full.
    """

    def record(made: tuple[Check, ...]) -> Verification:
        batches, images = verifier.batches, len(verifier.images)
        return Verification(reference=reference, images=images, batch_sizes=batches, checks=made, accuracy={})

    records = []
    for entry, checks_of in zip(entries, checks, strict=True):
        with open_engine(entry) as infer:
            records.append(record(tuple(checks_of(infer))))
    if not all(each.passed for each in records):
        made = tuple(check for each in records for check in each.checks)
        raise VerificationError(failure(made), record(made))
    for staged, entry, verification in zip(build, entries, records, strict=True):
        with open_engine(entry) as infer, writing(staged.path):
            golden = tuple(verifier.write_golden(entry, infer))
            write_manifest(staged.path, entry.manifest.model_copy(update={"verification": verification, "golden": golden}))
    return tuple(Staged(staged.path, staged_entry(staged).manifest) for staged in build)
