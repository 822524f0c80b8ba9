"""Search the hub."""

from __future__ import annotations

import msgspec

from app.engine.report import HostReport
from app.hub.files import SearchHit
from app.hub.listing import Hub, configure


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """What to search; see `Hub.search`."""

    text: str
    sort: str = "downloads"
    tags: tuple[str, ...] = ()
    limit: int = 50
    endpoint: str = ""
    proxy: str = ""
    token: str = ""


def run(parameters: Parameters, report: HostReport) -> list[SearchHit]:
    """The repositories found, best first. Raises WeftError NETWORK or PERMISSION."""
    report.progress("Searching the hub")
    configure(parameters.endpoint, parameters.proxy)
    return Hub(parameters.endpoint, parameters.token).search(
        parameters.text, sort=parameters.sort, tags=parameters.tags, limit=parameters.limit
    )
