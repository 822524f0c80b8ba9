"""One window per data folder: a second start hands its files to the first and goes.

The lock file is the truth (it is freed by the system's own rules when its owner dies); the local socket only carries
messages, so a stale socket of a killed instance is simply replaced by the owner of the lock.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QLockFile, QObject, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths

if TYPE_CHECKING:
    from PySide6.QtNetwork import QLocalServer, QLocalSocket

MAX_MESSAGE = 1024 * 1024
HAND_OVER_SECONDS = 20.0


def socket_name(paths: Paths) -> str:
    """Name of the socket of this data folder. Short, because a Unix socket's path is limited to about 100 bytes."""
    beside = paths.runtime / "window.sock"
    if os.name == "posix" and len(os.fsencode(beside)) < 90:
        return str(beside)
    import hashlib

    return f"weft-{hashlib.sha256(str(paths.data).encode()).hexdigest()[:16]}"


class SingleInstance(QObject):
    """Holds the lock of a data folder, or talks to who holds it.

    Signals:
        received: arguments of a second start, as a list of strings; empty when it was started without any.
    """

    received = Signal(list)

    def __init__(self, paths: Paths, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._name = socket_name(paths)
        paths.runtime.mkdir(parents=True, exist_ok=True)
        self._lock = QLockFile(str(paths.runtime / "window.lock"))
        self._lock.setStaleLockTime(0)
        self._server: QLocalServer | None = None
        self._buffers: dict[QLocalSocket, bytes] = {}

    def claim(self) -> bool:
        """Become the one instance. False when another process is it.

        Raises:
            WeftError: PERMISSION when the lock file cannot be made.
        """
        if not self._lock.tryLock(0):
            if self._lock.error() == QLockFile.LockError.LockFailedError:
                return False
            raise WeftError(
                ErrorKind.PERMISSION,
                f"{self._lock.fileName()} cannot be made.",
                "Check the permissions of that folder, or set WEFT_HOME to a folder of your own.",
            )
        return True

    def listen(self) -> None:
        """Take what later starts hand over. After the first paint: until then they wait."""
        from PySide6.QtNetwork import QLocalServer

        QLocalServer.removeServer(self._name)
        server = QLocalServer(self)
        server.setSocketOptions(QLocalServer.SocketOption.UserAccessOption)
        if server.listen(self._name):
            server.newConnection.connect(self._greet)
            self._server = server

    def hand_over(self, arguments: list[str]) -> None:
        """Give the arguments to the instance that is running; it comes to the front.

        Raises:
            WeftError: BUSY when it does not answer in time.
        """
        import json

        from PySide6.QtNetwork import QLocalSocket

        deadline = time.monotonic() + HAND_OVER_SECONDS
        message = json.dumps(arguments).encode() + b"\n"
        while time.monotonic() < deadline:
            socket = QLocalSocket()
            socket.connectToServer(self._name)
            # The first instance may still be starting: its lock is there before its socket.
            if socket.waitForConnected(500):
                socket.write(message)
                socket.flush()
                if (
                    socket.waitForReadyRead(int(1000 * max(0.5, deadline - time.monotonic())))
                    and socket.read(2) == b"ok"
                ):
                    socket.disconnectFromServer()
                    return
            socket.abort()
            time.sleep(0.1)
        raise WeftError(
            ErrorKind.BUSY,
            "Weft is already running, but it does not answer.",
            f"Close its window, or end process {self._owner() or 'of the other Weft'}, and start again.",
        )

    def release(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._lock.unlock()

    def _owner(self) -> int:
        return int(self._lock.getLockInfo()[0]) if self._lock.getLockInfo() else 0

    @Slot()
    def _greet(self) -> None:
        while self._server is not None and (socket := self._server.nextPendingConnection()) is not None:
            socket.setParent(self)
            self._buffers[socket] = b""
            socket.readyRead.connect(self._read)
            socket.disconnected.connect(self._gone)
            self._take(socket)

    @Slot()
    def _read(self) -> None:
        for socket in list(self._buffers):
            if socket.bytesAvailable():
                self._take(socket)

    @Slot()
    def _gone(self) -> None:
        for socket in list(self._buffers):
            if socket.state() == socket.LocalSocketState.UnconnectedState:
                del self._buffers[socket]
                socket.deleteLater()

    def _take(self, socket: QLocalSocket) -> None:
        import json

        buffer = self._buffers.get(socket, b"") + bytes(socket.readAll().data())
        self._buffers[socket] = buffer
        if len(buffer) > MAX_MESSAGE:
            socket.abort()
            return
        line, newline, _ = buffer.partition(b"\n")
        if not newline:
            return
        self._buffers[socket] = b""
        try:
            arguments = json.loads(line)
        except ValueError:
            socket.abort()
            return
        if isinstance(arguments, list) and all(isinstance(item, str) for item in arguments):
            socket.write(b"ok")
            socket.flush()
            self.received.emit(arguments)
        else:
            socket.abort()


def absolute(arguments: list[str]) -> list[str]:
    """Arguments as another process can use them: relative paths made absolute, links left alone."""
    return [argument if "://" in argument else str(Path(argument).absolute()) for argument in arguments]
