"""What is exported, to which format, under which name and where; and whether there is room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from PySide6.QtCore import Qt, Slot
from PySide6.QtWidgets import QCheckBox, QFileDialog, QFormLayout, QLineEdit, QWidget

from app.viewmodels.export import SAFETENSORS, ExportDraft
from app.views.option_fields import QuietCombo
from app.views.widgets import Banner, ElidedLabel, Fold, button, column, label, row

_SHARDS = (("As the base has them", 0), ("At most 2 GB each", 2 * 10**9), ("At most 5 GB each", 5 * 10**9))
_DTYPES = (("As the base has it", ""), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"))


class ExportForm(QWidget):
    """The first page of the dialog. It writes into the draft as things change."""

    def __init__(self, draft: ExportDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._draft = draft
        self.model = ElidedLabel(draft.entry.name)
        self.stack = label(_stack_words(draft), wrap=True)
        self.format = QuietCombo()
        self.format.setAccessibleName("Format")
        for choice in draft.choices:
            self.format.addItem(choice.title, choice.key)
        self.format.setCurrentIndex(max(0, self.format.findData(draft.format)))
        self.help = label(tone="muted", wrap=True)
        self.name = QLineEdit(draft.name)
        self.name.setAccessibleName("Name")
        self.name.setMaxLength(140)
        self.place = ElidedLabel(str(draft.folder), Qt.TextElideMode.ElideMiddle)
        self.change = button("Change…", self._change_place)
        self.change.setAccessibleName("Change the place")
        fields = QFormLayout()
        fields.setContentsMargins(0, 0, 0, 0)
        fields.setHorizontalSpacing(16)
        fields.setVerticalSpacing(8)
        fields.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
        for text, field in (
            ("Model", self.model),
            ("Adapters", self.stack),
            ("Format", self.format),
            ("", self.help),
            ("Name", self.name),
        ):
            fields.addRow(label(text, tone="muted"), field)
        place = row(self.place, self.change)
        place.setStretch(0, 1)
        fields.addRow(label("Place", tone="muted"), place)
        self.need = label(wrap=True, tone="muted")
        fields.addRow(label("Takes", tone="muted"), self.need)
        self.more = Fold("More options", self._more())
        for wrapped in (self.help, self.need):
            # A form gives a wrapped label the height it had at another width.
            wrapped.setMinimumHeight(2 * wrapped.fontMetrics().lineSpacing())
            wrapped.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.note = Banner("info")
        column(parent=self, spacing=12).addLayout(fields)
        layout = self.layout()
        assert layout is not None
        layout.addWidget(self.more)
        layout.addWidget(self.note)
        self.format.currentIndexChanged.connect(self._format_chosen)
        self.name.textChanged.connect(draft.set_name)
        draft.changed.connect(self.show_state)
        self.show_state()

    def _more(self) -> QWidget:
        options = self._draft.options
        self.imatrix = ElidedLabel("None", Qt.TextElideMode.ElideMiddle)
        self.choose_text = button("Choose a text…", self._choose_text)
        self.clear_text = button("Clear", self._clear_text, kind="link")
        self.modelfile = QCheckBox("Write a Modelfile for Ollama beside it")
        self.modelfile.setChecked(options.modelfile)
        self.modelfile.toggled.connect(self._modelfile)
        self.shards = self._combo("Weight files", _SHARDS, self._shards)
        self.dtype = self._combo("Precision", _DTYPES, self._dtype)
        text = row(self.imatrix, self.choose_text, self.clear_text)
        text.setStretch(0, 1)
        self._gguf = QWidget()
        sentence = "Importance matrix: a text like what the model will read, by which quantizing weighs what matters."
        inner = column(label(sentence, tone="muted", wrap=True), parent=self._gguf)
        inner.addLayout(text)
        inner.addWidget(self.modelfile)
        self._folder = QWidget()
        form = QFormLayout(self._folder)
        form.setContentsMargins(0, 0, 0, 0)
        form.addRow(label("Weight files", tone="muted"), self.shards)
        form.addRow(label("Precision", tone="muted"), self.dtype)
        holder = QWidget()
        column(self._gguf, self._folder, parent=holder, margins=(24, 0, 0, 0))
        return holder

    def _combo(self, name: str, items: tuple[tuple[str, object], ...], changed: Callable[[int], object]) -> QuietCombo:
        made = QuietCombo()
        made.setAccessibleName(name)
        for text, value in items:
            made.addItem(text, value)
        made.currentIndexChanged.connect(changed)
        return made

    # State ----------------------------------------------------------------------------------------

    @Slot()
    def show_state(self) -> None:
        """Show what follows from the choices."""
        draft = self._draft
        choice = draft.choice
        folder = draft.format == SAFETENSORS
        self.help.setText(choice.help if choice is not None else "")
        self._gguf.setVisible(not folder)
        self._folder.setVisible(folder)
        self.more.setVisible(bool(draft.choices))
        self.imatrix.setText(Path(draft.options.imatrix).name if draft.options.imatrix else "None")
        self.clear_text.setVisible(bool(draft.options.imatrix))
        self.place.setText(str(draft.folder))
        self.need.setText(draft.need().sentence if draft.choices else "–")
        problem = draft.problem()
        installs = "Exporting GGUF files needs one more engine: it is installed first, which takes a minute or more."
        memory = draft.need().problem if draft.choices else ""
        text = problem or memory or (installs if draft.needs_installation else "")
        self.note.setVisible(bool(text))
        self.note.text.setText(text)
        self.note.set_tone("negative" if problem else "warning" if memory else "info")

    @Slot(int)
    def _format_chosen(self, _index: int) -> None:
        self._draft.choose(self.format.currentData())
        choice = self._draft.choice
        if choice is not None and choice.imatrix:
            self.more.header.setChecked(True)

    def _change_place(self) -> None:
        chosen = QFileDialog.getExistingDirectory(self, "Where the result goes", str(self._draft.folder))
        if chosen:
            self._draft.set_folder(Path(chosen))

    def _choose_text(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(
            self, "Text for the importance matrix", "", "Texts (*.txt *.md);;All files (*)"
        )
        if chosen:
            self._draft.set_options(msgspec.structs.replace(self._draft.options, imatrix=chosen))

    def _clear_text(self) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, imatrix=""))

    @Slot(bool)
    def _modelfile(self, on: bool) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, modelfile=on))

    @Slot(int)
    def _shards(self, _index: int) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, shard_size=self.shards.currentData()))

    @Slot(int)
    def _dtype(self, _index: int) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, dtype=self.dtype.currentData()))


def _stack_words(draft: ExportDraft) -> str:
    return ", ".join(f"{a.name or Path(a.path).name} × {a.weight:g}" for a in draft.stack.adapters) or "None"
