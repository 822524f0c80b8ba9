"""The hub token: in the system's keyring, or in memory for this session where there is none. Nowhere else.

keyring is slow to import and may ask the user to unlock something: call `get` and `set` outside the window's thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Literal
from urllib.parse import urlsplit

from app.core.errors import ErrorKind, WeftError

_SERVICE = "weft hub token"
PUBLIC_HUB = "https://huggingface.co"

Where = Literal["", "session", "keyring", "environment"]


class TokenStore:
    """Tokens by hub. One made for a hub is never given for another. Thread-safe."""

    def __init__(self) -> None:
        self._session: dict[str, str] = {}
        self._lock = threading.Lock()

    def get(self, endpoint: str = "") -> tuple[str, Where]:
        """The token for a hub and where it comes from; two empty strings when there is none.

        HF_TOKEN in the environment counts as well, for the hub that the environment means: whoever set it wants it used.
        """
        hub = hub_name(endpoint)
        with self._lock:
            if hub in self._session:
                return self._session[hub], "session"
        with contextlib.suppress(Exception):  # no keyring, a locked one, a broken one: as if there were no token
            import keyring

            if (found := keyring.get_password(_SERVICE, hub)) and _sound(found):
                return found, "keyring"
        # What cannot be a token is passed over: as a header it would only end in an error that spells it out.
        if hub == hub_name("") and (found := os.environ.get("HF_TOKEN", "").strip()) and _sound(found):
            return found, "environment"
        return "", ""

    def set(self, token: str, endpoint: str = "") -> Where:
        """Keep a token; "" forgets it. Returns where it is kept: `session` when this machine has no keyring.

        Raises:
            WeftError: BAD_INPUT for what cannot be a token; PERMISSION when the keyring will not forget one.
        """
        token = token.strip()
        if token and not _sound(token):
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "That is not a hub token.",
                "Copy it from the access tokens of your hub account; it begins with hf_.",
            )
        hub = hub_name(endpoint)
        with self._lock:
            self._session.pop(hub, None)
        try:
            import keyring
            import keyring.errors

            if token:
                keyring.set_password(_SERVICE, hub, token)
                return "keyring"
            with contextlib.suppress(keyring.errors.PasswordDeleteError):
                keyring.delete_password(_SERVICE, hub)
            return ""
        except Exception as error:  # noqa: BLE001  (keyring's backends raise what they like; the session still serves, and says so)
            if not token:
                if type(error).__name__ in ("NoKeyringError", "ModuleNotFoundError"):
                    return ""  # there is none that could hold it
                raise WeftError(
                    ErrorKind.PERMISSION,
                    "The system's keyring did not let go of the token.",
                    f"Unlock the keyring and try again, or delete {_SERVICE!r} in its own program.",
                ) from None
            with self._lock:
                self._session[hub] = token
            return "session"


def _sound(token: str) -> bool:
    return 0 < len(token) <= 1000 and all(32 < ord(character) < 127 for character in token)


def hub_name(endpoint: str) -> str:
    """What a hub's token is filed under: scheme and host of the endpoint in use."""
    url = urlsplit(endpoint or os.environ.get("HF_ENDPOINT", "") or PUBLIC_HUB)
    return f"{url.scheme or 'https'}://{url.netloc or url.path}".lower().rstrip("/")
