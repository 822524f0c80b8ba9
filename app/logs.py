"""The window's log: one rotating file, and nothing that goes wrong stays silent."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from PySide6.QtCore import QMessageLogContext, QObject, QtMsgType, Signal, qInstallMessageHandler

FILE = "window.log"
KEPT_BYTES = 2 * 1024 * 1024
KEPT_FILES = 3

log = logging.getLogger("weft")


class Reporter(QObject):
    """Brings an unexpected exception from any thread to the window's thread."""

    unexpected = Signal(str, str)  # summary, traceback


def install(folder: Path) -> Reporter:
    """Write to `folder`/window.log, and catch what nobody caught: Python's in every thread, and Qt's own messages."""
    root = logging.getLogger("weft")
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = RotatingFileHandler(
            folder / FILE, maxBytes=KEPT_BYTES, backupCount=KEPT_FILES, encoding="utf-8", delay=True
        )
    except OSError:
        handler = logging.StreamHandler()  # a read-only home must not keep the window from opening
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(threadName)s %(message)s"))
    root.addHandler(handler)
    reporter = Reporter()
    _catch_exceptions(reporter)
    qInstallMessageHandler(_qt_message)
    return reporter


def uninstall() -> None:
    """Put things back: tests start more than one window in one process."""
    qInstallMessageHandler(None)
    sys.excepthook = sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def _catch_exceptions(reporter: Reporter) -> None:
    def report(kind: type[BaseException], error: BaseException | None, trace: types.TracebackType | None) -> None:
        import traceback

        text = "".join(traceback.format_exception(kind, error, trace))
        log.error("Unexpected: %s", text)
        if sys.stderr is not None:
            sys.stderr.write(text)
        reporter.unexpected.emit(f"{kind.__name__}: {error}", text)

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        report(kind, error, trace)

    sys.excepthook = hook
    threading.excepthook = lambda arguments: report(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


_LEVELS: dict[QtMsgType, Callable[..., None]] = {
    QtMsgType.QtDebugMsg: log.debug,
    QtMsgType.QtInfoMsg: log.info,
    QtMsgType.QtWarningMsg: log.warning,
    QtMsgType.QtCriticalMsg: log.error,
    QtMsgType.QtFatalMsg: log.critical,
}


def _qt_message(kind: QtMsgType, context: QMessageLogContext, text: str) -> None:
    _LEVELS.get(kind, log.warning)("Qt: %s", text)
