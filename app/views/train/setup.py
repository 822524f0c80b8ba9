"""Setting a run up: base, data, method, settings, name; what it takes; and Start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QComboBox, QFileDialog, QFormLayout, QFrame, QLineEdit, QScrollArea, QSplitter, QWidget

from app.core.errors import WeftError
from app.training.data_config import DataConfig
from app.training.run_config import MethodConfig, ModelConfig, TrainConfig
from app.viewmodels.model_table import ModelTable
from app.viewmodels.train_draft import DATA_SUFFIXES, PRESETS, TrainDraft
from app.views.model_picker import ModelPicker
from app.views.options_form import OptionsForm
from app.views.train.preview import PreviewPane
from app.views.widgets import Banner, ElidedLabel, Fold, button, column, icon_button, label, row, title

CHANGED = "Own settings"
_DATA_LEFT_OUT = ("files", "mapping", "held_out_files", "max_length", "packing", "seed")


class TrainSetup(QWidget):
    """The page of a new run.

    Signals:
        started(job id). failed(WeftError).
    """

    started = Signal(int)
    failed = Signal(object)

    def __init__(
        self, draft: TrainDraft, *, make_table: Callable[[], ModelTable], parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._draft = draft
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
        self.base = button("Choose a model…", self.pick_model)
        self.base.setAccessibleName("Model to train on")
        self.model_form = OptionsForm(ModelConfig, leave_out=("path",))
        self.model_form.changed.connect(self._model_changed)
        self._section("Base", self.base, self.model_form)

    def _add_data(self) -> None:
        self.files = QWidget()
        self._files = column(parent=self.files, spacing=2)
        add = button("Add files…", self._add_files, icon_name="plus")
        folder = button("Add a folder…", self._add_folder, kind="link")
        buttons = QWidget()
        row(add, folder, 1, parent=buttons)
        self.hint = label(
            "Questions and answers, conversations, prompts with completions, preferences, or plain text. "
            "The format is recognised.",
            tone="muted",
            wrap=True,
        )
        self.columns = QWidget()
        self._columns = QFormLayout(self.columns)
        self._columns.setContentsMargins(0, 0, 0, 0)
        self._mapped: tuple[object, ...] = ()
        self.data_form = OptionsForm(DataConfig, leave_out=_DATA_LEFT_OUT)
        self.data_form.changed.connect(self._data_changed)
        more = Fold("Data options", self.data_form)
        self._section("Data", self.files, buttons, self.hint, self.columns, more)

    def _add_method(self) -> None:
        self.preset = QComboBox()
        self.preset.setAccessibleName("Preset")
        self.preset.addItems([*PRESETS, CHANGED])
        self.preset.activated.connect(self._preset_chosen)
        self.method_form = OptionsForm(MethodConfig, leave_out=("kind",))
        self.method_form.changed.connect(self._method_changed)
        self.train_form = OptionsForm(TrainConfig)
        self.train_form.changed.connect(self._train_changed)
        self._section("Method", self.preset, self.method_form)
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
        line = row(self.name, self.start)
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
        self._show_files()
        self._show_columns()
        for section, form in self._forms.items():
            if form.values() != draft.values[section]:
                form.set_values(draft.values[section])
        matching = next(
            (n for n, (m, t) in PRESETS.items() if m == draft.values["method"] and t == draft.values["train"]), CHANGED
        )
        self.preset.setCurrentText(matching)
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

    def _show_files(self) -> None:
        shown = [self._files.itemAt(place).widget() for place in range(self._files.count())]  # type: ignore[union-attr]
        if [widget.objectName() for widget in shown if widget is not None] == list(self._draft.files):
            return
        for widget in shown:
            if widget is not None:
                self._files.removeWidget(widget)
                widget.hide()
                widget.deleteLater()
        for path in self._draft.files:
            line = QWidget()
            line.setObjectName(path)
            name = ElidedLabel(path, Qt.TextElideMode.ElideMiddle)
            gone = icon_button("close", f"Leave {Path(path).name} out", lambda path=path: self._draft.remove_file(path))
            laid = row(name, gone, parent=line)
            laid.setStretch(0, 1)
            self._files.addWidget(line)

    def _show_columns(self) -> None:
        """The recognised columns, each changeable, where the data has columns."""
        result = self._draft.result
        files = [file for file in result.report.files if file.columns] if result is not None else []
        first = files[0] if files else None
        wanted = (first.format, first.columns, tuple(sorted(first.mapping.items()))) if first is not None else ()
        if wanted == self._mapped:
            return
        self._mapped = wanted
        while self._columns.rowCount():
            self._columns.removeRow(0)
        self.columns.setVisible(first is not None and bool(first.mapping))
        if first is None:
            return
        for field, now in first.mapping.items():
            combo = QComboBox()
            combo.setAccessibleName(f"Column of {field}")
            combo.addItems(list(first.columns))
            combo.setCurrentText(now)
            combo.activated.connect(lambda _i, field=field, combo=combo: self._map(field, combo.currentText()))
            self._columns.addRow(label(field, tone="muted"), combo)

    def _map(self, field: str, chosen: str) -> None:
        self._draft.set_mapping({**self._draft.mapping, field: chosen})

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

    def take(self, paths: list[Path]) -> None:
        """Take data files."""
        refused = self._draft.add_files(paths)
        if refused:
            from app.core.errors import ErrorKind

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
