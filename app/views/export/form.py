"""What is exported, to which format, under which name and where; and whether there is room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QCheckBox, QFileDialog, QFormLayout, QLineEdit, QWidget

from app.viewmodels.export import ExportDraft
from app.viewmodels.export_choices import SAFETENSORS
from app.views.export.calibration import CalibrationFields
from app.views.export.formats import FormatCombo
from app.views.option_fields import QuietCombo
from app.views.widgets import Banner, ElidedLabel, Fold, button, column, label, row

_SHARDS = (("As the base has them", 0), ("At most 2 GB each", 2 * 10**9), ("At most 5 GB each", 5 * 10**9))
_DTYPES = (("As the base has it", ""), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"))


class ExportForm(QWidget):
    """The first page of the dialog. It writes into the draft as things change.

    Signals:
        base_wanted: the 16-bit model that a quantized one was made from is to be used, or to be got.
        resized: it takes another height now.
    """

    base_wanted = Signal()
    resized = Signal()

    def __init__(self, draft: ExportDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._draft = draft
        self.model = ElidedLabel(draft.entry.name)
        self.stack = label(_stack_words(draft), wrap=True)
        self.format = FormatCombo(draft.choices)
        self.format.setCurrentIndex(self.format.findData(draft.format))
        self.help = label(tone="muted", wrap=True)
        self.name = QLineEdit(draft.name)
        self.name.setAccessibleName("Name")
        self.name.setMaxLength(140)
        self.place = ElidedLabel(str(draft.folder), Qt.TextElideMode.ElideMiddle)
        self.change = button("Change…", self._change_place)
        self.change.setAccessibleName("Change the place")
        self._fields = fields = QFormLayout()
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
        fields.addRow(label("Then", tone="muted"), self._then())
        self.more = Fold("More options", self._more())
        self.more.toggled.connect(self.resized)
        for wrapped in (self.help, self.need):
            # A form gives a wrapped label the height it had at another width.
            wrapped.setMinimumHeight(2 * wrapped.fontMetrics().lineSpacing())
            wrapped.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.note = Banner("info")  # what stands in the way: the dialog shows it above its buttons, never scrolled away
        self.use_base = button("", self.base_wanted.emit)
        self.base_note = Banner("info")
        self.base_note.add(self.use_base)
        column(parent=self, spacing=12).addLayout(fields)
        layout = self.layout()
        assert layout is not None
        layout.addWidget(self.more)
        layout.addWidget(self.base_note)
        self.format.currentIndexChanged.connect(self._format_chosen)
        self.name.textChanged.connect(draft.set_name)
        draft.changed.connect(self.show_state)
        self.show_state()

    def _then(self) -> QWidget:
        """What follows: the certificate, the upload."""
        options = self._draft.options
        self.certify = QCheckBox("Compare it with the base and its adapters (certificate)")
        self.certify.setChecked(options.certify)
        self.certify.toggled.connect(lambda on: self._set(certify=on))
        self.text = ElidedLabel("", Qt.TextElideMode.ElideMiddle)
        self.text.setProperty("tone", "muted")
        self.own_text = button("Over a text of yours…", self._choose_certificate_text, kind="link")
        self.our_text = button("Over ours", lambda: self._set(text=""), kind="link")
        self._texts = QWidget()
        texts = row(self.text, self.own_text, self.our_text, parent=self._texts, margins=(24, 0, 0, 0))
        texts.setStretch(0, 1)
        self.push = QCheckBox("Upload it to the hub")
        self.push.setChecked(options.push is not None)
        self.push.toggled.connect(self._push)
        self.repo = QLineEdit(options.push or "")
        self.repo.setAccessibleName("Name on the hub")
        self.repo.setPlaceholderText("user/name")
        self.repo.textChanged.connect(self._push)
        self.private = QCheckBox("Private")
        self.private.setChecked(options.private)
        self.private.toggled.connect(lambda on: self._set(private=on))
        self._hub = QWidget()
        hub = row(self.repo, self.private, parent=self._hub, margins=(24, 0, 0, 0))
        hub.setStretch(0, 1)
        holder = QWidget()
        column(self.certify, self._texts, self.push, self._hub, spacing=4, parent=holder)
        return holder

    def _set(self, **options: object) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, **options))

    def _push(self, _: object = None) -> None:
        if self.push.isChecked() and not self.repo.text() and not self.repo.hasFocus():
            self.repo.setText(self._draft.name)  # calls this again
            return
        self._set(push=self.repo.text().strip() if self.push.isChecked() else None)

    def _choose_certificate_text(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(
            self, "Text for the certificate", "", "Texts (*.txt *.md);;All files (*)"
        )
        if chosen:
            self._set(text=chosen)

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
        self._imatrix = QWidget()
        column(label(sentence, tone="muted", wrap=True), parent=self._imatrix).addLayout(text)
        column(self._imatrix, self.modelfile, parent=self._gguf)
        self._folder = QWidget()
        form = QFormLayout(self._folder)
        form.setContentsMargins(0, 0, 0, 0)
        form.addRow(label("Weight files", tone="muted"), self.shards)
        form.addRow(label("Precision", tone="muted"), self.dtype)
        self.calibrated = CalibrationFields(self._draft)
        holder = QWidget()
        column(self._gguf, self._folder, self.calibrated, parent=holder, margins=(24, 0, 0, 0))
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
        folder = draft.makes_folder
        self.help.setText(choice.help if choice is not None else "")
        self._gguf.setVisible(not folder)
        self._folder.setVisible(folder and not draft.method)
        self.calibrated.setVisible(bool(draft.method))
        self.calibrated.show_state()
        if not draft.choices:  # nothing can be made of it: there is nothing to choose then
            for place in range(2, self._fields.rowCount()):
                self._fields.setRowVisible(place, False)
        self.more.setVisible(bool(draft.choices))
        self._imatrix.setVisible(draft.takes_imatrix)
        self.dtype.setEnabled(draft.format == SAFETENSORS)
        self._texts.setVisible(draft.options.certify)
        self.text.setText(f"Over {Path(draft.options.text).name}" if draft.options.text else "Over a text of ours")
        self.our_text.setVisible(bool(draft.options.text))
        self._hub.setVisible(draft.options.push is not None)
        self._show_base()
        self.imatrix.setText(Path(draft.options.imatrix).name if draft.options.imatrix else "None")
        self.clear_text.setVisible(bool(draft.options.imatrix))
        self.place.setText(str(draft.folder))
        if self.name.text().strip() != draft.name:  # another one was proposed, which is not the user's choice
            self.name.blockSignals(True)
            self.name.setText(draft.name)
            self.name.blockSignals(False)
        self.need.setText(draft.need().sentence if draft.choices else "–")
        problem = draft.problem()
        memory = draft.need().problem if draft.choices else ""
        text = problem or memory or draft.installation
        if self.note.text.text() != text:
            self.note.text.setText(text)
            self.resized.emit()
        self.note.set_tone("negative" if problem else "warning" if memory else "info")

    def hold_heights(self) -> None:
        """Give each banner the height of its text at this width: a stack of pages asks for that of one line alone."""
        for banner in (self.note, self.base_note):
            text = banner.text
            text.setMinimumHeight(text.heightForWidth(text.width()) if banner.isVisible() else 0)

    def _show_base(self) -> None:
        draft = self._draft
        if self.base_note.isHidden() == bool(draft.base):
            self.base_note.setVisible(bool(draft.base))
            self.resized.emit()
        here = draft.base_here
        if not draft.base:
            return
        if draft.choices:
            text = _origin_words(draft)
        else:
            text = f"{draft.base} is in your library." if here is not None else f"{draft.base} can be downloaded."
        self.use_base.setVisible(draft.base_to_get)
        self.base_note.text.setText(text)
        self.use_base.setText("Use it" if here is not None else "Find it on the hub")
        self.use_base.setAccessibleName(f"{self.use_base.text()}: {draft.base}")

    @Slot(int)
    def _format_chosen(self, _index: int) -> None:
        self._draft.choose(self.format.currentData())
        choice = self._draft.choice
        if (choice is not None and choice.imatrix) or self._draft.method:
            self.more.header.setChecked(True)
        self.resized.emit()

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


def _origin_words(draft: ExportDraft) -> str:
    base, adapters = draft.base, draft.origin.adapters
    where = "" if draft.base_to_get else " It is not in your library now."
    if adapters:
        return f"{draft.entry.name} was made from {base} with {adapters}. Exported from that, nothing is lost.{where}"
    return f"{draft.entry.name} was made from {base}. Merged into that, nothing is lost.{where}"


def _stack_words(draft: ExportDraft) -> str:
    return ", ".join(f"{a.name or Path(a.path).name} × {a.weight:g}" for a in draft.stack.adapters) or "None"
