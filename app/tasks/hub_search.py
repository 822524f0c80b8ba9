"""Search the hub."""

from __future__ import annotations

import msgspec

from app.engine.report import HostReport
from app.hub.asking import connect
from app.hub.files import SearchHit


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
    hub = connect(parameters.endpoint, parameters.proxy, parameters.token, report, "Searching the hub")
    return hub.search(parameters.text, sort=parameters.sort, tags=parameters.tags, limit=parameters.limit)
