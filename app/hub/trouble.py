"""What the hub's file servers answered, in words that say what to do next."""

from __future__ import annotations

from app.core.errors import ErrorKind, WeftError
from app.hub.files import RemoteFile
from app.hub.proxies import proxy_error
from app.hub.source import PROXY_LOGIN, HttpTrouble


def stopped() -> WeftError:
    """The user stopped it."""
    return WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")


def trouble_error(trouble: HttpTrouble, file: RemoteFile, endpoint: str) -> WeftError:
    """The failure that a person is shown."""
    name, page = file.repo, f"{endpoint}/{file.repo}"
    if trouble.code == "proxy":
        return proxy_error(trouble.status == PROXY_LOGIN)
    if trouble.code == "GatedRepo":
        return gated_error(name, page, trouble.words, has_token=trouble.status != 401)
    if trouble.code == "RepoNotFound":
        return WeftError(
            ErrorKind.NOT_FOUND,
            f"{name} is no longer on the hub, or it is private.",
            "Check its page, and the token in Settings (or HF_TOKEN) if it is yours.",
        )
    if trouble.code == "RevisionNotFound":
        return WeftError(
            ErrorKind.NOT_FOUND, f"{name} no longer has the version {file.commit[:12]}.", "Get the file list again."
        )
    if trouble.status in (401, 403):
        return WeftError(
            ErrorKind.PERMISSION,
            f"The hub refuses {file.path}: {trouble.words}",
            "Check the token in Settings (or HF_TOKEN).",
        )
    if trouble.status in (404, 410):
        return WeftError(
            ErrorKind.NOT_FOUND, f"{file.path} is not (or no longer) in {name}.", "Get the file list again."
        )
    if trouble.status == 429:
        return WeftError(
            ErrorKind.NETWORK,
            "The hub keeps asking to slow down.",
            "Resume later; a token in Settings (or HF_TOKEN) raises the limit.",
        )
    if trouble.code == "tls":
        return WeftError(
            ErrorKind.NETWORK, trouble.words, "Check the date of this computer and the certificates of your proxy."
        )
    if trouble.code == "circle":
        return WeftError(ErrorKind.NETWORK, trouble.words, "Check the hub endpoint in Settings, and try again later.")
    return WeftError(
        ErrorKind.NETWORK,
        f"{file.path}: {trouble.words}",
        "Check the connection, then resume: what has arrived is kept.",
    )


def gated_error(name: str, page: str, words: str, *, has_token: bool) -> WeftError:
    """Which it is: no token, licence not accepted, not answered yet, or denied. `page` is the address that helps."""
    if not has_token:
        return WeftError(
            ErrorKind.PERMISSION,
            f"{name} is gated, and no token is set.",
            f"Accept its licence at {page}, make a read token in your hub account, and enter it in Settings (or set HF_TOKEN).",
        )
    if "reject" in words.lower() or "denied" in words.lower():
        return WeftError(
            ErrorKind.PERMISSION,
            f"The authors of {name} denied your request.",
            f"See {page}, or use another model.",
        )
    if "awaiting" in words.lower() or "pending" in words.lower():
        return WeftError(
            ErrorKind.PERMISSION,
            f"Your request to use {name} still waits for its authors.",
            f"See {page}, and try again when they have answered.",
        )
    return WeftError(
        ErrorKind.PERMISSION,
        f"{name} is gated, and its licence is not accepted yet.",
        f"Accept it at {page}, then try again.",
    )
