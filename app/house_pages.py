"""The pages and the loadout bar, each built when it is first shown, and the ways from one to another. Part of the composition root."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Slot
from PySide6.QtWidgets import QWidget

from app.core.library import ModelEntry
from app.views.page import Page

if TYPE_CHECKING:
    from app.house_exports import ExportHouse
    from app.house_loras import LorasHouse
    from app.house_questions import HouseQuestions
    from app.house_train import TrainHouse
    from app.household import Household


class HousePages(QObject):
    """Builds pages out of what the house holds."""

    def __init__(
        self, house: Household, exports: ExportHouse, loras: LorasHouse, training: TrainHouse, questions: HouseQuestions
    ) -> None:
        super().__init__(house)
        self._house, self._exports, self._loras = house, exports, loras
        self._training, self._questions = training, questions
        self._builders = {
            "chat": self._chat_page,
            "compare": self._compare_page,
            "models": self._models_page,
            "loras": loras.page,
            "train": training.page,
            "jobs": self._jobs_page,
            "settings": self._settings_page,
        }

    # Building ---------------------------------------------------------------------------------------

    def build(self, name: str) -> Page:
        """Make the page of this name (see `app.rail`)."""
        return self._builders[name]()

    def _chat_page(self) -> Page:
        from app.views.chat.page import ChatPage

        house = self._house
        return ChatPage(house.chats, house.loadout, house.settings, pick_model=self.open_picker)

    def _compare_page(self) -> Page:
        from app.store.preferences import PreferenceStore
        from app.viewmodels.chat_presets import Presets
        from app.viewmodels.compare import Compare
        from app.views.compare.page import ComparePage

        house = self._house
        model = Compare(house.loadout, PreferenceStore(house.paths.data / "preferences.jsonl"), self)
        return ComparePage(model, Presets(house.settings), pick_model=self.open_picker)

    def _models_page(self) -> Page:
        from app.views.models.page import ModelsPage

        house = self._house
        page = ModelsPage(
            library=house.library,
            loadout=house.loadout,
            model_settings=house.model_settings,
            settings=house.settings_view,
            roots=house.roots,
            machine=house.machine,
            refresh=house.refresh_library,
            adapters=self._loras.adapters_for,
        )
        page.details.adapter_wanted.connect(self._loras.show_adapter)
        page.code_wanted.connect(self._questions.review_code)
        page.export_wanted.connect(self._exports.open_model)
        page.certificate_wanted.connect(self._exports.show_certificate)
        page.train_wanted.connect(self._training.train_on)
        page.dropped = self._loras.take
        return page

    def _jobs_page(self) -> Page:
        from app.views.jobs.page import JobsPage

        house = self._house
        return JobsPage(jobs=house.jobs)

    def _settings_page(self) -> Page:
        from app.views.settings.page import SettingsPage

        house = self._house
        page = SettingsPage(
            settings=house.settings_view,
            roots=house.roots,
            engines=house.engines,
            paths=house.paths,
            hub=house.downloads.hub_section,
        )
        page.remove_environment.connect(self._questions.removal)
        return page

    def header(self) -> QWidget:
        """Make the loadout bar."""
        from app.views.loadout_bar import LoadoutBar

        house = self._house
        bar = LoadoutBar(
            loadout=house.loadout,
            jobs=house.jobs,
            make_table=partial(house.model_table, self),
            machine=house.machine.now,
            stack=self._loras.stack,
            dropped=self._loras.take_for_stack,
            fill_menu=self._loras.fill_stack_menu,
        )
        bar.models_wanted.connect(self.show_models)
        bar.jobs_wanted.connect(house.show_jobs)
        bar.options_wanted.connect(self._show_options)
        bar.export_wanted.connect(self._exports.open_loaded)
        return bar

    # Going places -----------------------------------------------------------------------------------

    @Slot()
    def show_models(self) -> None:
        self._house.window.show_page("models")

    @Slot(object)
    def _show_options(self, entry: ModelEntry) -> None:
        self._house.window.show_page("models")
        self._house.window.page("models").show_model(entry.id)  # type: ignore[attr-defined]

    def open_picker(self) -> None:
        self._house.window.show_page("chat")
        bar = self._house.window.header
        if bar is not None:
            bar.open_picker()  # type: ignore[attr-defined]
