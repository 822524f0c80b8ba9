"""Ask the hub whose token this is, so that a wrong one is found when it is entered."""

from __future__ import annotations

import msgspec

from app.engine.report import HostReport
from app.hub.asking import connect


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """The token to try."""

    endpoint: str = ""
    proxy: str = ""
    token: str = ""


def run(parameters: Parameters, report: HostReport) -> str:
    """The user's name. Raises WeftError PERMISSION when the hub does not know the token."""
    hub = connect(parameters.endpoint, parameters.proxy, parameters.token, report, "Asking the hub")
    return hub.user()
