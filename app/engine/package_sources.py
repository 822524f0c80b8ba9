"""Where uv gets packages from: pip's configuration, handed on in uv's variables.

uv ignores pip's settings. Whoever has told pip about a mirror, a folder of wheels or a certificate has told Weft.
A variable of uv's own that is already set is never touched.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """uv's view of the world.

    Attributes:
        variables: environment variables to add for uv.
        find_links: folders and pages of wheels, uv's own or pip's.
        configured: somebody chose where packages come from, so that Weft must not choose a PyTorch build itself.
        pip_cache: pip's cache folder, or None.
    """

    variables: dict[str, str]
    find_links: tuple[str, ...] = ()
    configured: bool = False
    pip_cache: Path | None = None


def package_sources(environment: Mapping[str, str] | None = None) -> Sources:
    """Read pip's configuration and this process's environment. Takes about a second: pip is asked twice."""
    environment = os.environ if environment is None else environment
    return translate(parse_pip_config(_pip("config", "list")), environment, _pip("cache", "dir").strip())


def _pip(*arguments: str) -> str:
    """What pip prints; "" where there is no pip (an installed program brings only uv)."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def parse_pip_config(listing: str) -> dict[str, str]:
    """`pip config list`, by option. The environment goes before `[install]`, and that before `[global]`, as pip has it."""
    found: dict[str, tuple[int, str]] = {}
    rank = {"global": 0, "install": 1, ":env:": 2}
    for line in listing.splitlines():
        key, separator, quoted = line.partition("=")
        section, _, option = key.strip().rpartition(".")
        if not separator or section not in rank:
            continue
        try:
            value = ast.literal_eval(quoted.strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, str) and rank[section] >= found.get(option, (-1, ""))[0]:
            found[option] = (rank[section], value)
    return {option: value for option, (_, value) in found.items()}


def translate(pip: Mapping[str, str], environment: Mapping[str, str], pip_cache: str = "") -> Sources:
    """pip's options as uv's variables.

    Args:
        pip: option to value, as `parse_pip_config` gives it.
        environment: this process's variables; those of uv that are set there win.
        pip_cache: pip's cache folder, "" for none.
    """
    variables: dict[str, str] = {}

    def hand_on(option: str, variable: str, *others: str, separator: str = " ") -> None:
        words = pip.get(option, "").split()
        if words and not any(environment.get(name) for name in (variable, *others)):
            variables[variable] = separator.join(words)

    hand_on("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    hand_on("extra-index-url", "UV_INDEX", "UV_EXTRA_INDEX_URL")
    hand_on("find-links", "UV_FIND_LINKS", separator=",")
    hand_on("trusted-host", "UV_INSECURE_HOST")
    hand_on("cert", "SSL_CERT_FILE")
    hand_on("default-timeout", "UV_HTTP_TIMEOUT")
    hand_on("timeout", "UV_HTTP_TIMEOUT", "UV_REQUEST_TIMEOUT")
    hand_on("proxy", "ALL_PROXY", "HTTPS_PROXY", "https_proxy", "all_proxy")
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") and not environment.get("UV_NO_INDEX"):
        variables["UV_NO_INDEX"] = "1"
    if "UV_INDEX" in variables and not environment.get("UV_INDEX_STRATEGY"):
        # pip takes the best version that any index has; uv, left alone, looks no further than the first that knows the name.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    both = {**variables, **environment}
    find_links = tuple(part for part in both.get("UV_FIND_LINKS", "").split(",") if part)
    choices = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX", "UV_TORCH_BACKEND")
    return Sources(
        variables=variables,
        find_links=find_links,
        configured=bool(find_links) or any(both.get(name) for name in choices),
        pip_cache=Path(pip_cache) if pip_cache and Path(pip_cache).is_dir() else None,
    )


def cached_wheels(package: str, version: str, cache: Path | None) -> tuple[Path, ...]:
    """Folders of pip's cache that hold a wheel of this version which pip built on this machine before."""
    if cache is None:
        return ()
    stem = f"{package.replace('-', '_')}-{version}-"
    found = (cache / "wheels").glob(f"*/*/*/*/{stem}*.whl")
    return tuple(sorted({path.parent for path in found}))


def local_wheels(package: str, version: str, find_links: Sequence[str]) -> tuple[Path, ...]:
    """Wheels of this version in the local folders among `find_links`."""
    stem = f"{package.replace('-', '_')}-{version}-"
    folders = (Path(link.removeprefix("file://")) for link in find_links if "://" not in link or link.startswith("file://"))
    return tuple(sorted(path for folder in folders if folder.is_dir() for path in folder.glob(f"{stem}*.whl")))
