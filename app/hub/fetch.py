"""All the files of one download, in a folder: what is there already, what lies elsewhere, what the network must bring."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import msgspec

from app.core.disk import sync_folder
from app.core.errors import ErrorKind, WeftError
from app.core.unfinished import NOTE, DownloadNote, Verified, read_note, write_note
from app.hub.board import Board, Entry
from app.hub.checksum import checksum_name, is_file
from app.hub.files import DownloadNews, DownloadResult, RemoteFile
from app.hub.journal import PartHeader, beside
from app.hub.limits import RateLimit
from app.hub.local_copies import take_copy
from app.hub.part import Locked, PartFile, arrived_bytes, move_away, remove_parts, write_error
from app.hub.places import local_path, refuse_collisions
from app.hub.positional import folder_lock
from app.hub.source import HttpSource
from app.hub.transfer import SPARE, Transfer
from app.hub.trouble import stopped

SMALL = 8 * 1024 * 1024  # files up to this size are fetched several at once, over one connection each
AT_ONCE = 4
_LAST = ("config.json", "adapter_config.json")  # what makes a folder a model comes when the rest is there


class Fetch:
    """Brings files into a folder. Use once.

    Args:
        source: of the bytes. files: which, all of one repository and commit. folder: where they go.
        note: what is remembered beside them.
        here: copies on this machine, by path; used when their content proves right.
        limit, connections: shared by all files.
        news: called about 4 times a second, from a thread of its own.
    """

    def __init__(
        self,
        source: HttpSource,
        files: Sequence[RemoteFile],
        folder: Path,
        *,
        note: DownloadNote,
        here: Mapping[str, str] | None = None,
        limit: RateLimit | None = None,
        connections: int = 4,
        news: Callable[[DownloadNews], None] = lambda _: None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._source, self._folder = source, folder
        self._files = sorted(files, key=lambda file: (file.path.rpartition("/")[2] in _LAST, file.size, file.path))
        self._asked = tuple(files)
        self._note = note
        self._here = dict(here or {})
        self._limit = limit or RateLimit()
        self._connections = connections
        self._news = news
        self._cancelled = cancelled or threading.Event()
        self._lock = threading.Lock()
        self._transfers: set[Transfer] = set()
        self._board = Board(self._files)
        self._reused = 0
        self._foreign: set[str] = set()  # what has a file's name and is not ours to replace
        self._kept: list[str] = []

    def stop(self) -> None:
        """End as soon as possible; what arrived is kept. From any thread."""
        self._cancelled.set()
        with self._lock:
            transfers = list(self._transfers)
        for transfer in transfers:
            transfer.interrupt()

    def run(self) -> DownloadResult:
        """Bring all files. Returns when every one is verified and has its name.

        Raises:
            WeftError: CANCELLED, NETWORK, DISK_FULL, PERMISSION, CORRUPT, HOSTILE, BAD_INPUT. Files that were complete stay.
        """
        started = time.monotonic()
        refuse_collisions(self._files)
        targets = {file.path: local_path(self._folder, file.path) for file in self._files}
        ended = threading.Event()
        reporter = threading.Thread(target=self._report, args=(ended,), name="news", daemon=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._begin_note()
        except OSError as error:
            raise write_error(error, self._folder) from error
        reporter.start()
        try:
            missing = [file for file in self._files if not self._is_there(file, targets[file.path])]
            for file in missing:
                self._board.entry(file).kept(arrived_bytes(targets[file.path]))
            self._check_space(missing, targets)
            self._fetch_all(missing, targets)
        except WeftError:
            self._tidy(targets)
            raise
        finally:
            ended.set()
            reporter.join()
        return DownloadResult(
            folder=str(self._folder),
            paths=tuple(str(targets[file.path]) for file in self._asked),
            bytes=sum(file.size for file in self._files),
            fetched=self._board.fetched,
            reused=self._reused,
            seconds=time.monotonic() - started,
            kept=tuple(self._kept),
        )

    # What is there ---------------------------------------------------------------------------------

    def _is_there(self, file: RemoteFile, target: Path) -> bool:
        """Whether the file lies at its place already, verified now or remembered to be."""
        if self._cancelled.is_set():
            raise stopped()
        board = self._board.entry(file)
        try:
            status = target.stat()
        except OSError:
            return False
        known = self._note.verified.get(file.path)
        seen = Verified(size=status.st_size, modified_ns=status.st_mtime_ns, checksum=checksum_name(file))
        if known != seen:
            board.phase("Checking what is there")
            if not is_file(target, file, self._cancelled, board.checking):
                board.reset()
                if known is None or (known.size, known.modified_ns) != (seen.size, seen.modified_ns):
                    self._foreign.add(file.path)  # not an older version that we fetched: somebody's own
                return False
        board.reset()
        board.kept(file.size)
        self._complete(file, target)
        return True

    def _check_space(self, missing: Sequence[RemoteFile], targets: Mapping[str, Path]) -> None:
        drive, needed = self._folder.stat().st_dev, 0
        for file in missing:
            if file.path not in self._here or _drive(Path(self._here[file.path])) != drive:  # else it is linked
                needed += file.size - arrived_bytes(targets[file.path])
        free = shutil.disk_usage(self._folder).free
        if needed and needed + SPARE > free:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"{self._folder} has {_gigabytes(free)} free: {_gigabytes(needed)} must still be fetched, and "
                f"{_gigabytes(SPARE)} must stay free.",
                "Free some space or choose another folder, then resume: what has arrived is kept.",
            )

    # Fetching --------------------------------------------------------------------------------------

    def _fetch_all(self, missing: Sequence[RemoteFile], targets: Mapping[str, Path]) -> None:
        last = [file for file in missing if file.path.rpartition("/")[2] in _LAST]
        small = [file for file in missing if file.size <= SMALL and file not in last]
        large = [file for file in missing if file.size > SMALL and file not in last]
        with ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="file") as pool:
            running = [pool.submit(self._fetch, file, targets[file.path], 1) for file in small]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                self.stop()
                for future in running:
                    future.cancel()
                raise
        for file in (*large, *last):
            self._fetch(file, targets[file.path], self._connections)

    def _fetch(self, file: RemoteFile, target: Path, connections: int) -> None:
        if self._cancelled.is_set():
            raise stopped()
        board = self._board.entry(file)
        board.begin()
        if not self._reuse(file, target, board):
            if self._here.pop(file.path, None) is not None:
                self._check_space((file,), {file.path: target})  # the copy was to save that
            transfer = Transfer(
                self._source,
                file,
                target,
                connections=connections,
                limit=self._limit,
                progress=board,
                cancelled=self._cancelled,
                keep_old=file.path in self._foreign,
            )
            with self._lock:
                self._transfers.add(transfer)
            try:
                transfer.run()
            finally:
                with self._lock:
                    self._transfers.discard(transfer)
                    self._kept += [str(transfer.old)] if transfer.old is not None else []
        self._complete(file, target)

    def _reuse(self, file: RemoteFile, target: Path, board: Entry) -> bool:
        """Take a copy from this machine if its content is right."""
        source = self._here.get(file.path)
        if source is None or arrived_bytes(target) > file.size // 2:
            return False
        board.phase("Checking a copy that is here")
        found = is_file(Path(source), file, self._cancelled, board.checking)
        board.reset()
        if not found:
            return False
        header = PartHeader(
            url=file.url(self._source.endpoint), size=file.size, etag="", sha256=file.sha256, git_oid=file.git_oid
        )
        try:
            holder = PartFile(target, header)
        except Locked:
            return False  # another download fetches it now: wait for that
        try:
            if is_file(target, file, self._cancelled, board.checking):
                # Since we looked, another download has completed it: nothing is in its place that must be kept.
                holder.discard()
                board.kept(file.size)
                return True
            copy = beside(target, ".copy.part")
            take_copy(Path(source), copy, self._cancelled)
            old = move_away(target) if file.path in self._foreign else None
            copy.replace(target)
            sync_folder(target.parent)
            holder.discard()
        except OSError as error:
            raise write_error(error, target) from error
        finally:
            holder.close()
        remove_parts(target)
        self._kept += [str(old)] if old is not None else []
        board.kept(file.size)
        with self._lock:
            self._reused += file.size
        return True

    # The note --------------------------------------------------------------------------------------

    def _begin_note(self) -> None:
        with folder_lock(self._folder):
            old = read_note(self._folder) or DownloadNote()
            # Other files may be pending in this folder too, even of another repository: they stay so.
            pending = {*old.pending, *(file.path for file in self._files)}
            self._note = msgspec.structs.replace(self._note, pending=tuple(sorted(pending)), verified=old.verified)
            write_note(self._folder, self._note)

    def _complete(self, file: RemoteFile, target: Path) -> None:
        self._board.entry(file).complete()
        with self._lock:
            try:
                status = target.stat()
                seen = Verified(size=status.st_size, modified_ns=status.st_mtime_ns, checksum=checksum_name(file))
                with folder_lock(self._folder):
                    # Another download may write into this folder's note: take up what it says now.
                    now = read_note(self._folder) or self._note
                    self._note = msgspec.structs.replace(
                        now,
                        pending=tuple(path for path in now.pending if path != file.path),
                        verified={**now.verified, file.path: seen},
                    )
                    write_note(self._folder, self._note)
            except OSError as error:
                raise write_error(error, self._folder) from error

    def _tidy(self, targets: Mapping[str, Path]) -> None:
        """After a failure before the first byte: leave no folder that holds nothing but our note."""
        if self._note.verified or any(arrived_bytes(target) for target in targets.values()):
            return
        with contextlib.suppress(OSError):  # it only looks better
            for target in targets.values():
                remove_parts(target)
            if all(path.name == NOTE for path in self._folder.iterdir()):
                (self._folder / NOTE).unlink(missing_ok=True)
                self._folder.rmdir()
                self._folder.parent.rmdir()  # the user's, when this was all

    def _report(self, ended: threading.Event) -> None:
        while True:
            over = ended.wait(0.25)
            self._news(self._board.news())
            if over:
                return


def _drive(path: Path) -> int:
    try:
        return path.stat().st_dev
    except OSError:
        return -1


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
