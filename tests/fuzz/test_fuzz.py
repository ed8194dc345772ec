"""The short form of `make fuzz`: every campaign for a moment, small files, the same inputs each time."""

from pathlib import Path

import pytest

from tests.fuzz import parsers, served
from tests.fuzz.__main__ import IN_PROCESS, SERVED
from tests.fuzz.campaign import Campaign
from tests.fuzz.served import Watched

SEED = 1
SECONDS = {"changed": 3, "contract": 15}
SIDE = 500

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    with served.watched(tmp_path_factory.mktemp("fuzz")) as running:
        yield running
        log = running.log.read_text(errors="replace")
        assert "Traceback" not in log, log[-6000:]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_parsers_and_decoders(name: str) -> None:
    campaign = Campaign(name, 1, SEED)
    IN_PROCESS[name](campaign)
    assert campaign.outcomes.total() > 100
    assert not campaign.faults, campaign


@pytest.mark.parametrize("name", SERVED)
def test_a_gateway(name: str, gateway: Watched) -> None:
    campaign = Campaign(name, SECONDS.get(name, 0), SEED)
    SERVED[name](campaign, gateway=gateway, side=SIDE)
    assert campaign.outcomes.total() > 30  # some run for a time, however slow the machine is
    assert not campaign.faults, campaign


def test_a_broken_promise_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A decoder that raises something of its own, which would be a 500, and one that takes too long."""
    monkeypatch.setattr("tests.fuzz.campaign.FOUND", tmp_path)

    def fail(*_: object) -> None:
        raise KeyError("of a library")

    monkeypatch.setattr(parsers, "open_image", fail)
    campaign = Campaign("decoders", 5, SEED)
    parsers.decoders(campaign)
    assert "KeyError" in campaign.faults[0]
    assert len(campaign.faults) == len(list(tmp_path.iterdir())) == 20
