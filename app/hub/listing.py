"""What the hub has: search, the files of a repository, who may have them. Through huggingface_hub; runs in a child process.

huggingface_hub is imported inside functions: it is slow to import, and it reads its settings when it is.
"""

from __future__ import annotations

import difflib
import itertools
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from app.core.errors import ErrorKind, WeftError
from app.hub.files import Listing, RemoteFile, SearchHit
from app.hub.limits import retry_delay
from app.hub.questions import Busy, Unreachable, busy_error, connection_error
from app.hub.reference import HubReference, check_file_path, parse_reference
from app.hub.selection import is_adapter
from app.hub.trouble import gated_error

MAX_FILES = 100_000
TRIES = 4  # of a question to a hub that is busy
LONGEST = 120.0  # seconds that somebody waits for an answer; what the hub wants longer is said instead
LARGEST = 2**50  # bytes of a file; what claims more is no file
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_OID = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


class Hub:
    """One hub with one token. Every method raises WeftError in words. A busy hub is asked again a few times.

    Args:
        endpoint: the hub's address; "" is what the environment (HF_ENDPOINT) or the library says.
        waiting: told in words why nothing comes, and "" when it goes on. cancelled: ends such a wait.
    """

    def __init__(
        self,
        endpoint: str = "",
        token: str = "",
        *,
        waiting: Callable[[str], None] = lambda _: None,
        cancelled: threading.Event | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        # token False: never one that lies somewhere on this machine
        self._api = HfApi(endpoint=endpoint or None, token=token or False, library_name="weft")
        self._waiting = waiting
        self._cancelled = cancelled or threading.Event()
        self._has_token = bool(token)
        self.endpoint: str = self._api.endpoint

    def list_files(self, reference: HubReference) -> Listing:
        """The files of a repository, with their sizes and checksums.

        Raises:
            WeftError: NOT_FOUND with near names (repository or revision); PERMISSION when it is gated, private or denied;
                NETWORK; HOSTILE when a file's name would leave the target folder.
        """
        try:
            info: Any = self._asking(lambda: self._api.model_info(reference.repo, revision=reference.revision or None))
            commit = str(info.sha or reference.revision or "main")
            entries = self._asking(
                lambda: list(
                    itertools.islice(
                        self._api.list_repo_tree(reference.repo, revision=commit, recursive=True), MAX_FILES + 1
                    )
                )
            )
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
        repo, commit = parse_reference(str(info.id)).repo, parse_reference(f"a/b@{commit}").revision
        for entry in entries:
            size = getattr(entry, "size", None)
            if size is None:
                continue  # a folder
            check_file_path(entry.path)
            files.append(_remote_file(repo, commit, entry))
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
            found: list[Any] = self._asking(
                lambda: list(
                    self._api.list_models(search=text, sort=sort, filter=list(tags) or None, limit=limit)  # pyright: ignore[reportArgumentType]
                )
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
            return str(self._asking(self._api.whoami)["name"])
        except Exception as error:
            raise self._explained(error, None) from error

    def _asking(self, question: Callable[[], _T]) -> _T:
        """The answer; a hub that is busy is asked again, when it says or soon."""
        tries = 0
        while True:
            try:
                return question()
            except Unreachable:
                tries += 1
                if tries > 1 or self._cancelled.wait(0.5):  # lines hiccup; what lasts is said
                    raise
            except Busy as busy:
                tries += 1
                seconds = retry_delay(tries, busy.retry_after, busy.date)
                if tries >= TRIES or seconds > LONGEST:
                    raise
                words = "The hub asks to slow down" if busy.status == 429 else f"The hub has trouble ({busy.status})"
                until = time.monotonic() + seconds
                while (rest := until - time.monotonic()) > 0:
                    self._waiting(f"{words}: it is asked again in {rest:.0f} s")
                    if self._cancelled.wait(min(1.0, rest)):
                        raise WeftError(ErrorKind.CANCELLED, "The question was given up.") from None
                self._waiting("")

    # Trouble in words -------------------------------------------------------------------------------

    def _explained(self, error: Exception, reference: HubReference | None) -> WeftError:
        from huggingface_hub import errors

        if isinstance(error, WeftError):
            return error
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
                "Make a read token in your hub account and enter it in Settings (or set HF_TOKEN).",
            )
        if isinstance(error, Busy):
            return busy_error(error)
        return connection_error(error, self.endpoint)

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
        close = difflib.get_close_matches(reference.repo, list(dict.fromkeys(near)), n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Check the spelling."
        if not self._has_token:
            hint += " If it is private, enter a token in Settings (or set HF_TOKEN)."
        return WeftError(ErrorKind.NOT_FOUND, f"There is no {reference.repo} on the hub.", hint)


def _remote_file(repo: str, commit: str, entry: Any) -> RemoteFile:
    """A file of the hub's tree. Raises WeftError HOSTILE when its size is none."""
    size, lfs = entry.size, getattr(entry, "lfs", None)
    if not isinstance(size, int) or not 0 <= size < LARGEST:
        raise WeftError(
            ErrorKind.HOSTILE, f"The hub gives {entry.path!r} the size {str(size)[:40]}.", "Do not use this model."
        )
    sha256 = str(lfs.sha256).lower() if lfs else ""
    git_oid = "" if lfs else str(getattr(entry, "blob_id", "")).lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise WeftError(
            ErrorKind.HOSTILE, f"The hub gives {entry.path!r} a checksum that is none.", "Do not use this model."
        )
    # Git may use other hashes one day: a file is fetched then without being compared.
    return RemoteFile(
        repo=repo,
        commit=commit,
        path=entry.path,
        size=size,
        sha256=sha256,
        git_oid=git_oid if _GIT_OID.fullmatch(git_oid) else "",
    )
