"""Which proxy an address goes through, and connections that do."""

from __future__ import annotations

import ipaddress
import os
import ssl
from contextlib import suppress
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from app.core.errors import ErrorKind, WeftError

_PORTS = {"http": 80, "https": 443}


def proxy_for(url: str, chosen: str = "") -> str:
    """The proxy for an address: the one chosen in the settings, else the environment's or the system's; "" for none.

    NO_PROXY holds for the latter two: names with what lies below them, also with a port, and networks (10.0.0.0/8).
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "127.0.0.1", "::1"):
        return ""
    if chosen:
        return chosen if "://" in chosen else f"http://{chosen}"
    if proxy_bypass(host) or proxy_bypass(f"{host}:{parts.port or _PORTS.get(parts.scheme, 0)}") or _near(host):
        return ""
    found = getproxies()
    proxy = found.get(parts.scheme) or found.get("all") or ""
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _near(host: str) -> bool:
    """Whether an address of numbers lies in one of the networks of NO_PROXY, which urllib does not know."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        for name in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(","):
            with suppress(ValueError):
                if "/" in name and address in ipaddress.ip_network(name.strip(), strict=False):
                    return True
    return False


def make_pool(proxy: str, context: ssl.SSLContext, timeout: urllib3.Timeout) -> urllib3.PoolManager:
    """Connections, through a proxy or straight.

    Raises:
        WeftError: UNSUPPORTED for a kind of proxy that Weft cannot speak to, BAD_INPUT for no address at all.
    """
    if not proxy:
        return urllib3.PoolManager(ssl_context=context, maxsize=16, timeout=timeout)
    check_proxy(proxy)
    parts = urlsplit(proxy)
    headers = urllib3.make_headers(
        proxy_basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    )
    try:
        return urllib3.ProxyManager(
            proxy, proxy_headers=headers, ssl_context=context, maxsize=16, timeout=timeout, proxy_ssl_context=context
        )
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise _no_address() from error


def check_proxy(proxy: str) -> None:
    """Refuse what is no http proxy.

    Raises:
        WeftError: UNSUPPORTED for a kind of proxy that Weft cannot speak to, BAD_INPUT for no address at all.
    """
    try:
        parts = urlsplit(proxy)
        sound = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise _no_address() from None
    if parts.scheme not in ("http", "https"):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"Weft cannot use a {parts.scheme} proxy.",
            "Enter the address of an http proxy in Settings (or in HTTPS_PROXY), such as http://proxy:3128.",
        )
    if not sound:
        raise _no_address()


def _no_address() -> WeftError:
    return WeftError(
        ErrorKind.BAD_INPUT,
        "The proxy in Settings (or in HTTPS_PROXY) is not an address.",
        "Write it as http://proxy:3128.",
    )


def proxy_error(wants_login: bool) -> WeftError:
    """The failure that a person is shown when the proxy is what is wrong."""
    if wants_login:
        return WeftError(
            ErrorKind.PERMISSION,
            "The proxy wants another user name and password.",
            "Write them into its address in Settings (or in HTTPS_PROXY): http://name:password@proxy:3128.",
        )
    return WeftError(
        ErrorKind.NETWORK,
        "The proxy could not be reached or refused.",
        "Check the proxy in Settings (or in HTTPS_PROXY).",
    )
