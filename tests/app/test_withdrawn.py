"""What one process withdraws, the others withdraw too."""

from pathlib import Path

import pytest

from app.backends.fake import FakeBackend
from app.catalog import Catalog
from app.errors import ModelUnavailableError
from app.withdrawn import Withdrawn
from tests.repository import make_repository

pytestmark = pytest.mark.anyio


def test_names_are_shared(tmp_path: Path) -> None:
    first, second = Withdrawn(tmp_path), Withdrawn(tmp_path)
    first.add("colours")
    second.refresh()
    assert first.names == second.names == Withdrawn(tmp_path).names == {"colours"}
    second.remove("colours")
    second.remove("colours")
    first.refresh()
    assert first.names == second.names == frozenset()


def test_alone_it_remembers() -> None:
    alone = Withdrawn()
    alone.add("colours")
    alone.refresh()
    assert alone.names == {"colours"}


async def test_every_catalog_stays_away_from_it(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    (tmp_path / "shared").mkdir()

    async def smoke(*_: object) -> None: ...

    catalogs = [Catalog(repository, FakeBackend(), smoke, {}, withdrawn=Withdrawn(tmp_path / "shared")) for _ in range(2)]
    for catalog in catalogs:
        await catalog.refresh()
        await catalog.acquire("colours", "classify", "classify")
    catalogs[0].withdraw("colours")
    await catalogs[1].refresh()
    for catalog in catalogs:
        with pytest.raises(ModelUnavailableError):
            await catalog.acquire("colours", "classify", "classify")
        await catalog.close()
    await catalogs[1].restore("colours")
    await catalogs[0].refresh()
    for catalog in catalogs:
        assert (await catalog.acquire("colours", "classify", "classify")).loaded
