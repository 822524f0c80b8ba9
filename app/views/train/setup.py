"""Setting a run up: base, data, method, settings, name; what it takes; and Start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QFileDialog, QFrame, QLineEdit, QMenu, QScrollArea, QSplitter, QVBoxLayout, QWidget

from app.core.errors import ErrorKind, WeftError
from app.training.data_config import DataConfig
from app.training.run_config import MethodConfig, ModelConfig, TrainConfig
from app.viewmodels.model_table import ModelTable
from app.viewmodels.train_draft import DATA_SUFFIXES, TrainDraft
from app.viewmodels.train_files import RunFiles
from app.viewmodels.train_presets import PRESETS
from app.views.icons import icon
from app.views.model_picker import ModelPicker
from app.views.option_fields import QuietCombo
from app.views.options_form import OptionsForm
from app.views.train.columns import ColumnsForm
from app.views.train.modules import ModulesChoice
from app.views.train.preview import PreviewPane
from app.views.widgets import Banner, ElidedLabel, Fold, button, column, icon_button, label, row, title

CHANGED = "Own settings"
RUN_SUFFIX = ".toml"
_DATA_LEFT_OUT = ("files", "mapping", "held_out_files", "max_length", "packing", "seed")


class TrainSetup(QWidget):
    """The page of a new run.

    Signals:
        started(job id). failed(WeftError).
    """

    started = Signal(int)
    failed = Signal(object)

    def __init__(
        self,
        draft: TrainDraft,
        *,
        make_table: Callable[[], ModelTable],
        run_files: RunFiles,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._draft = draft
        self._run_files = run_files
        self._make_table = make_table
        self._table: ModelTable | None = None
        self.preview = PreviewPane(draft)
        self.preview.setMinimumWidth(280)
        form = QWidget()
        self._form = column(parent=form, spacing=16, margins=(16, 16, 16, 16))
        self._add_base()
        self._add_data()
        self._add_method()
        self._form.addStretch(1)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setWidget(form)
        area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        left = QWidget()
        left.setMinimumWidth(360)
        inner = column(area, self._foot(), spacing=0, parent=left)
        inner.setStretch(0, 1)
        splitter = QSplitter(Qt.Orientation.Horizontal)
        splitter.setHandleWidth(1)
        splitter.setChildrenCollapsible(False)
        splitter.addWidget(left)
        splitter.addWidget(self.preview)
        splitter.setSizes([520, 520])
        column(splitter, parent=self)
        draft.changed.connect(self.show_state)
        self.show_state()

    # Building ---------------------------------------------------------------------------------------

    def _section(self, heading: str, *widgets: QWidget) -> None:
        holder = QWidget()
        column(title(heading, 0), *widgets, spacing=8, parent=holder)
        self._form.addWidget(holder)

    def _add_base(self) -> None:
        self.base = button("Choose a model…", self.pick_model, kind="picker")
        self.base.setAccessibleName("Model to train on")
        self.model_form = OptionsForm(ModelConfig, leave_out=("path",))
        self.model_form.changed.connect(self._model_changed)
        self._section("Base", self.base, self.model_form)

    def _add_data(self) -> None:
        self.files = QWidget()
        self._files = column(parent=self.files, spacing=2)
        add = button("Add files…", self._add_files, icon_name="plus")
        folder = button("Add a folder…", self._add_folder, kind="link")
        self.measure = button(
            "Measure on…", self._add_held_out, kind="link", tip="Files that are never trained on, instead of a share"
        )
        buttons = QWidget()
        row(add, folder, self.measure, 1, parent=buttons)
        self.held_out = QWidget()
        self._held_out = column(parent=self.held_out, spacing=2)
        self.hint = label(
            "Questions and answers, conversations, prompts with completions, preferences, or plain text. "
            "The format is recognised.",
            tone="muted",
            wrap=True,
        )
        self.columns = ColumnsForm(self._draft)
        self.data_form = OptionsForm(DataConfig, leave_out=_DATA_LEFT_OUT)
        self.data_form.changed.connect(self._data_changed)
        more = Fold("Data options", self.data_form)
        self._section("Data", self.files, self.held_out, buttons, self.hint, self.columns, more)

    def _add_method(self) -> None:
        self.preset = QuietCombo()
        self.preset.setAccessibleName("Preset")
        self.preset.addItems([*PRESETS, CHANGED])
        self.preset.activated.connect(self._preset_chosen)
        self.method_form = OptionsForm(MethodConfig, leave_out=("kind",))
        self.method_form.changed.connect(self._method_changed)
        self.train_form = OptionsForm(TrainConfig)
        self.train_form.changed.connect(self._train_changed)
        self.modules = ModulesChoice(self._draft)
        self._section("Method", self.preset, self.modules, self.method_form)
        self._section("Training", self.train_form)

    def _foot(self) -> QWidget:
        foot = QFrame()
        foot.setObjectName("foot")
        self.name = QLineEdit()
        self.name.setAccessibleName("Name of the adapter")
        self.name.setPlaceholderText("Name of the adapter")
        self.name.setMaxLength(120)
        self.name.textEdited.connect(self._draft.set_name)
        self.start = button("Start training", self._start, kind="primary")
        self.note = Banner("info", slim=True)
        self.need = label(tone="muted", wrap=True)
        self.more = icon_button("more", "Save, open or export this run", self.open_menu)
        line = row(self.name, self.more, self.start)
        line.setStretch(0, 1)
        layout = column(parent=foot, spacing=8, margins=(16, 8, 16, 12))
        layout.addWidget(self.note)
        layout.addWidget(self.need)
        layout.addLayout(line)
        return foot

    # State ------------------------------------------------------------------------------------------

    @Slot()
    def show_state(self) -> None:
        """Show the draft as it is."""
        draft = self._draft
        self.base.setText(draft.model.name.replace("&", "&&") if draft.model is not None else "Choose a model…")
        self._show_files(self._files, draft.files)
        self._show_files(self._held_out, draft.held_out_files, held_out=True)
        self.columns.show_columns()
        for section, form in self._forms.items():
            if form.values() != draft.values[section]:
                form.set_values(draft.values[section])
        self.preset.setCurrentText(draft.preset or CHANGED)
        if self.name.text() != draft.name:
            self.name.setText(draft.name)
        problem = draft.problem() or next((p for form in self._forms.values() for p in form.problems().values()), "")
        words, fits = draft.estimate_words()
        notes = draft.notes()
        text = problem or (" ".join(notes[:3]) if notes else "")
        self.note.setVisible(bool(text))
        self.note.text.setText(text)
        self.note.set_tone("warning" if problem else "info")
        self.need.setText(
            words if fits else f"{words} It may not fit: a smaller batch, or quantizing the base, takes less."
        )
        self.need.setVisible(bool(words))
        self.start.setEnabled(not problem)

    @property
    def _forms(self) -> dict[str, OptionsForm]:
        return {
            "model": self.model_form,
            "data": self.data_form,
            "method": self.method_form,
            "train": self.train_form,
        }

    def _show_files(self, laid: QVBoxLayout, files: tuple[str, ...], *, held_out: bool = False) -> None:
        shown = [laid.itemAt(place).widget() for place in range(laid.count())]  # type: ignore[union-attr]
        if [widget.objectName() for widget in shown if widget is not None] == list(files):
            return
        for widget in shown:
            if widget is not None:
                laid.removeWidget(widget)
                widget.hide()
                widget.deleteLater()
        before: QWidget = self.measure
        for path in files:
            line = QWidget()
            line.setObjectName(path)
            name = ElidedLabel(f"Measured on: {path}" if held_out else path, Qt.TextElideMode.ElideMiddle)
            gone = icon_button(
                "close",
                f"Leave {Path(path).name} out",
                lambda path=path: self._draft.remove_file(path, held_out=held_out),
            )
            row(name, gone, parent=line).setStretch(0, 1)
            laid.addWidget(line)
            self.setTabOrder(before, gone)  # new widgets would come last
            before = gone

    # Acts -------------------------------------------------------------------------------------------

    @Slot()
    def pick_model(self) -> None:
        """Choose the base from the library."""
        if self._table is None:
            self._table = self._make_table()
        picker = ModelPicker(self._table, self)
        picker.picked.connect(self._draft.set_model)
        picker.open_below(self.base)

    def _add_files(self) -> None:
        patterns = " ".join(f"*{suffix}" for suffix in DATA_SUFFIXES)
        chosen, _ = QFileDialog.getOpenFileNames(
            self, "Examples to train on", "", f"Examples ({patterns});;All files (*)"
        )
        if chosen:
            self.take([Path(path) for path in chosen])

    def _add_folder(self) -> None:
        chosen = QFileDialog.getExistingDirectory(self, "A folder of texts")
        if chosen:
            self.take([Path(chosen)])

    def _add_held_out(self) -> None:
        chosen, _ = QFileDialog.getOpenFileNames(self, "Examples to measure on", "", "All files (*)")
        if chosen:
            self.take([Path(path) for path in chosen], held_out=True)

    @Slot()
    def open_menu(self) -> QMenu:
        """The run as a file: open, save, export."""
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction(icon("open"), "Open a run.toml…", self._open_run)
        save = menu.addAction(icon("download"), "Save as run.toml…", self._save_run)
        export = menu.addAction(icon("export"), "Export for another machine…", self._export_run)
        ready = self._draft.model is not None and bool(self._draft.files) and bool(self._draft.name)
        save.setEnabled(ready)
        export.setEnabled(ready)
        menu.popup(self.more.mapToGlobal(self.more.rect().topLeft()))
        return menu

    def _open_run(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, "Open a run", "", "Training runs (*.toml)")
        if chosen:
            self._run_files.open(Path(chosen))

    def _save_run(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(
            self, "Save the run", f"{self._draft.name}.toml", "Training runs (*.toml)"
        )
        if chosen:
            self.save_run(Path(chosen))

    def save_run(self, path: Path) -> None:
        """Write the settings as a RUN.toml."""
        with self._said():
            self._run_files.save(self._draft.config(), path if path.suffix else path.with_suffix(".toml"))

    def _export_run(self) -> None:
        chosen = QFileDialog.getExistingDirectory(self, "Where the folder for the other machine goes")
        if chosen:
            self.export_run(Path(chosen) / f"{self._draft.name}-run")

    def export_run(self, folder: Path) -> None:
        """Write the folder that trains on another machine."""
        model = self._draft.model
        if model is not None:
            with self._said():
                self._run_files.export(self._draft.config(), model, folder)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except WeftError as error:
            self.failed.emit(error)
        except msgspec.ValidationError as error:
            self.failed.emit(WeftError(ErrorKind.BAD_INPUT, f"The settings cannot be used: {error}.", "Correct them."))

    def take(self, paths: list[Path], *, held_out: bool = False) -> None:
        """Take data files, or a RUN.toml."""
        runs = [path for path in paths if path.suffix.lower() == RUN_SUFFIX]
        for path in runs[:1]:
            self._run_files.open(path)
        paths = [path for path in paths if path not in runs]
        if not paths:
            return
        refused = self._draft.add_files(paths, held_out=held_out)
        if refused:
            names = ", ".join(refused[:5])
            kinds = ", ".join(DATA_SUFFIXES)
            self.failed.emit(
                WeftError(
                    ErrorKind.BAD_INPUT,
                    f"These hold no examples: {names}.",
                    f"Training reads {kinds} and folders of texts.",
                )
            )

    @Slot(int)
    def _preset_chosen(self, _index: int) -> None:
        name = self.preset.currentText()
        if name in PRESETS:
            self._draft.use_preset(name)

    @Slot()
    def _model_changed(self) -> None:
        self._changed("model")

    @Slot()
    def _data_changed(self) -> None:
        self._changed("data")

    @Slot()
    def _method_changed(self) -> None:
        self._changed("method")

    @Slot()
    def _train_changed(self) -> None:
        self._changed("train")

    def _changed(self, section: str) -> None:
        form = self._forms[section]
        if form.problems():
            self.show_state()
        else:
            self._draft.set_values(section, form.values())

    def _start(self) -> None:
        try:
            job = self._draft.start()
        except WeftError as error:
            self.failed.emit(error)
            return
        self.started.emit(job.id)
