"""The details of one adapter: how it fits the chosen model, the bases that fit best, its norms, what its files say."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QMenu, QWidget

from app.core.adapter_plans import HealthReport
from app.core.compatibility import Ranked, Verdict
from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels.adapter_details import AdapterStudy
from app.viewmodels.adapter_facts import AdapterFacts, Fit, about, unmatched_lines
from app.viewmodels.adapter_table import number_text
from app.viewmodels.loadout import Loadout
from app.viewmodels.model_table import format_title
from app.viewmodels.units import readable_bytes
from app.views.dialogs import text_box
from app.views.icons import icon
from app.views.library.panel import DetailsPanel, FactsForm
from app.views.loras.norm_chart import NormChart
from app.views.option_fields import QuietCombo
from app.views.widgets import Banner, Chip, ElidedLabel, Fold, button, column, icon_button, label, row, title

WIDTH = 336
_TONES = {Verdict.FITS: "positive", Verdict.PARTLY: "warning", Verdict.NOT_AT_ALL: "negative"}


class BaseRow(QWidget):
    """A model that the adapter fits, and the way to load it with the adapter on."""

    def __init__(self, ranked: Ranked, load: Callable[[ModelEntry], object], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        found = ranked.compatibility
        self.model = ranked.model
        name = ElidedLabel(ranked.model.name, mode=Qt.TextElideMode.ElideMiddle)
        same = "its recorded base; " if found.same_base else ""
        facts = f"{same}{format_title(ranked.model)}"
        name.setAccessibleDescription(facts)
        chip = Chip(f"{found.matched:,} of {found.total:,}", _TONES[found.verdict])
        chip.setToolTip(f"{found.matched:,} of its {found.total:,} modules match, by the library's index.\n{facts}")
        self.load = button("Load", lambda: load(ranked.model), kind="link", tip=f"Load {ranked.model.name} and use it")
        self.load.setAccessibleName(f"Load {ranked.model.name} and use the adapter")
        made = row(name, chip, self.load, spacing=8, parent=self)
        made.setStretch(0, 1)


class AdapterDetails(DetailsPanel[AdapterEntry]):
    """The panel at the right of the LoRAs page.

    Signals:
        use_wanted(AdapterEntry), use_with(AdapterEntry, ModelEntry), alpha_wanted(AdapterEntry).
        compare_wanted(AdapterEntry), other_model_wanted().
    """

    use_wanted = Signal(object)
    use_with = Signal(object, object)
    alpha_wanted = Signal(object)
    compare_wanted = Signal(object)
    other_model_wanted = Signal()

    def __init__(
        self,
        *,
        study: AdapterStudy,
        loadout: Loadout,
        make_menu: Callable[[AdapterEntry, QWidget], QMenu],
        stacked: Callable[[str], bool],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(make_menu, WIDTH, parent)
        self._study = study
        self._loadout = loadout
        self._stacked = stacked
        self.ranked: list[Ranked] = []
        self.bases: list[BaseRow] = []
        self.fit: Fit | None = None
        self._told: list[str] = []
        self._chosen: ModelEntry | None = None
        self._picked: ModelEntry | None = None
        self._build()
        study.fit.connect(self._fit_read)
        study.ranked.connect(self._ranked_read)
        study.facts.connect(self._facts_read)
        study.troubles.connect(self._troubles_read)
        study.norms.connect(self._norms_read)

    # Building

    def _build(self) -> None:
        self.alpha = Banner("warning")
        self.alpha.text.setText("Its alpha is not recorded, so it cannot be used yet.")
        self.alpha.add(button("Say alpha…", self._ask_alpha, kind="link"))
        self.use = button("Use", self._use, kind="primary", icon_name="plus")
        self.use.setMinimumWidth(self.use.fontMetrics().horizontalAdvance("Take out") + 64)
        self.compare = button("Compare with base", self._compare, icon_name="compare")
        self.troubles = Banner("warning")
        self._add(self.alpha, row(self.use, self.compare, 1), self.troubles)
        self._add_fit()
        self._add_folds()
        self._body.addStretch(1)
        self._study.want_norms(True)

    def _add_fit(self) -> None:
        """How it fits a model, and which it fits best."""
        self.model = QuietCombo()
        self.model.setAccessibleName("Model to hold the adapter against")
        self.model.currentIndexChanged.connect(self._model_chosen)
        self.other = icon_button("search", "Hold it against another model…", self.other_model_wanted.emit)
        held = row(self.model, self.other, spacing=4)
        held.setStretch(0, 1)
        self.verdict = Chip()
        self.reasons = label(tone="muted", wrap=True, selectable=True)
        self._unmatched_box = text_box(name="Modules that do not match")
        self._unmatched_box.setMinimumHeight(140)
        self._unmatched = Fold("Modules that do not match", self._unmatched_box)
        self._bases = QWidget()
        self._bases_column = column(spacing=0, parent=self._bases)
        self._no_base = label("None of the library's models fits.", tone="muted", wrap=True)
        self._add(title("How it fits", 0), held, row(self.verdict, 1), self.reasons, self._unmatched)
        self._add(title("Models that it fits best", 0), self._no_base, self._bases)

    def _add_folds(self) -> None:
        """Its norms, and what its files say."""
        self.chart = NormChart()
        self.chart_note = label(tone="muted", wrap=True, selectable=True)
        norms = QWidget()
        column(self.chart, self.chart_note, spacing=4, parent=norms)
        self.norms_fold = Fold("Norms by layer", norms, opened=True)
        self.norms_fold.toggled.connect(self._study.want_norms)
        self._facts = FactsForm()
        self._files_box = text_box(name="Its files")
        self._files_box.setMinimumHeight(100)
        self._said_box = text_box(name="What its files say")
        self._said_box.setMinimumHeight(220)
        self._card_box = text_box(name="Its card", mono=False)
        self._card_box.setMinimumHeight(200)
        self._card = Fold("Its card", self._card_box)
        self._add(self.norms_fold, Fold("About this adapter", self._facts), Fold("Its files", self._files_box))
        self._add(Fold("Everything the files say", self._said_box), self._card)

    # Showing

    def show_entry(self, entry: AdapterEntry | None) -> None:
        """Show an adapter."""
        other = self._show_head(entry)
        if entry is None:
            self._study.show(None, None)
            return
        if other:
            self._forget()
        self._chips[0].set(entry.kind)
        alpha = "?" if entry.needs_alpha else number_text(entry.alpha)
        self._chips[1].set(f"rank {number_text(entry.rank)}, alpha {alpha}")
        self._chips[2].set(readable_bytes(entry.bytes))
        self.alpha.setVisible(entry.needs_alpha and not entry.problem)
        self._show_models()
        self._study.show(entry, self._chosen)
        self.refresh_actions()

    def _forget(self) -> None:
        """What was said of another adapter."""
        self.ranked = []
        self.fit = None
        self._chosen = self._picked
        self._told = []
        self.troubles.hide()
        self.reasons.setText("")
        self.verdict.set("")
        self._unmatched.hide()
        self._show_bases()
        self._no_base.setText("Looking…")
        self.chart.show_report(None)
        self.chart_note.setText("Measuring…")
        self._show_facts(AdapterFacts())

    @Slot()
    def refresh_actions(self) -> None:
        """The stack or the loaded model changed."""
        entry = self.entry
        if entry is None:
            return
        stacked = self._stacked(entry.path)
        usable = not entry.problem and not entry.needs_alpha
        self.use.setText("Take out" if stacked else "Use")
        self.use.setIcon(icon("minus" if stacked else "plus", "on_accent"))
        self.use.setAccessibleName("Take it out of the stack" if stacked else "Use: add it to the stack")
        self.use.setToolTip(
            "Take it out of the stack of the loaded model" if stacked else "Add it to the stack of the loaded model"
        )
        self.use.setEnabled(usable)
        self.compare.setEnabled(usable)

    def refresh_models(self) -> None:
        """Another model was loaded."""
        before = self._chosen
        if self.entry is not None:
            self._show_models()
            if self._chosen != before:
                self._study.hold_against(self._chosen)

    def _show_models(self) -> None:
        """The models that it can be held against: the loaded one first, then those that it fits."""
        loaded = self._loadout.model
        models = [loaded] if loaded is not None else []
        models += [self._picked] if self._picked is not None else []
        models += [each.model for each in self.ranked]
        models = list({model.id: model for model in models}.values())
        self.model.blockSignals(True)
        self.model.clear()
        for model in models:
            is_loaded = loaded is not None and model.id == loaded.id
            self.model.addItem(f"{model.name} (loaded)" if is_loaded else model.name, model)
        chosen = self._chosen
        place = next((n for n, model in enumerate(models) if chosen is not None and model.id == chosen.id), 0)
        self.model.setCurrentIndex(place if models else -1)
        self.model.setEnabled(len(models) > 1)
        self.model.blockSignals(False)
        self._chosen = models[place] if models else None
        if not models:
            self.verdict.set("")
            self.reasons.setText("No model is loaded, and none was found that it fits.")
            self._say_once()

    @Slot(object)
    def hold_against(self, model: ModelEntry) -> None:
        """Hold every adapter against this model from now on; it need not be loaded."""
        self._picked = self._chosen = model
        self._show_models()
        self._study.hold_against(model)

    @Slot(int)
    def _model_chosen(self, place: int) -> None:
        model = self.model.itemData(place) if place >= 0 else None
        if isinstance(model, ModelEntry) and self.entry is not None:
            self._chosen = model
            self._study.hold_against(model)

    @Slot(object)
    def _fit_read(self, found: object) -> None:
        self.fit = found if isinstance(found, Fit) else None
        if not isinstance(found, Fit):
            self.verdict.set("Cannot be read", "negative")
            self.reasons.setText(str(found))
            self._unmatched.hide()
            self._say_once()
            return
        fit = found.compatibility
        self.verdict.set(f"{fit.matched:,} of {fit.total:,} modules match", _TONES[fit.verdict])
        lines = list(found.sentences)
        lines += fit.warnings
        if fit.same_base is False:
            lines.append(f"It records {fit.base} as its base.")
        elif fit.same_base:
            lines.append("This is the base that it records.")
        if not fit.exact:
            lines.append("Judged by the library's index: the model's own headers do not tell.")
        self.reasons.setText("\n".join(lines))
        self._say_once()
        self._unmatched.setVisible(bool(fit.unmatched))
        self._unmatched_box.setPlainText("\n".join(unmatched_lines(found)))

    @Slot(object)
    def _ranked_read(self, found: object) -> None:
        self.ranked = found if isinstance(found, list) else []
        self._no_base.setText(str(found) if isinstance(found, WeftError) else "None of the library's models fits.")
        self._show_bases()
        self._say_once()
        before = self._chosen
        self._show_models()
        if self._chosen is not None and self._chosen != before:
            self._study.hold_against(self._chosen)

    def _show_bases(self) -> None:
        for each in self.bases:
            self._bases_column.removeWidget(each)
            each.hide()
            each.deleteLater()
        self.bases = [BaseRow(ranked, self._load_base) for ranked in self.ranked[:8]]
        for each in self.bases:
            self._bases_column.addWidget(each)
        self._no_base.setVisible(not self.bases)
        self._bases.setVisible(bool(self.bases))

    @Slot(object)
    def _facts_read(self, found: AdapterFacts) -> None:
        self._show_facts(found)
        told = list(found.troubles)
        if found.problem and self.entry is not None and not self.entry.problem:
            told.insert(0, found.problem)
        self._told = told
        self._show_troubles()

    @Slot(list)
    def _troubles_read(self, told: list[str]) -> None:
        self._told = [*told, *self._told]
        self._show_troubles()

    def _show_troubles(self) -> None:
        self.troubles.setVisible(bool(self._told))
        self.troubles.text.setText(" ".join(self._told))
        self._say_once()

    def _say_once(self) -> None:
        """A file that cannot be read is told in every part: below, it need not be said again in the same words."""
        said = {self.entry.problem if self.entry is not None else "", *self._told}
        self.reasons.setVisible(self.reasons.text() not in said)
        said = (said | {self.reasons.text()}) - {""}
        for words in (self._no_base, self.chart_note):
            if words.text() in said:
                words.setText("None: it cannot be read.")

    def _show_facts(self, found: AdapterFacts) -> None:
        entry = self.entry
        if entry is None:
            return
        self._facts.show_lines(about(entry, found))
        self._files_box.setPlainText("\n".join(f"{readable_bytes(size):>10}  {name}" for name, size in found.files))
        self._said_box.setPlainText("\n".join(f"{name} = {value}" for name, value in found.facts))
        self._card.setVisible(bool(found.card))
        self._card_box.setPlainText(found.card)

    @Slot(object)
    def _norms_read(self, found: object) -> None:
        if not isinstance(found, HealthReport):
            self.chart.hide()  # not an empty frame above the reason
            self.chart_note.setText(str(found))
            self._say_once()
            return
        self.chart.show_report(found)
        told = list(found.sentences)
        if found.whole:
            told.append(f"{len(found.whole)} modules are trained whole, and have no norm here.")
        self.chart_note.setText(" ".join(told) or "Nothing is odd: no zero, no NaN, no norm out of line.")
        self.chart.setVisible(bool(found.modules))

    # What is known already

    def ranked_for(self, entry: AdapterEntry) -> list[Ranked]:
        """The models that fit it best; none while another adapter is shown, or they are not counted yet."""
        return self.ranked if self.entry is not None and self.entry.id == entry.id else []

    def fit_with(self, entry: AdapterEntry, model: ModelEntry | None) -> Fit | None:
        """How it fits a model, where that is what is shown."""
        fit = self.fit
        known = fit is not None and model is not None and fit.model.id == model.id and self.entry == entry
        return fit if known else None

    # Doing

    def _load_base(self, model: ModelEntry) -> None:
        if self.entry is not None:
            self.use_with.emit(self.entry, model)

    def _use(self) -> None:
        if self.entry is not None:
            self.use_wanted.emit(self.entry)

    def _compare(self) -> None:
        if self.entry is not None:
            self.compare_wanted.emit(self.entry)

    def _ask_alpha(self) -> None:
        if self.entry is not None:
            self.alpha_wanted.emit(self.entry)
