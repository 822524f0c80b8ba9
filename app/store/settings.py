"""Settings: one TOML file, written atomically, that a person may edit by hand.

What cannot be read costs only itself: a wrong value falls back to its default, a key that this Weft does
not know is kept, a file that is not TOML is set aside. A hub token never gets in (see `app/store`'s
readers of keyring); one that was put there by hand is taken out again.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.options import OptionValue
from app.store.toml_text import dump

MAX_BYTES = 4 * 1024 * 1024
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

Appearance = Literal["system", "light", "dark"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the user chose.

    Attributes:
        appearance: follow the system, or always light or dark.
        roots: further folders to index for models and adapters, absolute.
        index_hugging_face, index_lm_studio, index_ollama, index_text_generation_webui: look where these
            programs keep their models.
        downloads: where downloads go; "" is Weft's own models folder.
        hub_endpoint: address of the hub; "" is the usual one.
        proxy: for all network use; "" is what the system says.
        download_rate: bytes a second that all downloads together may take; 0 is unlimited.
        downloads_at_once: how many downloads run at the same time.
        autoload: load a model as soon as it is picked.
        load_last: load the model used last when Weft starts.
        last_model: library id of that one; "" loads the starter model.
        loaders: loader to prefer for a model format, by format (`gguf`: `llama_cpp`).
        unload_idle_minutes: give the model's memory back after this long without use; 0 never.
        sampling_presets: changed fields of `core.sampling.Sampling`, by the preset's name.
        sampling: name of the preset that new chats begin with; "" is the built-in default.
        system_prompt: that new chats begin with.
        calibration: measured once per machine (threads, `omp_wait_policy`, …), by name.
        show_advanced: forms show their advanced part.
    """

    appearance: Appearance = "system"
    roots: tuple[str, ...] = ()
    index_hugging_face: bool = True
    index_lm_studio: bool = True
    index_ollama: bool = True
    index_text_generation_webui: bool = True
    downloads: str = ""
    hub_endpoint: str = ""
    proxy: str = ""
    download_rate: int = 0
    downloads_at_once: int = 2
    autoload: bool = True
    load_last: bool = True
    last_model: str = ""
    loaders: dict[str, str] = {}
    unload_idle_minutes: int = 0
    sampling: str = ""
    system_prompt: str = ""
    show_advanced: bool = False
    sampling_presets: dict[str, dict[str, OptionValue]] = {}
    calibration: dict[str, OptionValue] = {}


class SettingsStore:
    """The settings file.

    Attributes:
        settings: as last read or written.
        problems: one sentence for each thing that was wrong with the file; shown once by the window.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: tuple[str, ...] = ()
        self._unknown: dict[str, Any] = {}
        self._stamp: tuple[int, int] | None = None
        self._lock = threading.RLock()
        self.settings = self.load()

    def load(self) -> Settings:
        """Read the file again. Never fails: see `problems` and the module's docstring."""
        with self._lock:
            problems: list[str] = []
            self._stamp = self._file_stamp()
            table = self._read(problems)
            table = _without_tokens(table, problems)
            values: dict[str, Any] = {}
            unknown: dict[str, Any] = {}
            for name, value in table.items():
                if name not in Settings.__struct_fields__:
                    unknown[name] = value
                    continue
                try:
                    values[name] = getattr(msgspec.convert({name: value}, Settings), name)
                except msgspec.ValidationError as error:
                    reason = str(error).split(" - at")[0]
                    problems.append(f"{self.path.name}: {name} cannot be {value!r} ({reason}). Its default is used.")
                    unknown[name] = value  # kept as it is until somebody sets it
            self._unknown = unknown
            self.problems = tuple(problems)
            self.settings = Settings(**values)
            return self.settings

    def update(self, **changes: object) -> Settings:
        """Change some settings and save.

        Raises:
            WeftError: BAD_INPUT for an unknown name or a wrong value; DISK_FULL or PERMISSION when the file
                cannot be written. The settings in use and the file on disk then stay as they were.
        """
        with self._lock:
            if self._file_stamp() != self._stamp:  # another process, or a person, changed it
                self.load()
            table = msgspec.to_builtins(self.settings)
            for name, value in changes.items():
                if name not in Settings.__struct_fields__:
                    raise WeftError(
                        ErrorKind.BAD_INPUT,
                        f"There is no setting {name!r}.",
                        f"Settings are: {', '.join(Settings.__struct_fields__)}.",
                    )
                table[name] = msgspec.to_builtins(value)
            if _TOKEN.search(str(changes)):
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    "A hub token does not belong into the settings file.",
                    "Enter it at Settings, Hub token: it is kept in the system's keyring.",
                )
            try:
                settings = msgspec.convert(table, Settings)
            except msgspec.ValidationError as error:
                raise WeftError(
                    ErrorKind.BAD_INPUT, f"A setting has a wrong value: {error}.", "Correct it and save again."
                ) from error
            unknown = {name: value for name, value in self._unknown.items() if name not in changes}
            self._write(settings, unknown)
            self.settings, self._unknown = settings, unknown
            self._stamp = self._file_stamp()
            return settings

    def _read(self, problems: list[str]) -> dict[str, Any]:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
            return tomllib.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            problems.append(f"{self.path} cannot be read ({error.strerror}). Defaults are used.")
            return {}
        except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
            aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
            try:
                self.path.replace(aside)
                kept = f"It was kept as {aside.name}"
            except OSError:
                kept = "It could not be moved out of the way"
            problems.append(f"{self.path} cannot be understood: {error}. {kept}, and defaults are used.")
            return {}

    def _write(self, settings: Settings, unknown: dict[str, Any]) -> None:
        """Only what differs from the defaults is written, so that a better default reaches everybody."""
        defaults = msgspec.to_builtins(Settings())
        table = {k: v for k, v in msgspec.to_builtins(settings).items() if v != defaults[k]}
        text = "# Settings of Weft. It rewrites this file; comments are lost.\n" + dump({**unknown, **table})
        part = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # mkstemp makes it readable for the user alone: a proxy address may hold a password.
            handle, name = tempfile.mkstemp(prefix=".settings-", suffix=".part", dir=self.path.parent)
            part = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink()
            full = error.errno in (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
            raise WeftError(
                ErrorKind.DISK_FULL if full else ErrorKind.PERMISSION,
                f"The settings could not be saved in {self.path}: {error.strerror}.",
                "Free some space there and try again." if full else "Check the permissions of that folder.",
            ) from error

    def _file_stamp(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def _without_tokens(table: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """A token in the file is not taken over, so the next save drops it."""
    clean = {name: value for name, value in table.items() if not _TOKEN.search(str(value))}
    for name in table.keys() - clean.keys():
        problems.append(
            f"The setting {name!r} held a hub token. It is not used and goes with the next change: "
            "enter it at Settings, Hub token, where the system's keyring keeps it."
        )
    return clean
