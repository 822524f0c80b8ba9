"""Ask the hub which files a repository has, and look which of them lie on this machine already."""

from __future__ import annotations

from pathlib import Path

import msgspec

from app.engine.report import HostReport
from app.hub.asking import connect
from app.hub.files import Listing
from app.hub.local_copies import find_copies
from app.hub.reference import HubReference


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """Which repository, and where to look for copies.

    Attributes:
        roots: folders of the library, and the Hugging Face cache.
        except_in: folder whose files are no copies: where the download goes.
    """

    reference: HubReference
    roots: tuple[str, ...] = ()
    except_in: str = ""
    endpoint: str = ""
    proxy: str = ""
    token: str = ""


def run(parameters: Parameters, report: HostReport) -> Listing:
    """The files. Raises WeftError, see `Hub.list_files`."""
    hub = connect(parameters.endpoint, parameters.proxy, parameters.token, report, "Asking the hub")
    listing = hub.list_files(parameters.reference)
    own = Path(parameters.except_in) if parameters.except_in else Path("/nowhere")
    copies = find_copies(listing.files, [Path(root) for root in parameters.roots], own)
    return msgspec.structs.replace(listing, here=copies)
