"""What the hub has: search, the files of a repository, who may have them. Through huggingface_hub; runs in a child process.

huggingface_hub is imported inside functions: it is slow to import, and it reads its settings when it is.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.hub.files import Listing, RemoteFile, SearchHit
from app.hub.reference import HubReference, check_file_path, parse_reference
from app.hub.selection import is_adapter
from app.hub.source import proxy_for, tls_context
from app.hub.trouble import gated_error

TIMEOUT = 20.0  # seconds without an answer
MAX_FILES = 100_000


def configure(endpoint: str = "", proxy: str = "") -> None:
    """Set what huggingface_hub reads at import, and how it connects. Call once, before anything else here."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    os.environ.pop("HF_HUB_OFFLINE", None)  # whoever asks the hub something wants an answer
    import httpx2
    from huggingface_hub import constants, set_client_factory

    address = endpoint or constants.ENDPOINT
    chosen = proxy_for(address, proxy)

    def client() -> httpx2.Client:
        return httpx2.Client(
            follow_redirects=True,
            timeout=TIMEOUT,
            proxy=chosen or None,
            trust_env=False,  # the proxy is chosen above, as for the files' bytes
            verify=tls_context(),
        )

    set_client_factory(client)


class Hub:
    """One hub with one token. Every method raises WeftError in words; none is retried here.

    Args:
        endpoint: the hub's address; "" is what the environment (HF_ENDPOINT) or the library says.
    """

    def __init__(self, endpoint: str = "", token: str = "") -> None:
        from huggingface_hub import HfApi

        # token False: never one that lies somewhere on this machine
        self._api = HfApi(endpoint=endpoint or None, token=token or False, library_name="weft")
        self._has_token = bool(token)
        self.endpoint: str = self._api.endpoint

    def list_files(self, reference: HubReference) -> Listing:
        """The files of a repository, with their sizes and checksums.

        Raises:
            WeftError: NOT_FOUND with near names (repository or revision); PERMISSION when it is gated, private or denied;
                NETWORK; HOSTILE when a file's name would leave the target folder.
        """
        try:
            info: Any = self._api.model_info(reference.repo, revision=reference.revision or None)
            entries = list(self._api.list_repo_tree(reference.repo, revision=info.sha, recursive=True))
        except Exception as error:
            raise self._explained(error, reference) from error
        files: list[RemoteFile] = []
        if len(entries) > MAX_FILES:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{reference.repo} lists more than {MAX_FILES:,} files.",
                "That is no model; choose another repository.",
            )
        # What it says of itself goes into paths and addresses: it must be of the form that a person may type.
        repo, commit = parse_reference(str(info.id)).repo, parse_reference(f"a/b@{info.sha}").revision
        for entry in entries:
            size = getattr(entry, "size", None)
            if size is None:
                continue  # a folder
            check_file_path(entry.path)
            lfs = getattr(entry, "lfs", None)
            files.append(
                RemoteFile(
                    repo=repo,
                    commit=commit,
                    path=entry.path,
                    size=size,
                    sha256=lfs.sha256 if lfs else "",
                    git_oid="" if lfs else str(getattr(entry, "blob_id", "")),
                )
            )
        return Listing(
            endpoint=self.endpoint,
            repo=repo,
            revision=reference.revision or "main",
            commit=commit,
            files=tuple(files),
            kind="adapter" if is_adapter(files) else "model",
            gated=bool(info.gated),
            tags=tuple(info.tags or ()),
        )

    def search(
        self, text: str, *, sort: str = "downloads", tags: tuple[str, ...] = (), limit: int = 50
    ) -> list[SearchHit]:
        """Repositories whose name matches, best first.

        Args:
            sort: downloads, likes, last_modified, created_at or trending_score. tags: all must match (`gguf`, `lora`, …).
        """
        try:
            found: list[Any] = list(
                self._api.list_models(search=text, sort=sort, filter=list(tags) or None, limit=limit)  # pyright: ignore[reportArgumentType]
            )
        except Exception as error:
            raise self._explained(error, None) from error
        return [
            SearchHit(
                repo=hit.id,
                downloads=hit.downloads or 0,
                likes=hit.likes or 0,
                modified=hit.last_modified.isoformat() if hit.last_modified else "",
                gated=bool(hit.gated),
                tags=tuple(hit.tags or ()),
            )
            for hit in found
        ]

    def user(self) -> str:
        """Whose token it is. Raises WeftError PERMISSION when the hub does not know it."""
        try:
            return str(self._api.whoami()["name"])
        except Exception as error:
            raise self._explained(error, None) from error

    # Trouble in words -------------------------------------------------------------------------------

    def _explained(self, error: Exception, reference: HubReference | None) -> WeftError:
        from huggingface_hub import errors

        name = reference.repo if reference else "the hub"
        page = f"{self.endpoint}/{reference.repo}" if reference else self.endpoint
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", 0)
        if isinstance(error, errors.GatedRepoError):
            words = str(response.headers.get("X-Error-Message", "")) if response is not None else ""
            return gated_error(name, page, words, has_token=self._has_token)
        if isinstance(error, errors.RevisionNotFoundError) and reference:
            return self._no_revision(reference)
        if isinstance(error, errors.RepositoryNotFoundError) and reference:
            return self._no_repository(reference)
        if status in (401, 403):
            return WeftError(
                ErrorKind.PERMISSION,
                f"The hub refuses {name}: the token is not valid or may not read it.",
                "Make a read token in your hub account and enter it in Settings.",
            )
        if status == 429:
            wait = response.headers.get("Retry-After", "") if response is not None else ""
            return WeftError(
                ErrorKind.NETWORK,
                "The hub asks to slow down." + (f" It says to wait {wait} seconds." if wait else ""),
                "Try again later; a token in Settings raises the limit.",
            )
        if status >= 500:
            return WeftError(
                ErrorKind.NETWORK, f"The hub has trouble (it answered {status}).", "Try again in a few minutes."
            )
        return _connection_error(error, self.endpoint)

    def _no_revision(self, reference: HubReference) -> WeftError:
        try:
            refs = self._api.list_repo_refs(reference.repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        except Exception:  # noqa: BLE001  (the first error is what matters; without names the hint is shorter)
            names = []
        close = difflib.get_close_matches(reference.revision, names, n=3) or names[:5]
        hint = f"It has: {', '.join(close)}." if close else "Leave the branch away to get the default one."
        return WeftError(
            ErrorKind.NOT_FOUND, f"{reference.repo} has no branch, tag or commit {reference.revision!r}.", hint
        )

    def _near(self, reference: HubReference) -> list[str]:
        """Names that may be meant: what is called alike, and what the same user has."""
        user, _, name = reference.repo.partition("/")
        longest = max(re.split(r"[-_.]", name), key=len)
        found: list[str] = []
        for query in ({"search": name}, {"author": user}, {"search": longest}):
            try:
                found += [hit.id for hit in self._api.list_models(limit=20, **query)]  # pyright: ignore[reportArgumentType]
            except Exception:  # noqa: BLE001  (the first error is what matters; without names the hint is shorter)
                break
        return found

    def _no_repository(self, reference: HubReference) -> WeftError:
        near = self._near(reference)
        close = difflib.get_close_matches(reference.repo, near, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Check the spelling."
        if not self._has_token:
            hint += " If it is private, enter a token in Settings."
        return WeftError(ErrorKind.NOT_FOUND, f"There is no {reference.repo} on the hub.", hint)


def _connection_error(error: Exception, endpoint: str) -> WeftError:
    chain, cause = "", error
    while cause is not None:
        chain += f" {type(cause).__name__} {cause}"
        cause = cause.__cause__ or cause.__context__
    if "ssl" in chain.lower() or "certificate" in chain.lower():
        return WeftError(
            ErrorKind.NETWORK,
            f"The secure connection to {endpoint} failed.",
            "Check the date of this computer and the certificates of your proxy.",
        )
    if "proxy" in chain.lower():
        return WeftError(
            ErrorKind.NETWORK, "The proxy could not be reached or refused.", "Check the proxy in Settings."
        )
    if "offline" in chain.lower():
        return WeftError(
            ErrorKind.NETWORK, "Weft is told to stay offline (HF_HUB_OFFLINE).", "Unset it to use the hub."
        )
    return WeftError(ErrorKind.NETWORK, f"{endpoint} cannot be reached.", "Check the connection, then try again.")
