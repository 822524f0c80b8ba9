"""What the desktop is told when the window is not in front. Part of the composition root."""

from __future__ import annotations

from PySide6.QtCore import QProcess, QStandardPaths, QTimer
from PySide6.QtWidgets import QApplication

from app.views.main_window import MainWindow

SHOWN_MS = 8000
GONE_MS = 12_000  # a tray's icon stays until its message has surely been seen


class DesktopNotices:
    """Tells the desktop: through its tray, else through its notification service; the task bar's entry asks for attention.

    Args:
        window: what comes to the front when the notice is clicked.
    """

    def __init__(self, application: QApplication, window: MainWindow) -> None:
        self._application = application
        self._window = window

    def tell(self, heading: str, text: str) -> None:
        from PySide6.QtWidgets import QSystemTrayIcon

        self._application.alert(self._window)
        if not QSystemTrayIcon.isSystemTrayAvailable() or not QSystemTrayIcon.supportsMessages():
            # GNOME has no tray. Its service is spoken to by the command that every desktop brings for it.
            command = QStandardPaths.findExecutable("notify-send")
            if command:
                QProcess.startDetached(command, ["--app-name=Weft", "--", heading, text])
            return
        tray = QSystemTrayIcon(self._window.windowIcon(), self._window)
        tray.messageClicked.connect(self._window.come_to_front)
        tray.show()
        tray.showMessage(heading, text, self._window.windowIcon(), SHOWN_MS)
        QTimer.singleShot(GONE_MS, tray, tray.deleteLater)
