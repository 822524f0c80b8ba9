"""How huggingface_hub asks: through which proxy, with whose certificates, where the token may go, and when it gives up.

huggingface_hub and httpx2 are imported inside functions: they are slow to import, and the former reads its settings when it is.
"""

from __future__ import annotations

import math
import os
from typing import Any
from urllib.parse import urlsplit

from app.core.errors import ErrorKind, WeftError
from app.hub.limits import retry_delay
from app.hub.proxies import check_proxy, proxy_error, proxy_for
from app.hub.source import MAX_REDIRECTS, PROXY_LOGIN, tls_context

TIMEOUT = 20.0  # seconds without an answer


class Busy(Exception):
    """The hub wants to be asked later."""

    def __init__(self, status: int, retry_after: str, date: str) -> None:
        super().__init__(f"status {status}")
        self.status, self.retry_after, self.date = status, retry_after, date


class Unreachable(Exception):
    """The connection failed; its cause says how."""


def configure(endpoint: str = "", proxy: str = "", timeout: float = TIMEOUT) -> None:
    """Set what huggingface_hub reads at import, and how it connects. Call once, before anything else of it.

    Args:
        proxy: for every address; "" takes what the system or the environment says for each.
        timeout: seconds without an answer.

    Raises:
        WeftError: BAD_INPUT for an endpoint or a proxy that is no address, UNSUPPORTED for a proxy that is not http.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    os.environ.pop("HF_HUB_OFFLINE", None)  # whoever asks the hub something wants an answer
    check_endpoint(endpoint or os.environ.get("HF_ENDPOINT", ""))
    import httpx2
    from huggingface_hub import constants, set_client_factory

    address = endpoint or constants.ENDPOINT
    if through := proxy_for(address, proxy):
        check_proxy(through)
    home = httpx2.URL(address)

    def keep_token(request: httpx2.Request) -> None:
        # Before every request, also after redirects and for the address of a list's next page, which the server names.
        if (request.url.scheme, request.url.host, request.url.port) != (home.scheme, home.host, home.port):
            request.headers.pop("Authorization", None)

    def look(response: httpx2.Response) -> None:
        here = response.request.url
        there = here.join(response.headers["Location"]) if response.has_redirect_location else here
        if here.scheme == "https" != there.scheme:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The hub redirects from https to plain http ({there.host}).",
                "Check the hub endpoint in Settings; nothing was fetched.",
            )
        # Uploads are huggingface_hub's own to repeat: it puts a file back to its beginning first, or to that of a part.
        if (response.status_code == 429 or response.status_code >= 500) and response.request.method != "PUT":
            # Before huggingface_hub does its own waiting, of which nobody would hear.
            headers = response.headers
            raise Busy(response.status_code, headers.get("Retry-After", ""), headers.get("Date", ""))

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **named: Any) -> httpx2.Response:
            try:
                return super().send(request, **named)
            except httpx2.TransportError as error:
                if request.method == "PUT":
                    raise
                # Under another name: huggingface_hub tries some of its questions again for half a minute, in silence.
                raise Unreachable(type(error).__name__) from error

    def client() -> httpx2.Client:
        return Client(
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=timeout,
            transport=_ways(proxy),
            trust_env=False,  # the proxy is chosen for each address, as for the files' bytes
            event_hooks={"request": [keep_token], "response": [look]},
        )

    set_client_factory(client)


def _ways(chosen: str) -> Any:
    """A transport that chooses the proxy for each address, as it is done for the files' bytes."""
    import httpx2

    context = tls_context()
    ways: dict[str, httpx2.HTTPTransport] = {}

    class Ways(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            proxy = proxy_for(str(request.url), chosen)
            way = ways.get(proxy)
            if way is None:
                if proxy:
                    check_proxy(proxy)
                own = context if proxy.startswith("https:") else None  # of the connection to the proxy itself
                through = httpx2.Proxy(proxy, ssl_context=own) if proxy else None
                made = httpx2.HTTPTransport(verify=context, trust_env=False, proxy=through)
                way = ways.setdefault(proxy, made)  # another thread may have been faster
            try:
                return way.handle_request(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if proxy and "ssl" not in repr(error).lower() and "certificate" not in str(error).lower():
                    # It is the proxy that was called; nothing else in the error says so.
                    raise httpx2.ProxyError(str(error), request=request) from error
                raise

        def close(self) -> None:
            for way in ways.values():
                way.close()

    return Ways()


def check_endpoint(endpoint: str) -> None:
    """Refuse an endpoint that is no web address. "" is the public hub.

    Raises:
        WeftError: BAD_INPUT.
    """
    try:
        url = urlsplit(endpoint)
        sound = not endpoint or (url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0)
    except ValueError:
        sound = False
    if not sound:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The hub endpoint {endpoint[:200]!r} is not an address.",
            "Write it as https://hub.example, in Settings or in HF_ENDPOINT; leave it empty for the public hub.",
        )


def busy_error(busy: Busy) -> WeftError:
    """What a person is told when the hub stays busy."""
    if busy.status != 429:
        return WeftError(
            ErrorKind.NETWORK, f"The hub has trouble (it answered {busy.status}).", "Try again in a few minutes."
        )
    seconds = retry_delay(0, busy.retry_after, busy.date)
    wait = f" It says to wait {math.ceil(seconds / 60)} minutes." if seconds > 60 else ""
    return WeftError(
        ErrorKind.NETWORK, f"The hub asks to slow down.{wait}", "Try again later; a token in Settings raises the limit."
    )


def connection_error(error: Exception, endpoint: str) -> WeftError:
    """A question that had no answer, in words that say which part failed."""
    chain, cause = "", error
    while cause is not None:
        chain += f" {type(cause).__name__} {cause}"
        cause = cause.__cause__ or cause.__context__
    said = chain.lower()
    wants_login = getattr(getattr(error, "response", None), "status_code", 0) == PROXY_LOGIN
    if wants_login or "proxyerror" in said:
        return proxy_error(wants_login or f" {PROXY_LOGIN} " in f"{chain} ")
    if "ssl" in said or "certificate" in said:
        # OpenSSL's own words: "… certificate verify failed: unable to get local issuer certificate (_ssl.c:1006)".
        why = chain.rpartition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        return WeftError(
            ErrorKind.NETWORK,
            f"The certificate of {endpoint} is not valid: {why}."
            if "certificate verify failed: " in chain
            else f"The secure connection to {endpoint} failed.",
            "Check the date of this computer and the certificates of your proxy.",
        )
    if "toomanyredirects" in said:
        return WeftError(
            ErrorKind.NETWORK,
            "The hub redirects in a circle.",
            "Check the hub endpoint in Settings, and try again later.",
        )
    return WeftError(ErrorKind.NETWORK, f"{endpoint} cannot be reached.", "Check the connection, then try again.")
