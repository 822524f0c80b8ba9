"""The details of one model: what it needs, its loader, the loader's options, and everything its header says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from PySide6.QtCore import Qt, QTimer, Signal, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QFormLayout, QFrame, QMenu, QProgressBar, QScrollArea, QVBoxLayout, QWidget

from app import backends
from app.backends.base import Spec
from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.memory import Machine
from app.core.options import OptionField, OptionValue, build, describe
from app.store.model_settings import ModelSettings
from app.viewmodels.background import Background
from app.viewmodels.fitting import breakdown, judge
from app.viewmodels.jobs import progress_text
from app.viewmodels.loadout import Loadout, LoadoutState
from app.viewmodels.model_facts import ModelFacts, read_facts
from app.viewmodels.model_table import format_title
from app.viewmodels.units import readable_bytes, readable_count, readable_tokens, readable_when
from app.views.dialogs import text_box
from app.views.option_fields import QuietCombo
from app.views.options_form import OptionsForm
from app.views.widgets import Banner, Chip, ElidedLabel, Fold, button, column, icon_button, label, row, title
from app.workers.load_plan import shortage

SAVE_MS = 400
MOST_ADAPTERS = 40  # shown of those that fit


class ModelDetails(QFrame):
    """The panel at the right of the Models page.

    Signals:
        failed(WeftError); code_wanted(ModelEntry): the files that would run are to be shown.
        adapter_wanted(AdapterEntry): show this adapter, which fits the model.

    Args:
        adapters: those of the library that fit a model, as (adapter, modules matched, modules), the best first; reads files.
    """

    failed = Signal(object)
    code_wanted = Signal(object)
    adapter_wanted = Signal(object)
    closed = Signal()

    def __init__(
        self,
        *,
        loadout: Loadout,
        model_settings: ModelSettings,
        machine: Callable[[], Machine],
        make_menu: Callable[[ModelEntry, QWidget], QMenu],
        show_advanced: bool = False,
        adapters: Callable[[ModelEntry], list[tuple[AdapterEntry, int, int]]] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("panel")
        self._loadout = loadout
        self._model_settings = model_settings
        self._machine = machine
        self._make_menu = make_menu
        self._show_advanced = show_advanced
        self.entry: ModelEntry | None = None
        self._spec: Spec | None = None
        self._forms: dict[str, OptionsForm] = {}
        self.form: OptionsForm | None = None
        self._background = Background(self)
        self._background.done.connect(self._facts_read)
        self._adapters = adapters
        self._adapters_of = ""
        self._fitting = Background(self)
        self._fitting.done.connect(self._adapters_read)
        self._save_later = QTimer(self)
        self._save_later.setSingleShot(True)
        self._save_later.setInterval(SAVE_MS)
        self._save_later.timeout.connect(self.save)
        self._build()
        loadout.changed.connect(self._show_actions)

    # Building ---------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._title = title("")
        self._title.setWordWrap(True)
        self._path = ElidedLabel(mode=Qt.TextElideMode.ElideMiddle)
        self._path.setProperty("tone", "muted")
        copy = icon_button("copy", "Copy path", self._copy_path)
        self._more = icon_button("more", "More actions", self._open_menu)
        close = icon_button("close", "Hide details", self.closed.emit, shortcut="Ctrl+B")
        top = row(self._title, self._more, close, spacing=4)
        top.setStretch(0, 1)
        top.setAlignment(self._more, Qt.AlignmentFlag.AlignTop)
        top.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        place = row(self._path, copy, spacing=4)
        self._chips = [Chip() for _ in range(3)]
        chips = row(*self._chips, 1, spacing=4)
        self._problem = Banner("negative")
        self._load = button("Load", self.load, kind="primary", icon_name="load")
        self._unload = button("Unload", self._loadout.unload, icon_name="eject")
        self._cancel = button("Cancel", self._loadout.cancel_load)
        self._load.setMinimumWidth(_widest(self._load, "Reload to apply"))
        self._bar = QProgressBar()
        self._bar.setTextVisible(False)
        self._bar.setFixedWidth(96)
        self._bar.setAccessibleName("Loading")
        self._phase = ElidedLabel()
        self._phase.setProperty("tone", "muted")
        actions = row(self._load, self._unload, self._cancel, self._bar, self._phase)
        actions.setStretch(4, 1)
        self._estimate = Banner("info")
        # Two lines, whatever they say: what is below stays where it is while options change.
        self._estimate.text.setMinimumHeight(2 * self._estimate.text.fontMetrics().lineSpacing())
        self._loader = QuietCombo()
        self._loader.setAccessibleName("Loader")
        self._loader.currentIndexChanged.connect(self._loader_chosen)
        self._loader_help = label(tone="muted", wrap=True)
        self._code = Banner("warning")
        self._code_button = button("Review…", self._review_code, kind="link")
        self._code.add(self._code_button)
        self._saved = label(tone="muted")
        self._restore = button("Restore defaults", self.restore, kind="link")
        keep = self._restore.sizePolicy()
        keep.setRetainSizeWhenHidden(True)
        self._restore.setSizePolicy(keep)
        saved = row(self._saved, 1, self._restore)
        self._form_place: QVBoxLayout = column(spacing=0)
        self._facts = QFormLayout()
        self._facts.setContentsMargins(4, 0, 0, 0)
        self._facts.setHorizontalSpacing(16)
        self._facts.setVerticalSpacing(4)
        self._facts.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        facts = QWidget()
        facts.setLayout(self._facts)
        self._facts_fold = Fold("About this model", facts)
        self._header_box = text_box(name="The file's header")
        self._header_box.setMinimumHeight(240)
        self._header_fold = Fold("Everything the file says", self._header_box)
        self._header_fold.toggled.connect(self._read_facts)
        self._template_box = text_box(name="Chat template")
        self._template_box.setMinimumHeight(200)
        self._template_fold = Fold("Chat template", self._template_box)
        self._template_fold.toggled.connect(self._read_facts)
        self._adapter_rows = column(spacing=0)
        listed = QWidget()
        listed.setLayout(self._adapter_rows)
        self._adapters_fold = Fold("Adapters that fit", listed)
        self._adapters_fold.setVisible(self._adapters is not None)
        self._adapters_fold.toggled.connect(self._read_adapters)
        inside = QWidget()
        body = column(spacing=12, margins=(16, 16, 16, 16), parent=inside)
        for item in (
            top,
            place,
            chips,
            self._problem,
            actions,
            self._estimate,
            self._loader_row(),
            self._loader_help,
            self._code,
        ):
            body.addWidget(item) if isinstance(item, QWidget) else body.addLayout(item)
        body.addLayout(saved)
        body.addLayout(self._form_place)
        for fold in (self._adapters_fold, self._facts_fold, self._header_fold, self._template_fold):
            body.addWidget(fold)
        body.addStretch(1)
        scroll = QScrollArea()
        scroll.setWidgetResizable(True)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setWidget(inside)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._scroll = scroll
        column(scroll, spacing=0, parent=self)
        self.setMinimumWidth(320)

    def _loader_row(self) -> QWidget:
        holder = QWidget()
        name = label("Loader")
        name.setBuddy(self._loader)
        made = row(name, self._loader, spacing=16, parent=holder)
        made.setStretch(1, 1)
        return holder

    # Showing ----------------------------------------------------------------------------------------

    def show_entry(self, entry: ModelEntry | None) -> None:
        """Show a model, with what is saved for it. Unsaved changes of the one before are saved first."""
        if self._save_later.isActive():
            self._save_later.stop()
            self.save()
        before, self.entry = self.entry, entry
        if body := self._scroll.widget():
            body.setVisible(entry is not None)
        if entry is None:
            return
        if before is None or before.id != entry.id:
            self._scroll.verticalScrollBar().setValue(0)
            self._header_box.clear()
            self._template_box.clear()
            self._facts_of = ""
            self._adapters_of = ""
        self._title.setText(entry.name)
        self._path.setText(entry.path)
        self._problem.setVisible(bool(entry.problem))
        self._problem.text.setText(entry.problem)
        self._show_loaders()
        self._show_facts()
        if self._adapters_fold.header.isChecked():
            self._read_adapters(True)
        if self._header_fold.header.isChecked() or self._template_fold.header.isChecked():
            self._read_facts(True)

    def set_show_advanced(self, shown: bool) -> None:
        """Unfold or fold the advanced part of every form, those shown already and those to come."""
        self._show_advanced = shown
        for form in self._forms.values():
            form.show_advanced(shown)

    def refresh_estimate(self) -> None:
        """Free memory moved."""
        if self.entry is not None:
            self._show_estimate()

    def _show_loaders(self) -> None:
        entry = self.entry
        assert entry is not None
        cuda = bool(self._machine().gpus)
        chosen = self._model_settings.get(entry.id)[0]
        self._loader.blockSignals(True)
        self._loader.clear()
        automatic = self._automatic(entry)
        self._loader.addItem(f"Automatic ({automatic.title})" if automatic is not None else "Automatic", "")
        for spec in backends.specs().values():
            reason = backends.refusal(spec, entry, cuda=cuda)
            self._loader.addItem(spec.title, spec.id)
            place = self._loader.count() - 1
            self._loader.setItemData(place, reason or spec.summary, Qt.ItemDataRole.ToolTipRole)
            if reason:
                self._loader.model().item(place).setEnabled(False)  # type: ignore[attr-defined]
        place = self._loader.findData(chosen or "")
        self._loader.setCurrentIndex(max(0, place))
        self._loader.blockSignals(False)
        self._show_loader()

    def _automatic(self, entry: ModelEntry) -> Spec | None:
        try:
            return (
                self._loadout.planner.choose_loader(entry)
                if not self._model_settings.get(entry.id)[0]
                else backends.choose(entry, ready=lambda _: True, cuda=bool(self._machine().gpus))
            )
        except WeftError:
            return None

    @Slot(int)
    def _loader_chosen(self, _index: int) -> None:
        if self.entry is None:
            return
        try:
            self._model_settings.set(self.entry.id, self._loader.currentData() or None)
        except WeftError as error:
            self.failed.emit(error)
        self._show_loader()

    def _show_loader(self) -> None:
        entry = self.entry
        assert entry is not None
        chosen = self._loader.currentData()
        self._spec = backends.specs().get(chosen) if chosen else self._automatic(entry)
        spec = self._spec
        if self.form is not None:
            self.form.hide()
            self.form = None
        if spec is None:
            reasons = {
                backends.refusal(s, entry, cuda=bool(self._machine().gpus))
                for s in backends.specs().values()
                if entry.format in s.formats
            }
            self._loader_help.setText(
                " ".join(sorted(filter(None, reasons))) or f"No loader takes {entry.format.value} models yet."
            )
        else:
            self._loader_help.setText(spec.summary)
            self.form = self._form_of(spec)
            self.form.suggest(_suggestions(entry, spec))
            self.form.set_values(self._loadout.planner.saved_options(entry, spec))
            self.form.show()
        self._show_code()
        self._show_estimate()
        self._show_saved()
        self._show_actions()

    def _form_of(self, spec: Spec) -> OptionsForm:
        if spec.id not in self._forms:
            made = OptionsForm(spec.options, advanced_open=self._show_advanced)
            made.changed.connect(self._options_changed)
            self._forms[spec.id] = made
            self._form_place.addWidget(made)
        return self._forms[spec.id]

    def _show_saved(self) -> None:
        changed = bool(self.form is not None and self.form.values())
        kept = "Saved, but it does not fit" if self._lacking else "Saved for this model"
        self._saved.setText(kept if changed else "Default options")
        self._restore.setVisible(changed)

    def _show_code(self) -> None:
        entry = self.entry
        needs = entry is not None and bool(entry.custom_code)
        self._code.setVisible(needs)
        if not needs or entry is None:
            return
        try:
            count = len(self._loadout.planner.code(entry).files)
        except WeftError as error:
            self._code.set_tone("warning")
            self._code.text.setText(f"{error.message} It does not run.")
            self._code_button.hide()
            return
        self._code_button.show()
        files = "1 Python file" if count == 1 else f"{count} Python files"
        if self._loadout.planner.trusts_code(entry):
            self._code.set_tone("info")
            self._code.text.setText(f"This model may run its own code ({files}), as you allowed.")
            self._code_button.setText("Withdraw")
        else:
            self._code.set_tone("warning")
            self._code.text.setText(f"This model brings its own code ({files}). It does not run unless you allow it.")
            self._code_button.setText("Review…")

    def _show_estimate(self) -> None:
        entry, spec = self.entry, self._spec
        if entry is None or spec is None or self.form is None or entry.problem:
            for chip in self._chips:
                chip.set("")
            if entry is not None:
                self._chips[0].set(format_title(entry))
            self._estimate.hide()
            self._lacking = ""
            return
        here = self._machine()
        values = {} if self.form.problems() else self.form.values()
        found = judge(entry, here, spec, values)
        words = {"positive": f"Fits {found.word}", "negative": "Does not fit"}
        self._chips[0].set(format_title(entry))
        self._chips[1].set(readable_count(entry.parameters) if entry.parameters else "")
        self._chips[2].set(words.get(found.tone, ""), found.tone)
        self._chips[2].setToolTip(found.numbers)
        self._estimate.setVisible(found.estimate is not None)
        if found.estimate is None:
            self._advise("")
            return
        freed = self._loadout.memory
        lacking = shortage(found.estimate, here, freed=freed)
        free = f"{readable_bytes(here.ram_free)} of memory is free"
        if here.gpus:
            free += f", and {readable_bytes(here.vram_free)} of graphics memory"
        self._estimate.set_tone("warning" if lacking else "info")
        self._estimate.text.setText(
            f"{lacking} A shorter context length helps."
            if lacking
            else f"Needs about {readable_bytes(found.estimate.total)}; {free}."
        )
        self._estimate.setToolTip(breakdown(found.estimate, here))
        self._advise(lacking)

    _lacking = ""

    def _advise(self, lacking: str) -> None:
        """Say at the field what its value will bring, before anything is loaded.

        Args:
            lacking: why a load with these options does not fit; "" when it does.
        """
        entry, form = self.entry, self.form
        self._lacking = lacking
        if entry is None or form is None:
            return
        values, trained = form.values(), entry.shape.context
        advice: dict[str, str] = {}
        stretched = any("rope" in name or name in ("alpha_value", "compress_pos_emb") for name in values)
        for name in _context_fields(form.fields.values()):
            value = values.get(name)
            if trained and not stretched and isinstance(value, int) and value > trained:
                advice[name] = (
                    f"The model was trained for {trained:,} tokens. Beyond that its answers lose their sense, "
                    "and the memory is taken all the same."
                )
            if lacking and value is not None:
                advice[name] = f"{lacking} {advice.get(name, '')}".strip()
        if lacking and form.last_changed in values and form.last_changed not in advice:
            advice[form.last_changed] = lacking
        form.advise(advice)

    @Slot()
    def _show_actions(self) -> None:
        entry = self.entry
        if entry is None:
            return
        now = self._loadout
        this = now.model is not None and now.model.id == entry.id
        loading = this and now.state in (LoadoutState.STARTING, LoadoutState.LOADING)
        loaded = this and now.is_loaded
        self._load.setText("Reload to apply" if self.differs else "Reload" if loaded else "Load")
        self._load.setAccessibleName(self._load.text())
        self._load.setVisible(not loading)
        self._load.setEnabled(self._spec is not None and not (self.form is not None and self.form.problems()))
        self._unload.setVisible(loaded)
        self._cancel.setVisible(loading)
        self._bar.setVisible(loading)
        self._phase.setText(progress_text(now.load_progress) if loading else "")
        fraction = now.load_progress.fraction if now.load_progress is not None else None
        self._bar.setRange(0, 0 if fraction is None else 1000)
        if fraction is not None:
            self._bar.setValue(round(1000 * fraction))

    @property
    def differs(self) -> bool:
        """Whether the model shown is loaded, with other options or another loader than the form says."""
        now, entry = self._loadout, self.entry
        if entry is None or self.form is None or now.model is None or now.model.id != entry.id or not now.is_loaded:
            return False
        other = now.loader is not None and self._spec is not None and now.loader.id != self._spec.id
        return other or self.form.values() != now.options

    def _show_facts(self) -> None:
        entry = self.entry
        assert entry is not None
        while self._facts.rowCount():
            self._facts.removeRow(0)
        shape = entry.shape
        experts = f", {shape.experts} experts" if shape.experts else ""
        lines = [
            ("Architecture", entry.architecture or entry.model_type),
            ("Parameters", f"{entry.parameters:,}" if entry.parameters else ""),
            (
                "Size",
                f"{readable_bytes(entry.bytes)} in {len(entry.files)} file{'s' if len(entry.files) != 1 else ''}"
                if entry.files
                else "",
            ),
            ("Context", f"{readable_tokens(shape.context)} tokens" if shape.context else ""),
            ("Layers", f"{shape.layers}, {shape.hidden:,} wide{experts}" if shape.layers else ""),
            (
                "Attention",
                f"{shape.heads} heads, {shape.kv_heads or shape.heads} for keys and values" if shape.heads else "",
            ),
            ("Vocabulary", f"{shape.vocabulary:,} tokens" if shape.vocabulary else ""),
            ("Chat template", "yes" if entry.has_chat_template else "none: a plain one is used"),
            ("Vision", "yes" if entry.vision else ""),
            ("Projector", entry.mmproj),
            ("Root", entry.root),
            ("Changed", readable_when(entry.modified)),
            ("Last used", readable_when(entry.last_used)),
            ("Read-only", "yes, it belongs to another program" if entry.read_only else ""),
        ]
        for name, value in lines:
            if value:
                self._facts.addRow(label(name, tone="muted"), label(value, wrap=True, selectable=True))

    _facts_of = ""

    def _read_facts(self, opened: bool) -> None:
        if opened and self.entry is not None and self._facts_of != self.entry.id:
            entry = self.entry
            self._facts_of = entry.id
            self._background.skip_waiting()
            self._background.run(entry.id, lambda: read_facts(entry))

    @Slot(object, object, object)
    def _facts_read(self, key: object, result: object, error: object) -> None:
        if self.entry is None or key != self.entry.id:
            return
        facts = result if isinstance(result, ModelFacts) else ModelFacts(problem=str(error))
        lines = [facts.problem] if facts.problem else [f"{name} = {value}" for name, value in facts.facts]
        self._header_box.setPlainText("\n".join(lines))
        self._template_box.setPlainText(
            facts.template or "The model has no chat template. A plain one (ChatML) is used."
        )

    @Slot(bool)
    def _read_adapters(self, opened: bool) -> None:
        entry, read = self.entry, self._adapters
        if not opened or entry is None or read is None or self._adapters_of == entry.id:
            return
        self._adapters_of = entry.id
        self._show_adapters("Looking…", [])
        self._fitting.skip_waiting()
        self._fitting.run(entry.id, lambda: read(entry))

    @Slot(object, object, object)
    def _adapters_read(self, key: object, result: object, error: object) -> None:
        if self.entry is None or key != self.entry.id:
            return
        found = result if isinstance(result, list) else []
        self._show_adapters(str(error) if error is not None else "No adapter of the library fits.", found)

    def _show_adapters(self, otherwise: str, found: list[tuple[AdapterEntry, int, int]]) -> None:
        while (item := self._adapter_rows.takeAt(0)) is not None:
            if (old := item.widget()) is not None:
                old.hide()
                old.deleteLater()
        for adapter, matched, total in found[:MOST_ADAPTERS]:
            holder = QWidget()
            name = ElidedLabel(adapter.name, mode=Qt.TextElideMode.ElideMiddle)
            chip = Chip(f"{matched:,} of {total:,}", "positive" if matched == total else "warning")
            chip.setToolTip(f"{matched:,} of its {total:,} modules match")
            show = button("Show", lambda _=False, adapter=adapter: self.adapter_wanted.emit(adapter), kind="link")
            show.setAccessibleName(f"Show {adapter.name} on the LoRAs page")
            row(name, chip, show, parent=holder).setStretch(0, 1)
            self._adapter_rows.addWidget(holder)
        rest = len(found) - MOST_ADAPTERS
        if rest > 0 or not found:
            self._adapter_rows.addWidget(label(f"… and {rest:,} more" if found else otherwise, tone="muted", wrap=True))

    # Doing ------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load, or reload, with what the form says."""
        if self.entry is None or self._spec is None or self.form is None:
            return
        if self.form.problems():
            self.form.focus_first_problem()
            return
        self._save_later.stop()
        self.save()
        self._loadout.load(self.entry, self._loader.currentData() or None, self.form.values())

    def restore(self) -> None:
        """Back to the loader's defaults for this model."""
        if self.form is not None:
            self.form.reset()

    @Slot()
    def _options_changed(self) -> None:
        self._show_estimate()
        self._show_saved()
        self._show_actions()
        if self.form is not None and self.form.problems():
            self._saved.setText("Not saved: see the field in red")
            self._save_later.stop()
        else:
            self._save_later.start()

    @Slot()
    def save(self) -> None:
        """Remember the options for this model and loader."""
        if self.entry is None or self._spec is None or self.form is None or self.form.problems():
            return
        try:
            build(self._spec.options, self.form.values())
            # The choice stays as it was: automatic, or this loader.
            self._model_settings.set(self.entry.id, self._spec.id, self.form.values())
            if not self._loader.currentData():
                self._model_settings.set(self.entry.id, None)
        except WeftError as error:
            self._saved.setText(f"Not saved: {error.message}")

    def _review_code(self) -> None:
        if self.entry is None:
            return
        if self._loadout.planner.trusts_code(self.entry):
            self._loadout.planner.allow_code(self.entry, "")
            self._show_code()
        else:
            self.code_wanted.emit(self.entry)

    def code_decided(self) -> None:
        """The user answered the question about the model's own code."""
        if self.entry is not None:
            self._show_code()

    def _copy_path(self) -> None:
        if self.entry is not None:
            QGuiApplication.clipboard().setText(self.entry.path)

    def _open_menu(self) -> None:
        if self.entry is not None:
            self._make_menu(self.entry, self).popup(self._more.mapToGlobal(self._more.rect().bottomLeft()))

    def shutdown(self) -> None:
        """Save what waits to be saved, and end the reading thread."""
        if self._save_later.isActive():
            self._save_later.stop()
            self.save()
        self._background.close()
        self._fitting.close()


def _suggestions(entry: ModelEntry, spec: Spec) -> dict[str, OptionValue]:
    """Context lengths begin at what the model was trained for, up to a size that most machines hold."""
    trained = min(entry.shape.context or 4096, 8192)
    fields = describe(spec.options)
    return dict.fromkeys(_context_fields(fields), trained)


def _context_fields(fields: Iterable[OptionField]) -> list[str]:
    """Names of the options that set how long the context is."""
    return [
        field.name for field in fields if field.optional and field.unit == "tokens" and "context" in field.title.lower()
    ]


def _widest(made: QWidget, text: str) -> int:
    """Width of a button with this text, so that a shorter one leaves its neighbours where they are."""
    return made.fontMetrics().horizontalAdvance(text) + 56
