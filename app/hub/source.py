"""Where a file's bytes come from: the hub's address, the store it redirects to, and who may see the token."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import msgspec
import urllib3

from app.core.errors import ErrorKind, WeftError
from app.hub.files import RemoteFile
from app.hub.proxies import make_pool, proxy_for

MAX_REDIRECTS = 5
PROXY_LOGIN = 407  # what a proxy answers whoever has not said who he is
PROXY_WORDS = "The proxy could not be reached or refused."
REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_NUMBER = re.compile(r"[0-9]{1,19}")


class HttpTrouble(Exception):
    """An answer that was not the file. `status` is 0 when there was no answer at all."""

    def __init__(
        self, status: int, words: str, *, code: str = "", retry_after: str = "", date: str = "", retry: bool = False
    ) -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code
        self.retry_after, self.date, self.retry = retry_after, date, retry


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Where to fetch from now, and what the hub says the file is (size -1 and etag "" when it does not)."""

    url: str
    etag: str
    size: int
    with_token: bool


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """An answer whose body is bytes [start, end) of the file; `etag` is the store's own, as it wrote it."""

    response: urllib3.BaseHTTPResponse
    etag: str
    end: int


class HttpSource:
    """Opens byte ranges of hub files. One per child process; thread-safe.

    The token goes to the hub's own host and to no other on a redirect, and never from https to http.

    Args:
        proxy: for every address; "" takes what the system or the environment says for each.
        timeout: seconds without a byte after which a connection counts as dead.
    """

    def __init__(self, endpoint: str, token: str = "", proxy: str = "", timeout: float = 20.0) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self._proxy = proxy
        self._timeout = urllib3.Timeout(connect=timeout, read=timeout)
        self._context = tls_context()
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._located: dict[str, Located] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.clear()

    def locate(self, file: RemoteFile, *, again: bool = False) -> Located:
        """Follow the hub's redirects to where the bytes lie. Kept until `again` (signed addresses expire).

        Raises:
            HttpTrouble: the hub or its store said no. WeftError: HOSTILE redirect.
        """
        url = file.url(self.endpoint)
        with self._lock:
            if not again and url in self._located:
                return self._located[url]
        etag, size, here, with_token = "", -1, url, True
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request("HEAD", here, {}, with_token)
            response.drain_conn()
            response.release_conn()
            etag = _bare(response.headers.get("X-Linked-ETag", "")) or etag
            size = _number(response.headers.get("X-Linked-Size", ""), size)
            if response.status in REDIRECTS:
                here, with_token = self._next(here, response.headers.get("Location", ""), with_token)
                if urlsplit(here).netloc != urlsplit(url).netloc and etag:
                    break  # the store; asking it too would cost a round trip and tell nothing more
                continue
            if response.status >= 400:
                raise _trouble(response)
            etag = etag or _bare(response.headers.get("ETag", ""))
            size = size if size >= 0 else _number(response.headers.get("Content-Length", ""), -1)
            break
        else:
            raise _circle()
        located = Located(url=here, etag=etag, size=size, with_token=with_token)
        with self._lock:
            self._located[url] = located
        return located

    def open(self, file: RemoteFile, start: int, end: int, store_etag: str = "") -> Opened:
        """Open bytes [start, end) of a file; the answer may end earlier, never later.

        Args:
            store_etag: what an earlier answer for this file carried: bytes of another version are refused.

        Raises:
            HttpTrouble: not the bytes asked for; status 200 when the server ignores ranges and part of the file was asked for,
                412 when the file is another one than before.
            WeftError: HOSTILE redirect.
        """
        located = self.locate(file)
        headers = {"Range": f"bytes={start}-{end - 1}"} if (start, end) != (0, file.size) else {}
        if (
            headers and store_etag and not store_etag.startswith("W/")
        ):  # a weak tag may not be used here (RFC 9110, 13.1.5)
            headers["If-Range"] = store_etag
        response = self._follow(located, headers)
        try:
            return self._checked(response, file, start, end, store_etag, bool(headers))
        except HttpTrouble as trouble:
            response.close()
            if trouble.status in (401, 403, 404, 410) and located.url != file.url(self.endpoint):
                self.locate(file, again=True)  # the signed address has expired: the hub tells what is really wrong
                trouble.retry = True
            raise

    def _follow(self, located: Located, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        here, with_token = located.url, located.with_token
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request("GET", here, headers, with_token)
            if response.status not in REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.close()
            here, with_token = self._next(here, location, with_token)
        raise _circle()

    def _checked(
        self, response: urllib3.BaseHTTPResponse, file: RemoteFile, start: int, end: int, store_etag: str, ranged: bool
    ) -> Opened:
        if response.status not in (200, 206):
            raise _trouble(response)
        tag = response.headers.get("ETag", "")
        if store_etag and tag and tag != store_etag:
            raise HttpTrouble(412, "The file changed on the hub while it was being fetched.")
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise HttpTrouble(0, "The server sends the file in another encoding than it was asked for.", retry=True)
        if response.status == 200:
            length = _number(response.headers.get("Content-Length", ""), file.size)
            if length != file.size:
                # A log-in page of a hotel's network, for one: no reason to throw away what has arrived.
                words = f"The server sent {length:,} bytes of something else than the file."
                raise HttpTrouble(0, words, code="else", retry=True)
            if ranged:
                raise HttpTrouble(200, "The server ignores ranges.")
            return Opened(response=response, etag=tag, end=file.size)
        given = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if given is None or int(given[1]) != start or not start < int(given[2]) + 1 <= end:
            words = (
                f"The server sent the range {response.headers.get('Content-Range', '')!r} instead of {start}-{end - 1}."
            )
            raise HttpTrouble(0, words, retry=True)
        if given[3] != "*" and int(given[3]) != file.size:
            raise HttpTrouble(412, "The file has another size on the hub than before.")
        return Opened(response=response, etag=tag, end=int(given[2]) + 1)

    def _request(self, method: str, url: str, headers: Mapping[str, str], with_token: bool) -> urllib3.BaseHTTPResponse:
        sent = {"User-Agent": "weft", "Accept-Encoding": "identity", **headers}
        if with_token and self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            return self._pool(url).request(
                method, url, headers=sent, preload_content=False, decode_content=False, redirect=False, retries=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise connection_trouble(error) from error
        except ValueError:  # what cannot be a header; its text may hold the token, so it goes no further
            raise WeftError(
                ErrorKind.BAD_INPUT, "The hub token or an address has characters that it cannot have.", "Enter it anew."
            ) from None

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_for(url, self._proxy)
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = make_pool(proxy, self._context, self._timeout)
            return self._pools[proxy]

    def _next(self, here: str, location: str, with_token: bool) -> tuple[str, bool]:
        old = new = urlsplit("")
        target = ""
        try:
            target = urljoin(here, location)
            old, new = urlsplit(here), urlsplit(target)
            sound = bool(location) and new.scheme in ("http", "https") and bool(new.hostname) and new.port != 0
        except ValueError:  # brackets, a port that is no number
            sound = False
        if not sound:
            raise WeftError(
                ErrorKind.HOSTILE,
                "The hub redirects to something that is not a web address.",
                "Check the hub endpoint in Settings.",
            )
        if old.scheme == "https" and new.scheme == "http":
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The hub redirects from https to plain http ({new.hostname}).",
                "Check the hub endpoint in Settings; nothing was fetched.",
            )
        return target, with_token and (old.scheme, old.netloc) == (new.scheme, new.netloc)


def tls_context() -> ssl.SSLContext:
    """The system's certificates, and those that the usual variables name."""
    context = ssl.create_default_context()
    if sys.platform == "darwin" and not context.cert_store_stats()["x509_ca"]:
        # An interpreter that brings its own OpenSSL there has no certificates; the system's keychain has.
        with contextlib.suppress(ImportError):
            import truststore

            context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = os.environ.get(name, "")
        if bundle and Path(bundle).is_file():
            context.load_verify_locations(bundle)
    return context


def connection_trouble(error: Exception) -> HttpTrouble:
    """A failed connection in words that say which part failed."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "original_error", None) or cause.__cause__ or cause.__context__
    if any(isinstance(link, urllib3.exceptions.ProxyError) for link in chain):
        login = any(f" {PROXY_LOGIN} " in f"{link} " for link in chain)  # in words alone: the tunnel was not made
        return HttpTrouble(PROXY_LOGIN if login else 0, PROXY_WORDS, code="proxy", retry=not login)
    for link in chain:
        if isinstance(link, ssl.SSLCertVerificationError):
            return HttpTrouble(0, f"The server's certificate is not valid: {link.verify_message}.", code="tls")
    if any(isinstance(link, ssl.SSLError) for link in chain):  # not of the certificate: lines that cut do this too
        return HttpTrouble(0, "The secure connection failed.", code="tls", retry=True)
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return HttpTrouble(0, "The server stopped answering.", code="stalled", retry=True)
    return HttpTrouble(0, "The connection failed.", code="offline", retry=True)


def _circle() -> HttpTrouble:
    return HttpTrouble(0, "The hub redirects in a circle.", code="circle")


def _trouble(response: urllib3.BaseHTTPResponse) -> HttpTrouble:
    status = response.status
    said = response.headers.get("X-Error-Message", "")
    answer = f"The server answered {status} {response.reason or ''}".strip()
    return HttpTrouble(
        status,
        f"{answer}: {said}" if said and status >= 500 else said or answer,
        code="proxy" if status == PROXY_LOGIN else response.headers.get("X-Error-Code", ""),
        retry_after=response.headers.get("Retry-After", ""),
        date=response.headers.get("Date", ""),
        retry=status in (408, 425, 429) or status >= 500,
    )


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _number(text: str, otherwise: int) -> int:
    return int(text) if _NUMBER.fullmatch(text) else otherwise
