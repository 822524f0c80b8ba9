"""A folder put onto the hub: its repository made, its files sent one after the other, then one commit that names them all.

Nothing of it can be seen there before the commit. Large files that arrived in an earlier try are not sent again. Files go over
plain HTTP: huggingface_hub's other way tells neither how far it is nor can it be stopped.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.push_plan import PushPlan, PushResult
from app.hub.listing import Hub
from app.hub.questions import configure

TIMEOUT = 60.0  # seconds without an answer: file stores think about a large file when it has come
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_GIVEN = frozenset({".gitattributes"})  # what the hub puts into a new repository by itself
_WRITE = "Make a write token in your hub account and enter it in Settings (or set HF_TOKEN)."


class _Source(io.BufferedIOBase):
    """A file that tells how far it is read, and stops when told. Open only while it is read."""

    def __init__(self, path: Path, read: Callable[[int], None]) -> None:
        super().__init__()
        self._path, self._read, self._at = path, read, 0
        self._size = path.stat().st_size
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at == 0 and self._file is not None:
            self._file.close()
            self._file = None
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        if self._file is None:
            self._file = self._path.open("rb")
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        self._read(self._at)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class Push(Hub):
    """One upload.

    Args:
        progress: told phase, bytes done, bytes in all. waiting, cancelled: see Hub; `cancelled` ends the upload too.
    """

    def __init__(
        self, plan: PushPlan, *, progress: Callable[[str, int, int], None], waiting: Any, cancelled: Any
    ) -> None:
        configure(plan.endpoint, plan.proxy, TIMEOUT)
        super().__init__(plan.endpoint, plan.token, waiting=waiting, cancelled=cancelled)
        self._plan, self._progress = plan, progress
        self._files = files_of(Path(plan.path))
        self._sizes = [path.stat().st_size for path in self._files.values()]
        self._before, self._phase = 0, ""

    def run(self) -> PushResult:
        """Upload.

        Raises:
            WeftError: PERMISSION (no token, no right to write), BAD_INPUT (the name is taken), NETWORK, CANCELLED.
        """
        started, plan = time.monotonic(), self._plan
        try:
            repo = self._owned()
            private = self._made(repo)
            additions, known = self._additions(), 0
            self._before = 0
            for addition, size in zip(additions, self._sizes, strict=True):
                self._phase = "Uploading"
                begun = self._told
                self._sent(repo, addition)
                known += size if size and addition._upload_mode == "lfs" and self._told == begun else 0
                self._before += size
                self._tell(0)
            self._phase = ""  # small files are read once more, into the commit
            self._waiting("Waiting for the hub to take it in")
            message = plan.message or f"Upload {Path(plan.path).name}"
            done: Any = self._asking(lambda: self._api.create_commit(repo, additions, commit_message=message))
        except Exception as error:
            if self._cancelled.is_set():
                raise WeftError(
                    ErrorKind.CANCELLED, "Cancelled. What has arrived is not sent again next time."
                ) from None
            raise self._refused(error) from error
        finally:
            self._close()
        return PushResult(
            repo=repo,
            url=f"{self.endpoint}/{repo}",
            commit=str(done.oid),
            files=len(self._files),
            bytes=sum(self._sizes),
            known=known,
            private=private,
            seconds=time.monotonic() - started,
        )

    # Steps ------------------------------------------------------------------------------------------

    def _owned(self) -> str:
        """The repository's whole name; asks whose token it is and whether it may write."""
        if not self._has_token:
            raise WeftError(ErrorKind.PERMISSION, "No hub token is set: nothing can be uploaded.", _WRITE)
        me: Any = self._asking(self._api.whoami)
        role = str(((me.get("auth") or {}).get("accessToken") or {}).get("role") or "")
        if role == "read":
            raise WeftError(ErrorKind.PERMISSION, "The hub token may only read.", _WRITE)
        return self._plan.repo if "/" in self._plan.repo else f"{me['name']}/{self._plan.repo}"

    def _made(self, repo: str) -> bool:
        """Make the repository, or find it empty, or updated on purpose. Whether it is private."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._asking(lambda: self._api.create_repo(repo, private=self._plan.private))
        except HfHubHTTPError as error:
            if getattr(error.response, "status_code", 0) != 409:
                raise
        else:
            return self._plan.private
        info: Any = self._asking(lambda: self._api.model_info(repo))
        theirs = {sibling.rfilename for sibling in info.siblings or ()} - _GIVEN
        if theirs and not self._plan.update:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{repo} is on the hub already, with {len(theirs)} file{'s' if len(theirs) > 1 else ''}.",
                "Choose another name, or say that it is to be updated.",
            )
        if self._plan.private and not info.private:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{repo} is on the hub already, and public.",
                "Choose another name, or upload it as public.",
            )
        return bool(info.private)

    def _additions(self) -> list[Any]:
        """The files with their checksums."""
        from huggingface_hub import CommitOperationAdd

        found: list[Any] = []
        self._told = 0
        self._phase = "Computing checksums"
        for (name, path), size in zip(self._files.items(), self._sizes, strict=True):
            source: Any = _Source(path, self._tell)
            found.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=source))
            self._before += size
        self._opened = found
        return found

    def _sent(self, repo: str, addition: Any) -> None:
        def send() -> None:
            try:
                self._api.preupload_lfs_files(repo, [addition], num_threads=1, free_memory=False)
            except RuntimeError as error:  # huggingface_hub's own wrapping
                raise error.__cause__ or error from None

        self._asking(send)

    def _tell(self, at: int) -> None:
        if self._cancelled.is_set():
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        self._told = self._before + at
        if self._phase:
            self._progress(self._phase, self._told, sum(self._sizes))

    def _close(self) -> None:
        for addition in getattr(self, "_opened", []):
            addition.path_or_fileobj.close()

    # Trouble ----------------------------------------------------------------------------------------

    def _refused(self, error: Exception) -> WeftError:
        if isinstance(error, OSError) and error.filename:
            return WeftError(
                ErrorKind.NOT_FOUND, f"{error.filename} cannot be read: {error.strerror}.", "Check the folder."
            )
        response = getattr(error, "response", None)
        status, headers = getattr(response, "status_code", 0), getattr(response, "headers", {})
        words = str(headers.get("X-Error-Message", "") or "").strip().rstrip(".")[:300]
        if status == 401:
            return WeftError(ErrorKind.PERMISSION, "The hub does not know the token.", _WRITE)
        if status in (402, 403):
            return WeftError(
                ErrorKind.PERMISSION,
                f"The hub refuses to write {self._plan.repo}" + (f": {words}." if words else "."),
                f"Upload under your own name, or as a member who may write there. {_WRITE}",
            )
        if isinstance(error, ValueError) and "README" in str(error):
            return WeftError(
                ErrorKind.BAD_INPUT, f"The hub does not take the model card: {str(error)[:400]}", "Correct README.md."
            )
        if 400 <= status < 500 and words:
            return WeftError(
                ErrorKind.BAD_INPUT, f"The hub refuses the upload: {words}.", "Change that, then try again."
            )
        return self._explained(error, None)


def files_of(path: Path) -> dict[str, Path]:
    """What is uploaded, by its name there. Hidden and unfinished files stay here.

    Raises:
        WeftError: NOT_FOUND; BAD_INPUT for a link that leads out of the folder.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no {path}.", "Name a folder or a file.")
    found: dict[str, Path] = {}
    home = path.resolve()
    for each in sorted(path.rglob("*")):
        parts = each.relative_to(path).parts
        if any(part.startswith(".") for part in parts) or each.suffix == ".part" or not each.is_file():
            continue
        if home not in each.resolve().parents:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{each} is a link to {each.resolve()}, outside of the folder.",
                "Put the file itself there, or upload another folder.",
            )
        found["/".join(parts)] = each
    if not found:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is nothing to upload in {path}.", "Name a folder with files.")
    return found


def check_repo(name: str) -> str:
    """A repository's name as it may be typed: `name`, `user/name`. Raises WeftError BAD_INPUT."""
    name = name.strip()
    parts = name.split("/")
    if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts) or re.search(r"--|\.\.|[-.]$|\.git$", name):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{name!r} is no name for the hub.",
            "Write user/name, with letters, digits, single - and ., and _.",
        )
    return name
