"""The details of one model: what it needs, its loader, the loader's options, and everything its header says."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import Qt, QTimer, Signal, Slot
from PySide6.QtWidgets import QHBoxLayout, QMenu, QProgressBar, QVBoxLayout, QWidget

from app import backends
from app.backends.base import Spec
from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.memory import Machine
from app.core.options import build
from app.store.model_settings import ModelSettings
from app.viewmodels.context_advice import advice, suggestions
from app.viewmodels.fitting import breakdown, judge
from app.viewmodels.jobs import progress_text
from app.viewmodels.loadout import Loadout, LoadoutState
from app.viewmodels.model_facts import about
from app.viewmodels.model_table import format_title
from app.viewmodels.units import readable_bytes, readable_count
from app.views.library.panel import DetailsPanel, FactsForm
from app.views.models.file_folds import FileFolds
from app.views.models.fitting_adapters import FittingAdapters
from app.views.models.own_code import OwnCodeBanner
from app.views.option_fields import QuietCombo
from app.views.options_form import OptionsForm
from app.views.widgets import Banner, ElidedLabel, Fold, button, column, label, row
from app.workers.load_plan import shortage

SAVE_MS = 400
WIDTH = 320


class ModelDetails(DetailsPanel[ModelEntry]):
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
        super().__init__(make_menu, WIDTH, parent)
        self._loadout = loadout
        self._model_settings = model_settings
        self._machine = machine
        self._show_advanced = show_advanced
        self._spec: Spec | None = None
        self._forms: dict[str, OptionsForm] = {}
        self.form: OptionsForm | None = None
        self._lacking = ""  # why a load with what the form says does not fit
        self._save_later = QTimer(self)
        self._save_later.setSingleShot(True)
        self._save_later.setInterval(SAVE_MS)
        self._save_later.timeout.connect(self.save)
        self._build(adapters)
        loadout.changed.connect(self._show_actions)

    # Building ---------------------------------------------------------------------------------------

    def _build(self, adapters: Callable[[ModelEntry], list[tuple[AdapterEntry, int, int]]] | None) -> None:
        self._estimate = Banner("info")
        # Two lines, whatever they say: what is below stays where it is while options change.
        self._estimate.text.setMinimumHeight(2 * self._estimate.text.fontMetrics().lineSpacing())
        self._loader_help = label(tone="muted", wrap=True)
        self._code = OwnCodeBanner(self._loadout)
        self._code.code_wanted.connect(self.code_wanted)
        self._form_place: QVBoxLayout = column(spacing=0)
        self._adapters_fold = FittingAdapters(adapters)
        self._adapters_fold.adapter_wanted.connect(self.adapter_wanted)
        self._facts = FactsForm()
        self._file_folds = FileFolds()
        self._add(self._actions(), self._estimate, self._loader_row(), self._loader_help, self._code)
        self._add(self._saved_row(), self._form_place)
        self._add(self._adapters_fold, Fold("About this model", self._facts), self._file_folds)
        self._body.addStretch(1)

    def _actions(self) -> QHBoxLayout:
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
        return actions

    def _loader_row(self) -> QHBoxLayout:
        self._loader = QuietCombo()
        self._loader.setAccessibleName("Loader")
        self._loader.currentIndexChanged.connect(self._loader_chosen)
        name = label("Loader")
        name.setBuddy(self._loader)
        made = row(name, self._loader, spacing=16)
        made.setStretch(1, 1)
        return made

    def _saved_row(self) -> QHBoxLayout:
        self._saved = label(tone="muted")
        self._restore = button("Restore defaults", self.restore, kind="link")
        keep = self._restore.sizePolicy()
        keep.setRetainSizeWhenHidden(True)
        self._restore.setSizePolicy(keep)
        return row(self._saved, 1, self._restore)

    # Showing ----------------------------------------------------------------------------------------

    def show_entry(self, entry: ModelEntry | None) -> None:
        """Show a model, with what is saved for it. Unsaved changes of the one before are saved first."""
        if self._save_later.isActive():
            self._save_later.stop()
            self.save()
        other = self._show_head(entry)
        if entry is None:
            return
        self._show_loaders()
        self._facts.show_lines(about(entry))
        self._adapters_fold.show_entry(entry, other=other)
        self._file_folds.show_entry(entry, other=other)

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
            told = " ".join(sorted(filter(None, reasons)))
            self._loader_help.setText(told or f"No loader takes {entry.format.value} models yet.")
            self._loader_help.setVisible(not told or told != entry.problem)  # that is said above
        else:
            self._loader_help.show()
            self._loader_help.setText(spec.summary)
            self.form = self._form_of(spec)
            self.form.suggest(suggestions(entry, spec))
            self.form.set_values(self._loadout.planner.saved_options(entry, spec))
            self.form.show()
        self._code.show_entry(entry)
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
        self._saved.setText(kept if changed else "Default options" if self.form is not None else "")
        self._restore.setVisible(changed)

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

    def _advise(self, lacking: str) -> None:
        """Say at the field what its value will bring, before anything is loaded.

        Args:
            lacking: why a load with these options does not fit; "" when it does.
        """
        entry, form = self.entry, self.form
        self._lacking = lacking
        if entry is not None and form is not None:
            fields = form.fields.values()
            form.advise(advice(entry, fields, form.values(), lacking=lacking, last_changed=form.last_changed))

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

    def code_decided(self) -> None:
        """The user answered the question about the model's own code."""
        self._code.show_entry(self.entry)

    def shutdown(self) -> None:
        """Save what waits to be saved, and end the reading threads."""
        if self._save_later.isActive():
            self._save_later.stop()
            self.save()
        self._adapters_fold.close_reading()
        self._file_folds.close_reading()


def _widest(made: QWidget, text: str) -> int:
    """Width of a button with this text, so that a shorter one leaves its neighbours where they are."""
    return made.fontMetrics().horizontalAdvance(text) + 56
