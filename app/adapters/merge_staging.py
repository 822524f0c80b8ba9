"""Where a merge is made: a hidden folder beside its target, with a journal of the tensors that are complete.

A merge that was killed goes on from there. Nothing bears the target's name before all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from types import TracebackType

import msgspec

from app.core.adapter_file import config_beside
from app.core.amounts import readable_bytes
from app.core.disk import sync_file, sync_folder
from app.core.errors import ErrorKind, WeftError
from app.core.recognise_gguf import parts_of

PREFIX = ".weft-merge-"
LOCK, JOB = "lock", "job"
_ATTEMPTS = 20  # to make a folder that others may be removing
_STATE, _JOURNAL, _MODEL = "state", "journal", "model"


def boot_id() -> str:
    """What tells whether the machine has been started anew since; "" where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


class Staging:
    """The hidden folder of one merge. A context manager that holds its lock.

    Args:
        target: the folder that is made.

    Attributes:
        folder: its content, which becomes the target.

    Raises:
        WeftError: BUSY when another merge to the same target runs; PERMISSION where nothing may be written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        name = hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:16]
        self.root = target.absolute().parent / f"{PREFIX}{name}"
        self.folder = self.root / _MODEL
        self._journal = -1
        self._lock = self._take_lock()

    def _take_lock(self) -> int:
        missing = 0
        while True:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError as error:
                missing += 1
                if missing < _ATTEMPTS:
                    continue  # removed between the two by a merge that ended
                raise WeftError(
                    ErrorKind.NOT_FOUND,
                    f"Nothing can be made in {self.root.parent}: {error.strerror or 'it is not there'}.",
                    "Check the path, and that its drive is there; or choose another folder.",
                ) from error
            except OSError as error:
                raise write_error(self.root, error) from error
            if not _locked(descriptor):
                os.close(descriptor)
                raise WeftError(
                    ErrorKind.BUSY,
                    f"Another job is making {self.target} already.",
                    "Wait for it, or choose another name.",
                )
            try:
                if os.name == "nt" or os.path.samestat(os.fstat(descriptor), (self.root / LOCK).stat()):
                    return descriptor
            except OSError:
                pass  # the folder went away while we waited for its lock: take a new one
            os.close(descriptor)

    def finished(self, fingerprint: str) -> bool:
        """Whether an earlier run was killed between giving its result the final name and tidying up."""
        return self._state()[0] == fingerprint and not self.folder.exists() and (self.target / "config.json").is_file()

    def left_by(self, fingerprint: str) -> bool:
        """Whether an earlier run of the same was killed here."""
        return self._state()[0] == fingerprint

    def begin(self, fingerprint: str, job: bytes = b"") -> frozenset[int]:
        """Go on with what an earlier run has left, or start anew.

        Args:
            job: see `job_of`: what is done here, for whoever finds it after a kill.

        Returns:
            Numbers of the tensors that are complete already.
        """
        known, boot = self._state()
        done: frozenset[int] = frozenset()
        try:
            if known != fingerprint:
                self.forget()
            elif self.folder.is_dir():
                done = self._complete(same_boot=bool(boot) and boot == boot_id())
            self.folder.mkdir(exist_ok=True)
            if job:
                write_atomically(self.root / JOB, job)
            if done:
                # What a killed run has written may still be in memory alone: the new journal says that it is on the disk.
                for path in self.folder.iterdir():
                    sync_file(path)
                sync_folder(self.folder)
            lines = "".join(f"{number}\n" for number in sorted(done)) + (f"s{len(done)}\n" if done else "")
            write_atomically(self.root / _JOURNAL, lines.encode())
            write_atomically(self.root / _STATE, f"{fingerprint}\n{boot_id()}\n".encode())
            self._journal = os.open(self.root / _JOURNAL, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            if not done:
                self.discard()
            raise write_error(self.root, error) from error
        return done

    def forget(self) -> None:
        """Take away all that an earlier run has left; its mark goes first, so that a kill on the way leaves nothing to trust.

        Raises:
            OSError: something of it cannot be removed.
        """
        (self.root / _STATE).unlink(missing_ok=True)
        sync_folder(self.root)
        for path in self.root.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _state(self) -> tuple[str, str]:
        try:
            lines = (self.root / _STATE).read_text("ascii").split("\n")
        except (OSError, ValueError):
            return "", ""
        return (lines[0], lines[1]) if len(lines) > 2 else ("", "")

    def _complete(self, *, same_boot: bool) -> frozenset[int]:
        """What the journal says. After a crash of the machine, only what it had been told to put on the disk counts."""
        try:
            lines = (self.root / _JOURNAL).read_text("ascii").split("\n")[:-1]
        except (OSError, ValueError):
            return frozenset()
        numbers: list[int] = []
        synced = 0
        for line in lines:
            if line.isdecimal():
                numbers.append(int(line))
            elif line[:1] == "s" and line[1:].isdecimal():
                synced = int(line[1:])
        return frozenset(numbers if same_boot else numbers[:synced])

    def note(self, number: int) -> None:
        """Note that a tensor is complete."""
        os.write(self._journal, f"{number}\n".encode())

    def note_synced(self, count: int) -> None:
        """Note that the first `count` tensors of the journal are on the disk."""
        os.write(self._journal, f"s{count}\n".encode())
        os.fsync(self._journal)

    def allocated(self) -> int:
        """Bytes that its files take on the disk already."""
        try:
            return sum(_taken(path) for path in self.folder.iterdir())
        except OSError:
            return 0

    def publish(self) -> None:
        """Give the folder its final name; all of it is on the disk first."""
        try:
            for path in self.folder.iterdir():
                sync_file(path)
            sync_folder(self.folder)
            if self.target.is_dir() and not any(self.target.iterdir()):
                self.target.rmdir()
            if self.target.exists():
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"{self.target} has appeared in the meantime.",
                    "Merge again under another name.",
                )
            self.folder.rename(self.target)
            sync_folder(self.target.absolute().parent)
        except OSError as error:
            raise write_error(self.target, error) from error

    @contextlib.contextmanager
    def making(self) -> Generator[None]:
        """Make the content and publish it here. Only a death leaves something to go on from: what fails gives its space back.

        Raises:
            WeftError: DISK_FULL, PERMISSION where the operating system refuses something.
        """
        try:
            yield
        except OSError as error:
            raise write_error(self.folder, error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was made."""
        self._close_journal()
        shutil.rmtree(self.root, ignore_errors=True)

    def _close_journal(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_journal()
        try:
            if [path.name for path in self.root.iterdir()] == [LOCK]:
                shutil.rmtree(self.root, ignore_errors=True)  # refused before it began
        except OSError:
            pass  # discarded already
        os.close(self._lock)


def job_of(task: str, environment: str, plan: msgspec.Struct) -> bytes:
    """A job as it is noted in its staging folder."""
    return msgspec.json.encode({"task": task, "environment": environment, "parameters": plan})


def is_held(folder: Path) -> bool:
    """Whether a merge works in a staging folder now; also when that cannot be told."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return True
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _taken(path: Path) -> int:
    found = path.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def _locked(descriptor: int) -> bool:
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # Windows
        msvcrt = importlib.import_module("msvcrt")
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file, at once or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def require_space(folder: Path, needed: int, what: str, reserve: int = 0) -> None:
    """Refuse what does not fit on the drive.

    Args:
        folder: where it lies; a staging folder for its target's.
        needed: bytes. reserve: more of them, which stay free.

    Raises:
        WeftError: DISK_FULL, with all numbers.
    """
    place = folder.absolute()
    place = place.parent if place.name.startswith(PREFIX) else place
    existing = next(p for p in [place, *place.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed + reserve > free:
        kept = f" (and {readable_bytes(reserve)} are kept free)" if reserve else ""
        raise WeftError(
            ErrorKind.DISK_FULL,
            f"{what} takes {readable_bytes(max(0, needed))}{kept} on the drive of {existing}, "
            f"and {readable_bytes(free)} are free.",
            f"Free {readable_bytes(needed + reserve - free)} there, or choose a folder on another drive.",
        )


def write_error(path: Path, error: OSError) -> WeftError:
    """The operating system's refusal to write, in words."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeftError(
            ErrorKind.DISK_FULL,
            f"The drive of {path.parent} became full.",
            "Free some space there, or choose a folder on another drive; then merge again.",
        )
    return WeftError(
        ErrorKind.PERMISSION,
        f"{path} cannot be written: {error.strerror or error}.",
        "Choose a folder that you may write to.",
    )


