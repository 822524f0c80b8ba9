"""Adapters in the window: imports from anywhere, the LoRAs page, saved stacks. Part of the composition root."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Slot
from PySide6.QtWidgets import QDialog, QMenu, QWidget

from app.core.library import AdapterEntry, ModelEntry
from app.core.stack import AdapterStack
from app.store.stacks import StackStore
from app.viewmodels.adapter_jobs import AdapterJobs, Made
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.saved_stacks import SavedStacks
from app.views.page import Notice, Page

if TYPE_CHECKING:
    from app.core.adapter_import import ImportResult
    from app.engine.client import EngineClient
    from app.house_exports import ExportHouse
    from app.household import Household
    from app.viewmodels.adapter_import import AdapterImports, Imported
    from app.viewmodels.drops import Drops

MEASURING = ("core", "llamacpp")  # environments that have what measuring needs


class LorasHouse(QObject):
    """View models that live as long as the window, and the ties between them."""

    def __init__(self, house: Household, exports: ExportHouse) -> None:
        super().__init__(house)
        self._house, self._exports = house, exports
        paths = house.paths
        self.stack = StackModel(house.loadout, self)
        self.stack.refused.connect(house.loadout.notice)
        self.saved = SavedStacks(StackStore(house.database), self.stack, self)
        self._imports: AdapterImports | None = None
        self._drops: Drops | None = None
        self.jobs = AdapterJobs(house.tasks, house.jobs, paths.adapters, self)
        self.jobs.library_changed.connect(house.refresh_library)
        self.jobs.made.connect(self._made)

    # Made when they are first needed: they import readers of formats, for which the first paint does not wait.

    @property
    def imports(self) -> AdapterImports:
        """What brings adapters into the library."""
        if self._imports is None:
            from app.viewmodels.adapter_import import AdapterImports

            house = self._house
            self._imports = AdapterImports(
                house.database, house.paths.adapters, lambda: [root.path for root in house.roots.roots()], self
            )
            self._imports.library_changed.connect(house.refresh_library)
            self._imports.ended.connect(self._imported)
            self._imports.alpha_wanted.connect(self._ask_alpha)
        return self._imports

    @property
    def drops(self) -> Drops:
        """What tells dropped adapters from models."""
        if self._drops is None:
            from app.viewmodels.drops import Drops

            self._drops = Drops(self)
            self._drops.adapters.connect(self._adapters_dropped)
            self._drops.models.connect(self._models_dropped)
        return self._drops

    def page(self) -> Page:
        """The LoRAs page."""
        from app.viewmodels.adapter_details import AdapterStudy
        from app.views.loras.page import LorasPage

        house = self._house
        page = LorasPage(
            library=house.library,
            database=house.database,
            loadout=house.loadout,
            stack=self.stack,
            saved=self.saved,
            imports=self.imports,
            jobs=self.jobs,
            study=AdapterStudy(house.database, self._measuring, house),
            roots=house.roots,
            make_models=partial(house.model_table, self),
            refresh=house.refresh_library,
        )
        page.export_wanted.connect(self._export)
        page.compare_wanted.connect(self._compare)
        return page

    @Slot(object)
    def _compare(self, stack: AdapterStack) -> None:
        window = self._house.window
        window.show_page("compare")
        window.page("compare").show_stacks([AdapterStack(), stack])  # type: ignore[attr-defined]

    @Slot(object, object)
    def _export(self, model: ModelEntry | None, stack: AdapterStack) -> None:
        if model is not None:
            self._exports.open(model, stack)
        else:
            text = "Load the model that the adapter was made for, or get it: it is merged into that."
            self._house.window.show_notice(Notice(text=text, tone="warning"))

    def adapters_for(self, model: ModelEntry) -> list[tuple[AdapterEntry, int, int]]:
        """The adapters of the library that fit a model: (adapter, matched, total). Reads files: for a thread."""
        from app.store.adapters import AdapterStore

        database = self._house.database
        try:
            return AdapterStore(database).adapters_for(model)
        finally:
            database.release()

    @Slot(object)
    def show_adapter(self, entry: AdapterEntry) -> None:
        """Show an adapter on the LoRAs page."""
        self._show(entry.id)

    def close(self) -> None:
        """For the window's end."""
        if self._imports is not None:
            self._imports.close()
        if self._drops is not None:
            self._drops.close()

    def _measuring(self) -> EngineClient:
        from app.engine import launch

        house = self._house
        ready = next((name for name in MEASURING if house.jobs.is_ready(name)), MEASURING[0])
        return launch.task_engine(ready, house.paths, "measuring")

    def take_for_stack(self, paths: list[Path]) -> None:
        """What was dropped on the loadout bar: into the library, and into the stack."""
        self.imports.add(paths, to_stack=True)

    def fill_stack_menu(self, menu: QMenu, parent: QWidget) -> None:
        """Saved stacks, in the menu of the chips."""
        from app.views.saved_stacks_menu import fill_saved_stacks

        fill_saved_stacks(menu, self.saved, self.stack, parent, notice=self._house.window.show_notice)

    # What was dropped anywhere

    def take(self, paths: list[Path]) -> bool:
        """Sort out what was dropped on the window; False when none of it can be a model or an adapter."""
        if not self.drops.accepts(paths):
            return False
        self.drops.take(paths)
        return True

    @Slot(list)
    def _adapters_dropped(self, paths: list[Path]) -> None:
        self.imports.add(paths)

    @Slot(list)
    def _models_dropped(self, paths: list[Path]) -> None:
        house = self._house
        page = house.window.page("models")
        if page.accepts(paths):
            house.window.show_page("models")
            page.take(paths)
        else:
            names = ", ".join(path.name for path in paths[:3])
            house.window.show_notice(Notice(text=f"{names}: neither a model nor an adapter.", tone="warning"))

    # What came of it

    @property
    def _in_front(self) -> bool:
        return self._house.window.current == "loras"

    @Slot(object)
    def _imported(self, found: Imported) -> None:
        if found.batch.to_stack:
            for result in found.here:
                if result.entry is not None:
                    self.stack.add(Path(result.entry.path))
        if self._in_front or (not found.results and found.error is None):
            return  # the page shows each
        from app.viewmodels.adapter_import import summary

        text, tone = summary(found)
        first = next((result.entry for result in found.here if result.entry is not None), None)
        show = (lambda: self._show(first.id)) if first is not None else self._show
        self._house.window.show_notice(Notice(text=text, tone=tone, action="Show", run=show, important=True))

    @Slot(object)
    def _made(self, made: Made) -> None:
        if not self._in_front:
            tone = "negative" if made.error is not None else "positive"
            run = (lambda: self._show(made.path)) if made.path else self._house.show_jobs
            self._house.window.show_notice(
                Notice(text=f"{made.title}. {made.text}", tone=tone, action="Show", run=run, important=True)
            )

    def _show(self, adapter: str = "") -> None:
        window = self._house.window
        window.show_page("loras")
        if adapter:
            window.page("loras").show_adapter(adapter)  # type: ignore[attr-defined]

    @Slot(list)
    def _ask_alpha(self, asked: list[ImportResult]) -> None:
        def build() -> QDialog:
            from app.views.loras.sheets import AlphaSheet

            return AlphaSheet(asked, self.imports.give_alphas, self._house.window)

        self._house.window.show_dialog(build)
