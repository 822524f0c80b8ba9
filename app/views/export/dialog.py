"""Merge and export in one dialog: choose, watch, see what came of it."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QRect, QSize, Qt, QTimer, Signal, Slot
from PySide6.QtWidgets import QDialog, QLabel, QProgressBar, QWidget

from app.core.certify_plan import Certificate
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import ExportResult
from app.core.jobs import Progress
from app.core.merge_plan import MergeResult
from app.core.push_plan import PushResult
from app.core.quantize_plan import QuantizeResult
from app.viewmodels.export import ExportDraft
from app.viewmodels.export_plans import Result
from app.viewmodels.units import readable_bytes, readable_seconds
from app.views.dialogs import reveal
from app.views.export.certificate import CertificateView
from app.views.export.form import ExportForm
from app.views.export.pages import FittedPages
from app.views.widgets import Banner, ElidedLabel, IconLabel, button, column, label, row, title

_FORM, _RUNNING, _DONE = range(3)
_LEAST = 400  # pixels of height: a window that is lower is no measure


class ExportDialog(QDialog):
    """One export.

    Signals:
        load_wanted(path): the result is to be loaded.
        base_wanted(ModelEntry or hub's name): this one is to be exported instead, or to be got.
    """

    load_wanted = Signal(str)
    base_wanted = Signal(object)

    def __init__(self, draft: ExportDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Merge and export")
        self.setAccessibleName("Merge and export")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setMinimumWidth(560)
        self._draft = draft
        self._path = ""
        self._turned = False
        draft.setParent(self)
        self.form = ExportForm(draft)
        self.pages = FittedPages(self.form, self._running_page(), self._done_page())
        self.error = Banner("negative")
        self.error.hide()
        self._build_buttons()
        self._title = title("Merge and export")
        whole = column(
            self._title, self.error, self.pages, self.form.note, parent=self, spacing=16, margins=(24, 24, 24, 16)
        )
        whole.addLayout(self._buttons)
        draft.changed.connect(self._show)
        draft.done.connect(self._done)
        draft.failed.connect(self._failed)
        draft.certified.connect(self._certified)
        draft.pushed.connect(self._pushed)
        draft.follow_failed.connect(self._follow_failed)
        self.form.base_wanted.connect(self._want_base)
        self.form.resized.connect(self._fit)
        self.resize(640, 480)
        self._show()
        self.form.name.setFocus()
        self.form.name.selectAll()

    def shows(self, job: int) -> bool:
        """Whether this dialog says itself how a job ends."""
        return self._draft.owns(job)

    def sizeHint(self) -> QSize:
        return QSize(640, self._wanted(640))

    def _build_buttons(self) -> None:
        self.start = button("Export", self._start, kind="primary")
        self.start.setDefault(True)
        self.pause = button("Pause", self._pause)
        self.stop = button("Cancel", self._draft.cancel)
        self.background = button(
            "Continue in the background", self.close, kind="link", tip="It goes on as a job; see Jobs"
        )
        self.show_it = button("Show in folder", self._reveal)
        self.load = button("Load it", self._load, kind="primary")
        self.close_button = button("Close", self.close)
        self._buttons = row(
            self.background, 1, self.pause, self.stop, self.close_button, self.show_it, self.load, self.start
        )

    def _running_page(self) -> QWidget:
        page = QWidget()
        self.target = ElidedLabel("", Qt.TextElideMode.ElideMiddle)
        self.phase = label()
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setAccessibleName("Progress of the export")
        self.figures = label(tone="muted")
        column(self.target, self.phase, self.bar, self.figures, 1, parent=page, spacing=8)
        return page

    def _done_page(self) -> QWidget:
        page = QWidget()
        self.outcome = label(wrap=True)
        self.place = ElidedLabel("", Qt.TextElideMode.ElideMiddle)
        self.notes = label(tone="muted", wrap=True, selectable=True)
        head = row(IconLabel("done", 24, "positive"), self.outcome, spacing=12)
        head.setStretch(1, 1)
        self.certificate = CertificateView()
        self.certificate.hide()
        self.uploaded = label(wrap=True, selectable=True)
        self.uploaded.hide()
        self.follow_error = Banner("warning")
        self.follow_error.hide()
        result = column(parent=page, spacing=8)
        result.addLayout(head)
        for widget in (self.place, self.notes, self._following_part(), self.certificate, self.uploaded):
            result.addWidget(widget)
        result.addWidget(self.follow_error)
        result.addStretch(1)
        return page

    def _following_part(self) -> QWidget:
        """The progress of what follows."""
        self.follow_phase = label()
        self.follow_bar = QProgressBar()
        self.follow_bar.setTextVisible(False)
        self.follow_bar.setAccessibleName("Progress of what follows")
        self.follow_figures = label(tone="muted")
        self.hold = button("Pause", self._pause)
        self.skip = button("Skip", self._draft.cancel_following)
        self.following = QWidget()
        whole = column(parent=self.following, spacing=4)
        first = row(self.follow_phase, self.hold, self.skip)
        first.setStretch(0, 1)
        whole.addLayout(first)
        whole.addWidget(self.follow_bar)
        whole.addWidget(self.follow_figures)
        self.following.hide()
        return self.following

    # State ----------------------------------------------------------------------------------------

    @Slot()
    def _show(self) -> None:
        draft = self._draft
        running = draft.running
        page = _DONE if self._path else _RUNNING if running else _FORM
        self._turn_to(page)
        self.form.note.setVisible(page == _FORM and bool(self.form.note.text.text()))
        self.start.setVisible(page == _FORM)
        self.start.setEnabled(not draft.problem() if page == _FORM else False)
        for shown, where in (
            (self.stop, _RUNNING),
            (self.background, _RUNNING),
            (self.show_it, _DONE),
            (self.load, _DONE),
        ):
            shown.setVisible(page == where)
        self.pause.setVisible(page == _RUNNING and not draft.waits_for_installation)
        self.pause.setEnabled(not draft.cancelling)
        self.stop.setEnabled(not draft.cancelling)
        self.pause.setText("Go on" if draft.paused else "Pause")
        self.pause.setAccessibleName(self.pause.text())
        self.close_button.setVisible(page != _RUNNING)
        if page == _RUNNING:
            self._show_progress()
        if page == _DONE:
            self._show_following()

    def _turn_to(self, page: int) -> None:
        if page == self.pages.currentIndex() and self._turned:
            return
        self._turned = True
        self.pages.setCurrentIndex(page)
        self._fit()

    @Slot()
    def _fit(self) -> None:
        QTimer.singleShot(0, self, self._fit_now)  # when the layout has taken it in
        QTimer.singleShot(0, self, self._fit_last)

    @Slot()
    def _fit_last(self) -> None:
        QTimer.singleShot(0, self, self._fit_now)  # and has broken its lines at the width that it has now

    @Slot()
    def _fit_now(self) -> None:
        self.form.hold_heights()
        self.resize(self.width(), self._wanted(self.width()))
        frame, room = self.frameGeometry(), self._room()
        if frame.bottom() > room.bottom():  # it has grown downwards from where it was opened
            self.move(self.x(), max(room.top(), room.bottom() + 1 - frame.height()))

    def _wanted(self, width: int) -> int:
        """The height that shows all of the page at a width; no more than the window below or the screen has."""
        layout = self.layout()
        assert layout is not None
        margins, spacing = layout.contentsMargins(), layout.spacing()
        width -= margins.left() + margins.right()
        parts = [self._title.sizeHint().height(), self.pages.wanted(width), self._buttons.sizeHint().height()]
        for banner in (self.error, self.form.note):
            if not banner.isHidden():
                parts.append(max(banner.heightForWidth(width), banner.minimumSizeHint().height()))
        height = margins.top() + margins.bottom() + spacing * (len(parts) - 1) + sum(parts)
        return min(height, self._room().height() - (self.frameGeometry().height() - self.height()))

    def _room(self) -> QRect:
        """Where it may stand: over its window, as far as that is on the screen."""
        screen, below = self.screen().availableGeometry(), self.parentWidget()
        room = screen if below is None else below.window().frameGeometry().intersected(screen)
        return room if room.height() >= _LEAST else screen

    def _show_progress(self) -> None:
        draft, progress = self._draft, self._draft.progress
        self.target.setText(str(draft.target))
        if draft.waits_for_installation:
            self._text(self.phase, "Installing what exports run in; the export follows by itself.")
        elif draft.cancelling:
            self._text(self.phase, "Cancelling…")
        elif progress is None:
            self._text(self.phase, "Waiting for its turn" if draft.job is not None else "Starting")
        else:
            self._text(self.phase, "Paused" if draft.paused else progress.phase)
        _advance(self.bar, progress)
        self._text(self.figures, self._figures(progress))

    def _show_following(self) -> None:
        job, progress = self._draft.following, self._draft.progress
        was = self.following.isVisible()
        self.following.setVisible(job is not None)
        if job is not None:
            doing = (
                "Comparing it with the base and its adapters" if job.task == "certify" else "Uploading it to the hub"
            )
            said = "paused" if self._draft.paused else progress.phase if progress is not None else ""
            self._text(self.follow_phase, f"{doing}: {said}" if said else doing)
            self.skip.setAccessibleName(f"Skip: {doing}")
            self.hold.setText("Go on" if self._draft.paused else "Pause")
            self.hold.setAccessibleName(f"{self.hold.text()}: {doing}")
            self.hold.setEnabled(progress is not None)  # what waits for its turn cannot be held
            _advance(self.follow_bar, progress)
            self._text(self.follow_figures, self._figures(progress))
        if was != (job is not None):
            self._fit()

    def _figures(self, progress: Progress | None) -> str:
        draft = self._draft
        parts: list[str] = []
        if progress is not None and progress.total and progress.unit == "bytes":
            parts.append(f"{readable_bytes(progress.done)} of {readable_bytes(progress.total)}")
            if draft.speed and not draft.paused:
                parts.append(f"{readable_bytes(draft.speed)}/s")
        elif progress is not None and progress.total:
            parts.append(f"{progress.done:,g} of {progress.total:,g} {progress.unit}")
        if draft.seconds_left is not None and not draft.paused:
            parts.append(f"{readable_seconds(draft.seconds_left)} left")
        return " · ".join(parts)

    @staticmethod
    def _text(shown: QLabel, text: str) -> None:
        if shown.text() != text:
            shown.setText(text)

    # Acts -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.error.hide()
        try:
            self._draft.start()
        except WeftError as error:
            self._failed(error)

    def _pause(self) -> None:
        self._draft.pause(not self._draft.paused)

    @Slot(object)
    def _failed(self, error: WeftError) -> None:
        self.error.setVisible(error.kind is not ErrorKind.CANCELLED)
        self.error.text.setText(str(error))
        self._show()
        self._fit()

    @Slot(object)
    def _done(self, result: Result) -> None:
        self._path = result.file if isinstance(result, ExportResult) else result.folder
        self.error.hide()
        self.outcome.setText(_outcome(result))
        self.place.setText(self._path)
        self.notes.setText("\n".join(result.notes))
        self.notes.setVisible(bool(result.notes))
        self._show()
        self.load.setDefault(True)

    @Slot(object)
    def _certified(self, found: Certificate) -> None:
        self.certificate.show_certificate(found)
        self.certificate.show()
        self._fit()

    @Slot(object)
    def _pushed(self, result: PushResult) -> None:
        who = "privately" if result.private else "for everybody"
        self.uploaded.setText(f"Uploaded {who}: {result.url}")
        self.uploaded.show()
        self._fit()

    @Slot(str, object)
    def _follow_failed(self, task: str, error: WeftError) -> None:
        if error.kind is ErrorKind.CANCELLED:
            return
        what = "It could not be compared" if task == "certify" else "It could not be uploaded"
        self.follow_error.text.setText(f"{what}. {error} Jobs offers to try again.")
        self.follow_error.show()
        self._fit()

    @Slot()
    def _want_base(self) -> None:
        self.base_wanted.emit(self._draft.base_here or self._draft.base)
        self.close()

    def _reveal(self) -> None:
        reveal(Path(self._path))

    def _load(self) -> None:
        self.load_wanted.emit(self._path)
        self.close()


def _advance(bar: QProgressBar, progress: Progress | None) -> None:
    fraction = progress.fraction if progress is not None else None
    bar.setRange(0, 0 if fraction is None else 1000)
    bar.setValue(round(1000 * (fraction or 0)))


def _outcome(result: Result) -> str:
    took = f"in {readable_seconds(result.seconds)}" if result.seconds >= 1 else "in under a second"
    if isinstance(result, MergeResult):
        how = (
            "Merged"
            if result.method == "streaming"
            else f"Merged by {result.method.upper()}, the whole model in memory"
        )
        again = f", {readable_bytes(result.resumed)} of it by an earlier run" if result.resumed else ""
        if not result.changed:
            return f"Unpacked: {readable_bytes(result.bytes)}{again}, {result.tensors} tensors, {took}."
        return f"{how}: {readable_bytes(result.bytes)}{again}, {result.changed} of {result.tensors} tensors changed, {took}."
    if isinstance(result, QuantizeResult):
        read = f"calibrated on {result.tokens:,} tokens, " if result.tokens else ""
        return (
            f"Quantized to {result.bits} bits by {result.method.upper()}: {readable_bytes(result.bytes)}, "
            f"{result.matrices} matrices, {read}{took}."
        )
    return f"Exported as {result.type.upper()}: {readable_bytes(result.bytes)}, {result.tensors} tensors, {took}."
