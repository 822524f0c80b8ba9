"""Questions: what the house asks the user and tells of failures, one dialog at a time. Part of the composition root."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QObject, Slot
from PySide6.QtWidgets import QDialog

from app import logs
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.engine.environments import Environments
from app.viewmodels.loadout import CodeQuestion, Crash, FitQuestion, Loadout
from app.viewmodels.settings import EngineList
from app.views.main_window import MainWindow
from app.views.page import Notice


class HouseQuestions(QObject):
    """Dialogs of the loadout and the engines.

    Args:
        log_folder: where the logs lie that failures point to.
    """

    def __init__(
        self,
        window: MainWindow,
        loadout: Loadout,
        environments: Environments,
        engines: EngineList,
        log_folder: Path,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._window = window
        self._loadout = loadout
        self._environments = environments
        self._engines = engines
        self._logs = log_folder
        loadout.notice.connect(self.notice)
        loadout.load_failed.connect(self.load_failed)
        loadout.crashed.connect(self.crashed)
        loadout.fit_asked.connect(self.fit)
        loadout.code_asked.connect(self.code)

    @Slot(str)
    def notice(self, text: str) -> None:
        self._window.show_notice(Notice(text=text))

    @Slot(object)
    def load_failed(self, error: WeftError) -> None:
        def build() -> QDialog:
            from app.views.dialogs import ErrorDialog

            log = self._loadout.log_path
            return ErrorDialog(error, self._window, log=log if log is not None and log.exists() else None)

        self._window.show_dialog(build)

    @Slot(object)
    def crashed(self, crash: Crash) -> None:
        chat = self._window.built("chat")
        if crash.lost and crash.again and self._window.current == "chat" and chat is not None:
            if chat.answer_in_view:  # type: ignore[attr-defined]
                return  # told once, in the answer that broke off, with a way on and the log

        def build() -> QDialog:
            from app.views.dialogs import CrashDialog

            log = Path(crash.log) if crash.log else None
            return CrashDialog(crash.error, log, self._loadout.load_again if crash.again else None, self._window)

        self._window.show_dialog(build)

    @Slot(object)
    def fit(self, question: FitQuestion) -> None:
        def build() -> QDialog:
            from app.views.dialogs import ConfirmDialog

            return ConfirmDialog(
                "This model may not fit",
                f"{question.entry.name}: {question.message}",
                "Load anyway",
                lambda: self._loadout.load(question.entry, question.loader.id, question.options, anyway=True),
                self._window,
                hint="Other programs may become slow, or the system may end the engine. "
                "A shorter context length, or a smaller quantization of the model, takes less.",
            )

        self._window.show_dialog(build)

    @Slot(object)
    def code(self, question: CodeQuestion) -> None:
        def allow() -> None:
            self._loadout.planner.allow_code(question.entry, question.digest)
            self._code_decided()
            self._loadout.load(question.entry, question.loader.id, question.options)

        self._show_code(question.entry, question.files, "Allow and load", allow)

    @Slot(object)
    def review_code(self, entry: ModelEntry) -> None:
        try:
            code = self._loadout.planner.code(entry)
        except WeftError as error:
            self._window.show_error(error)
            return

        def allow() -> None:
            self._loadout.planner.allow_code(entry, code.digest)
            self._code_decided()

        self._show_code(entry, code.files, "Allow", allow)

    def _show_code(self, entry: ModelEntry, files: tuple[str, ...], yes: str, allow: object) -> None:
        def build() -> QDialog:
            from app.views.dialogs import ConfirmDialog

            return ConfirmDialog(
                "This model wants to run its own code",
                f"{entry.name} brings Python files that run with your rights: they can read, change and send your files. "
                "Allow it only if you trust who made the model.",
                yes,
                allow,  # type: ignore[arg-type]
                self._window,
                danger=True,
                hint="The permission holds for exactly these files. If they change, Weft asks again.",
                files=[Path(entry.path, name) for name in files],
            )

        self._window.show_dialog(build)

    def _code_decided(self) -> None:
        page = self._window.built("models")
        if page is not None:
            page.code_decided()  # type: ignore[attr-defined]

    @Slot(str)
    def removal(self, name: str) -> None:
        def build() -> QDialog:
            from app.views.dialogs import ConfirmDialog

            spec = self._environments.spec(name)
            loader = self._loadout.loader
            in_use = loader is not None and loader.environment == name

            def remove() -> None:
                if in_use:
                    self._loadout.unload()
                self._engines.remove(name)

            return ConfirmDialog(
                f"Remove {spec.title}?",
                f"Its files are deleted. Installing it again takes about {spec.minutes} minutes and fetches it anew."
                + (" The loaded model is ejected." if in_use else ""),
                "Remove",
                remove,
                self._window,
                danger=True,
            )

        self._window.show_dialog(build)

    @Slot(str, str)
    def unexpected(self, summary: str, trace: str) -> None:
        def build() -> QDialog:
            from app.views.dialogs import ErrorDialog

            error = WeftError(
                ErrorKind.INTERNAL,
                f"Weft met something unexpected. {summary}",
                "Your work is kept. Please report this with the log.",
            )
            return ErrorDialog(error, self._window, details=trace, log=self._logs / logs.FILE)

        self._window.show_dialog(build)
