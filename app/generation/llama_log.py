"""llama.cpp's own log: kept instead of printed, so that a failure can say what the library said."""

from __future__ import annotations

import collections
import functools
import re
from typing import Any

_WARN, _ERROR, _CONTINUE = 3, 4, 5  # enum ggml_log_level
_BUFFER = re.compile(r":\s+(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_DEVICE = re.compile(r"using device (\S+) \((.*?)\)")
_PREFIX = re.compile(r"^(?:[\w:~]+: )+")


class LibraryLog:
    """Takes every line that llama.cpp logs in this process.

    Attributes:
        lines: warnings and errors since `clear`, oldest first, without the library's function names.
        buffers: bytes by (place, purpose), as the library reports what it takes: ("CPU", "KV"), ("CUDA0", "model").
        offloaded: (layers on GPUs, all layers).
        devices: names of the GPUs in use.
    """

    def __init__(self) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=40)
        self.buffers: dict[tuple[str, str], int] = {}
        self.offloaded = (0, 0)
        self.devices: dict[str, str] = {}
        self._callback: Any = None
        self._level = 0

    def clear(self) -> None:
        """Forget what was logged so far."""
        self.lines.clear()
        self.buffers.clear()
        self.offloaded = (0, 0)
        self.devices.clear()

    def attach(self, library: Any) -> None:
        """Become the library's log, in place of its printing to stderr. This object must then live for ever."""
        callback = library.llama_log_callback(self._take)
        library.llama_log_set(callback, None)
        self._callback = callback  # only now may the one before be freed

    def _take(self, level: int, text: bytes, _: object) -> None:
        # Called from C, in the middle of a load: cheap, and never raising.
        if level == _CONTINUE:
            level = self._level
        self._level = level
        line = text.decode("utf-8", "replace").rstrip()
        if level in (_WARN, _ERROR):
            self.lines.append(_PREFIX.sub("", line))
        elif found := _BUFFER.search(line):
            key = (found[1], found[2])
            self.buffers[key] = self.buffers.get(key, 0) + int(float(found[3]) * 2**20)
        elif found := _OFFLOADED.search(line):
            self.offloaded = (int(found[1]), int(found[2]))
        elif found := _DEVICE.search(line):
            self.devices[found[1]] = found[2]

    def reason(self) -> str:
        """The most telling line: what went wrong, in the library's words."""
        for line in self.lines:
            if line.startswith("error loading model: "):
                return line.removeprefix("error loading model: ").removeprefix("error loading model hyperparameters: ")
        return next((line for line in self.lines if "fail" in line or "error" in line), next(iter(self.lines), ""))


def library_log(library: Any) -> LibraryLog:
    """The log of the library in this process. There is one, as the library has one, and it is never freed.

    It is attached anew each time: what quantizes in this process has a log of its own meanwhile.
    """
    log = _the_log(library)
    log.attach(library)
    return log


@functools.cache
def _the_log(_library: Any) -> LibraryLog:
    return LibraryLog()