def fingerprint(parts: Iterable[object]) -> str:
    """A hash that is the same exactly when a merge would make the same bytes."""
    return hashlib.sha256("\n".join(repr(part) for part in parts).encode()).hexdigest()


def stamp(path: Path) -> tuple[object, ...]:
    """What tells a model or an adapter from others: names, sizes and times of the files that are read for it.

    Args:
        path: a folder; a GGUF file, whose other parts count as well; or another file, with the adapter's config beside it.

    Raises:
        WeftError: NOT_FOUND.
    """
    try:
        if path.is_dir():
            files = sorted(path.iterdir())
        else:
            path.stat()
            files = parts_of(path)[0] if path.suffix.lower() == ".gguf" else [path, *config_beside(path)]
        return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    except FileNotFoundError as error:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no {path}.", "Check the path.") from error


def require_unchanged(inputs: Iterable[tuple[Path, tuple[object, ...]]]) -> None:
    """Refuse to give a result its name when what it was made of is no longer as it was.

    Args:
        inputs: paths with the stamps that they had at first. Files that came to a folder since do not matter.

    Raises:
        WeftError: CORRUPT, NOT_FOUND.
    """
    for path, before in inputs:
        if not set(before) <= set(stamp(path)):
            raise WeftError(
                ErrorKind.CORRUPT,
                f"{path} changed while it was read.",
                "Begin again when nothing writes to it any more.",
            )
