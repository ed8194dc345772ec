"""The command line: `python -m tests.fuzz --seconds 300 [CAMPAIGN...]`. Exit code 1 when a promise was broken."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tests.fuzz import contract, parsers, served
from tests.fuzz.campaign import Campaign

IN_PROCESS: dict[str, Callable[[Campaign], None]] = {
    "decoders": parsers.decoders,
    "containers": parsers.containers,
    "bodies": parsers.bodies,
    "documents": parsers.documents,
}
SERVED: dict[str, Callable[..., None]] = {
    "files": served.send_files,
    "requests": served.send_requests,
    "changed": served.send_changed,
    "contract": contract.check,
}
ONCE = ("files", "requests")  # they send what there is, once, and take the time that takes
LARGEST = 8000  # pixels a side: 64 megapixels, the most that is read


def main(
    campaigns: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join((*IN_PROCESS, *SERVED))}; all by default.")] = None,
    *,
    seconds: Annotated[float, typer.Option(min=1, help="For all campaigns that make inputs at random, together.")] = 300,
    seed: Annotated[int | None, typer.Option(help="Repeats a run; by default another one each time.")] = None,
    side: Annotated[int, typer.Option(min=16, max=LARGEST, help="Pixels a side of the largest files.")] = LARGEST,
) -> None:
    known = (*IN_PROCESS, *SERVED)
    wanted = campaigns or known
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"There is no campaign {unknown[0]!r}.", param_hint="CAMPAIGN")
    share = seconds / max(1, sum(name not in ONCE for name in wanted))
    seed = random.randrange(2**31) if seed is None else seed
    print(f"Seed {seed}; {share:.0f} s for each campaign at random.", flush=True)
    if not all([*run(wanted, share, seed, side)]):
        raise typer.Exit(1)


def run(wanted: list[str] | tuple[str, ...], seconds: float, seed: int, side: int) -> list[bool]:
    """Whether each of the campaigns `wanted` found nothing; what came of it is printed. Those that need a gateway share one."""
    outcomes = [_run(Campaign(name, seconds, seed), IN_PROCESS[name]) for name in wanted if name in IN_PROCESS]
    if over_http := [name for name in wanted if name in SERVED]:
        with TemporaryDirectory(prefix="fuzz-") as directory, served.watched(Path(directory)) as gateway:
            for name in over_http:
                campaign = Campaign(name, seconds, seed)
                outcomes.append(_run(campaign, partial(SERVED[name], gateway=gateway, side=side)))
            log = gateway.log.read_text(errors="replace")
            if "Traceback" in log:
                first = log.index("Traceback")
                print(f"FAULT in the gateway's log: {log[max(0, first - 200) : first + 6000]}")
                outcomes.append(False)
    return outcomes


def _run(campaign: Campaign, send: Callable[[Campaign], None]) -> bool:
    started = time.monotonic()
    send(campaign)
    print(f"{campaign}\n  {time.monotonic() - started:.0f} s", flush=True)
    return not campaign.faults


if __name__ == "__main__":
    typer.run(main)
