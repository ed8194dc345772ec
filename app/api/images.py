"""Images that came as an address are fetched before anything is decoded."""

import asyncio
from functools import partial

from app.admission import Ticket
from app.api.body import ImageUrl
from app.api.fetch import fetch
from app.api.services import Services
from app.errors import InputError


async def fetch_addresses(
    images: list[bytes | ImageUrl | InputError], services: Services, ticket: Ticket
) -> list[bytes | InputError]:
    """Images that came as an address are fetched together, within the request's time and the memory set aside for bodies."""
    if not any(isinstance(image, ImageUrl) for image in images):
        return [image for image in images if not isinstance(image, ImageUrl)]
    hold = partial(services.admission.take_bytes, ticket)

    async def get(image: bytes | ImageUrl | InputError) -> bytes | InputError:
        return await fetch(image.url, services.fetching, hold) if isinstance(image, ImageUrl) else image

    async with ticket.within_deadline():
        return list(await asyncio.gather(*(get(image) for image in images)))
