"""Where a file's bytes come from: the hub's address, the store it redirects to, and who may see the token."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from urllib.parse import quote, urljoin, urlsplit

import msgspec
import urllib3

from app.core.errors import ErrorKind, WeftError

MAX_REDIRECTS = 5


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a repository at a commit, as the hub's tree lists it.

    Attributes:
        repo, commit, path: what it is. size: bytes. sha256: hex for LFS files, else "". git_oid: hex of the git blob.
    """

    repo: str
    commit: str
    path: str
    size: int
    sha256: str = ""
    git_oid: str = ""

    def url(self, endpoint: str) -> str:
        """The hub's address of this file at this commit."""
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{quote(self.commit, safe='')}/{quote(self.path)}"


class HttpTrouble(Exception):
    """An answer that was not the file. `status` is 0 when there was no answer at all."""

    def __init__(self, status: int, words: str, *, code: str = "", retry_after: str = "", retry: bool = False) -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code
        self.retry_after, self.retry = retry_after, retry


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Where to fetch from now, and what the hub says the file is (size -1 and etag "" when it does not)."""

    url: str
    etag: str
    size: int
    with_token: bool


class HttpSource:
    """Opens byte ranges of hub files. One per child process; thread-safe.

    The token goes to the hub's own host and to no other on a redirect, and never from https to http.
    """

    def __init__(self, endpoint: str, token: str = "", proxy: str = "", timeout: float = 20.0) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        context = ssl.create_default_context()
        settings = {"ssl_context": context, "maxsize": 16, "timeout": urllib3.Timeout(connect=timeout, read=timeout)}
        self._pool = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
        self._located: dict[str, Located] = {}
        self._lock = threading.Lock()

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
            response.release_conn()
            etag = _bare(response.headers.get("X-Linked-ETag", "")) or etag
            size = int(response.headers.get("X-Linked-Size", size))
            if response.status in (301, 302, 303, 307, 308):
                here, with_token = self._next(here, response.headers.get("Location", ""), with_token)
                if urlsplit(here).netloc != urlsplit(url).netloc and etag:
                    break  # the store; asking it too would cost a round trip and tell nothing more
                continue
            if response.status >= 400:
                raise _trouble(response)
            etag = etag or _bare(response.headers.get("ETag", ""))
            size = size if size >= 0 else int(response.headers.get("Content-Length", -1))
            break
        else:
            raise HttpTrouble(0, "The hub redirects in a circle.")
        located = Located(url=here, etag=etag, size=size, with_token=with_token)
        with self._lock:
            self._located[url] = located
        return located

    def open(self, file: RemoteFile, start: int, end: int, store_etag: str) -> tuple[urllib3.BaseHTTPResponse, str]:
        """Open bytes [start, end) of a file. Returns the response and the store's own ETag.

        Raises:
            HttpTrouble: not the bytes asked for; status 200 when the server ignores ranges and start is not 0,
                412 when the store's ETag is another one than before.
        """
        located = self.locate(file)
        headers = {"Range": f"bytes={start}-{end - 1}"} if (start, end) != (0, file.size) else {}
        if headers and store_etag:
            headers["If-Range"] = store_etag
        response = self._request("GET", located.url, headers, located.with_token)
        tag = response.headers.get("ETag", "")
        if store_etag and tag and tag != store_etag:
            response.close()
            raise HttpTrouble(412, "The file changed on the hub while it was being fetched.", retry=True)
        if response.status == 206:
            given = response.headers.get("Content-Range", "")
            if not given.replace(" ", "").startswith(f"bytes{start}-{end - 1}/"):
                response.close()
                raise HttpTrouble(0, f"The server sent the range {given!r} instead of {start}-{end - 1}.", retry=True)
            return response, tag
        if response.status == 200 and headers:
            response.close()
            raise HttpTrouble(200, "The server ignores ranges.")
        if response.status == 200:
            return response, tag
        trouble = _trouble(response)
        response.close()
        if trouble.status in (301, 302, 303, 307, 308, 401, 403, 404, 410) and located.url != file.url(self.endpoint):
            self.locate(file, again=True)  # the signed address has expired: the hub tells what is really wrong
            trouble.retry = True
        raise trouble

    def _request(self, method: str, url: str, headers: Mapping[str, str], with_token: bool) -> urllib3.BaseHTTPResponse:
        sent = {"User-Agent": "weft", "Accept-Encoding": "identity", **headers}
        if with_token and self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            return self._pool.request(
                method, url, headers=sent, preload_content=False, decode_content=False, redirect=False, retries=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise connection_trouble(error) from error

    def _next(self, here: str, location: str, with_token: bool) -> tuple[str, bool]:
        target = urljoin(here, location)
        old, new = urlsplit(here), urlsplit(target)
        if not location or new.scheme not in ("http", "https"):
            raise WeftError(
                ErrorKind.HOSTILE,
                "The hub redirects to something that is not a web address.",
                "Check the hub endpoint in Settings.",
            )
        if old.scheme == "https" and new.scheme == "http":
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The hub redirects from https to plain http ({new.netloc}).",
                "Check the hub endpoint in Settings; nothing was fetched.",
            )
        return target, with_token and (old.scheme, old.netloc) == (new.scheme, new.netloc)


def connection_trouble(error: Exception) -> HttpTrouble:
    """A failed connection in words that say which part failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return HttpTrouble(0, f"The secure connection failed: {cause.reason or cause}.", code="tls")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, urllib3.exceptions.ProxyError):
        return HttpTrouble(0, "The proxy could not be reached or refused.", code="proxy", retry=True)
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return HttpTrouble(0, "The server stopped answering.", code="stalled", retry=True)
    return HttpTrouble(0, "The connection failed.", code="offline", retry=True)


def _trouble(response: urllib3.BaseHTTPResponse) -> HttpTrouble:
    status = response.status
    return HttpTrouble(
        status,
        response.headers.get("X-Error-Message", "") or f"The server answered {status} {response.reason or ''}".strip(),
        code=response.headers.get("X-Error-Code", ""),
        retry_after=response.headers.get("Retry-After", ""),
        retry=status in (408, 425, 429) or status >= 500,
    )


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
