"""The Settings page: folders, engines, hub, appearance, new chats, defaults, performance, shortcuts. All is saved as it is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QCheckBox, QFrame, QGridLayout, QHBoxLayout, QScrollArea, QSpinBox, QWidget

from app.core.paths import Paths
from app.core.roots import Root, RootKind
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.settings import EngineList, SettingsView
from app.viewmodels.units import short_path
from app.views.adding import Adding
from app.views.dialogs import choose_paths, open_locally
from app.views.option_fields import QuietCombo
from app.views.page import Notice, Page, PaletteCommand
from app.views.settings.download_folder import DownloadFolder
from app.views.settings.engines import EnginesSection
from app.views.settings.new_chats import NewChatsSection
from app.views.settings.performance import PerformanceSection
from app.views.widgets import Chip, ElidedLabel, button, column, icon_button, label, row, rule, spaced, title

WIDTH = 760
SHORTCUTS = (
    ("Ctrl+K", "Command palette: everything by name"),
    ("Ctrl+L", "Choose a model"),
    ("Ctrl+N", "New chat"),
    ("Ctrl+F", "Find on the page"),
    ("Ctrl+B", "Show or hide the side bar"),
    ("Ctrl+,", "Settings"),
    ("Ctrl+1 … 9", "Go to a page, in the order of the bar at the left"),
    ("F11", "Full screen"),
    ("Esc", "Stop, or close"),
    ("Enter, Shift+Enter", "Send; break the line"),
    ("F2, Delete", "Rename; move to trash, with undo"),
    ("F5", "Refresh the library"),
    ("Ctrl+Q", "Quit"),
)
_APPEARANCES = (("system", "Like the system"), ("light", "Light"), ("dark", "Dark"))
_PROGRAMS = (
    ("index_hugging_face", RootKind.HUGGING_FACE),
    ("index_lm_studio", RootKind.LM_STUDIO),
    ("index_ollama", RootKind.OLLAMA),
    ("index_text_generation_webui", RootKind.TEXT_GENERATION_WEBUI),
)
_TITLES = {
    RootKind.HUGGING_FACE: "Hugging Face cache",
    RootKind.LM_STUDIO: "LM Studio",
    RootKind.OLLAMA: "Ollama (read only)",
    RootKind.TEXT_GENERATION_WEBUI: "text-generation-webui",
}


class SettingsPage(Page):
    """All settings.

    Signals:
        remove_environment(name): asked for; the window confirms first.
    """

    remove_environment = Signal(str)

    def __init__(
        self,
        *,
        settings: SettingsView,
        roots: LibraryRoots,
        engines: EngineList,
        paths: Paths,
        hub: Callable[[], QWidget] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._settings = settings
        self._roots = roots
        self._engines = engines
        self._paths = paths
        self._adding = Adding(roots, self)
        self._adding.notice.connect(self.notice)
        self._adding.failed.connect(self.failed)
        settings.failed.connect(self.failed)
        engines.failed.connect(self.failed)
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        row(title("Settings"), 1, margins=(16, 0, 16, 0), parent=head)
        inside = QWidget()
        inside.setMaximumWidth(WIDTH + 48)
        self._body = column(spacing=8, margins=(24, 16, 24, 32), parent=inside)
        self.sections: dict[str, QWidget] = {}
        self._folders()
        self._engine_section()
        if hub is not None:
            self._section("hub", "Hub", "Where models and LoRAs are downloaded from.")
            self._body.addWidget(hub())
        self._appearance()
        self._section("new chats", "New chats begin with")
        self.new_chats = NewChatsSection(self._settings)
        self._body.addWidget(self.new_chats)
        self._defaults()
        self._section("performance", "Performance")
        self.performance = PerformanceSection(self._settings)
        self._body.addWidget(self.performance)
        self._shortcuts()
        self._files()
        self._body.addStretch(1)
        holder = QWidget()
        middle = row(spacing=0, parent=holder)
        middle.addWidget(inside, 1)
        middle.addStretch(0)
        self._scroll = QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setWidget(holder)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        column(head, self._scroll, spacing=0, parent=self)
        roots.changed.connect(self._show_roots)

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self._engines.measure()
        self._show_roots()
        self.performance.show_now()

    def show_section(self, name: str) -> None:
        """Scroll to a section: folders, engines, hub, appearance, new chats, defaults, performance, shortcuts, files."""
        self._scroll.ensureWidgetVisible(self.sections[name], 0, 400)

    def commands(self) -> list[PaletteCommand]:
        return []

    def shutdown(self) -> None:
        """End what runs in the background: the window is going."""
        self._adding.close()

    # Sections ---------------------------------------------------------------------------------------

    def _section(self, name: str, heading: str, help: str = "") -> None:
        if self.sections:
            self._body.addSpacing(16)
            self._body.addWidget(rule())
            self._body.addSpacing(8)
        head = title(heading)
        self.sections[name] = head
        self._body.addWidget(head)
        if help:
            self._body.addWidget(label(help, tone="muted", wrap=True))

    def _folders(self) -> None:
        self._section("folders", "Folders", "Weft indexes models where they lie. Nothing is copied or moved.")
        self._root_box = QFrame()
        self._root_box.setObjectName("card")
        self._root_rows = column(spacing=0, margins=(16, 4, 8, 4), parent=self._root_box)
        self._body.addWidget(self._root_box)
        add = button("Add a folder…", self._add_folder, icon_name="folder-add")
        self._body.addLayout(row(add, 1))
        self._body.addSpacing(4)
        self.download_folder = DownloadFolder(self._roots)
        self.download_folder.failed.connect(self.failed)
        self._body.addWidget(self.download_folder)
        self._body.addSpacing(4)
        self._body.addWidget(label("Models of other programs on this machine"))
        grid = QGridLayout()
        grid.setHorizontalSpacing(24)
        grid.setVerticalSpacing(4)
        for place, (name, kind) in enumerate(_PROGRAMS):
            check = QCheckBox(_TITLES[kind])
            check.setChecked(bool(getattr(self._settings.now, name)))
            check.toggled.connect(lambda on, name=name: self._set_root(name, on))
            grid.addWidget(check, place // 2, place % 2)
        grid.setColumnStretch(2, 1)
        self._body.addLayout(grid)
        self._show_roots()

    def _engine_section(self) -> None:
        self._section(
            "engines",
            "Engines",
            "Each family of loaders runs in a Python environment of its own, apart from your system's.",
        )
        section = EnginesSection(self._engines)
        section.remove_wanted.connect(self.remove_environment)
        self.engines = section
        self._body.addWidget(section)

    def _appearance(self) -> None:
        self._section("appearance", "Appearance")
        self.appearance = QuietCombo()
        self.appearance.setAccessibleName("Colours")
        for value, text in _APPEARANCES:
            self.appearance.addItem(text, value)
        self.appearance.setCurrentIndex(self.appearance.findData(self._settings.now.appearance))
        self.appearance.currentIndexChanged.connect(self._appearance_chosen)
        self.appearance.setFixedWidth(200)
        self._body.addLayout(self._field("Colours", self.appearance))
        self._settings.changed.connect(self._setting_changed)

    def _defaults(self) -> None:
        self._section("defaults", "Defaults")
        self._switches: dict[str, QCheckBox] = {}
        for name, text, help in (
            ("autoload", "Load a model as soon as it is picked", "Off: picking only selects it, and Load loads it."),
            ("load_last", "Load the last model when Weft starts", "The first time, that is the starter model."),
            ("show_advanced", "Show advanced options at once", "Forms open with their advanced part unfolded."),
        ):
            check = QCheckBox(text)
            check.setChecked(bool(getattr(self._settings.now, name)))
            check.setToolTip(help)
            check.setAccessibleDescription(help)
            check.toggled.connect(lambda on, name=name: self._settings.set(name, on))
            self._switches[name] = check
            self._body.addWidget(check)
            note = label(help, tone="muted", wrap=True)
            note.setContentsMargins(24, 0, 0, 4)
            self._body.addWidget(note)
        idle = spaced(QSpinBox())
        idle.setRange(0, 1440)
        idle.setSpecialValueText("Never")
        idle.setSuffix(" min")
        idle.setValue(self._settings.now.unload_idle_minutes)
        idle.setAccessibleName("Unload a model that is not used")
        idle.setFixedWidth(120)
        idle.lineEdit().setTextMargins(6, 0, 0, 0)
        idle.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        idle.valueChanged.connect(lambda minutes: self._settings.set("unload_idle_minutes", minutes))
        self._body.addLayout(self._field("Unload a model that is not used, after", idle))

    def _shortcuts(self) -> None:
        self._section("shortcuts", "Shortcuts")
        grid = QGridLayout()
        grid.setHorizontalSpacing(24)
        grid.setVerticalSpacing(6)
        for place, (keys, what) in enumerate(SHORTCUTS):
            grid.addWidget(Chip(keys), place, 0, Qt.AlignmentFlag.AlignLeft)
            grid.addWidget(label(what), place, 1)
        grid.setColumnStretch(1, 1)
        self._body.addLayout(grid)

    def _files(self) -> None:
        self._section("files", "Weft's own files")
        for text, path in (
            ("Data", self._paths.data),
            ("Settings", self._paths.settings),
            ("Logs", self._paths.logs),
            ("Engines", self._paths.environments),
        ):
            self._body.addLayout(self._place(text, path))

    # Rows -------------------------------------------------------------------------------------------

    def _field(self, text: str, control: QWidget) -> QHBoxLayout:
        name = label(text)
        name.setBuddy(control)
        name.setMinimumWidth(160)
        return row(name, control, 1, spacing=16)

    def _place(self, text: str, path: Path) -> QHBoxLayout:
        name = label(text)
        name.setFixedWidth(96)
        where = ElidedLabel(short_path(str(path), str(Path.home())), Qt.TextElideMode.ElideMiddle)
        where.setProperty("tone", "muted")
        reveal = icon_button(
            "folder", f"Open the folder of {text.lower()}", lambda: open_locally(path if path.is_dir() else path.parent)
        )
        made = row(name, where, reveal)
        made.setStretch(1, 1)
        return made

    @Slot()
    def _show_roots(self) -> None:
        while (item := self._root_rows.takeAt(0)) is not None:
            widget = item.widget()
            if widget is not None:
                widget.hide()
                widget.deleteLater()
        for root in self._roots.roots():
            made = self._root_row(root)
            self._root_rows.addWidget(made)
            made.show()  # now, not with the next event: the page would be laid out without it meanwhile, and stay squeezed

    def _root_title(self, root: Root) -> str:
        if root.kind is RootKind.OWN:
            return "Weft's LoRAs" if Path(root.path) == self._paths.adapters else "Weft's models"
        if Path(root.path) == self._roots.downloads():
            return "Downloads"
        return "File" if root.kind is RootKind.FOLDER and Path(root.path).is_file() else root.title

    def _root_row(self, root: Root) -> QWidget:
        holder = QWidget()
        path = Path(root.path)
        kind = label(self._root_title(root))
        kind.setFixedWidth(152)
        where = ElidedLabel(short_path(root.path, str(Path.home())), Qt.TextElideMode.ElideMiddle)
        if not path.exists():
            where.setProperty("tone", "muted")
            where.setText(
                f"{where.text()}  (not there yet)" if root.kind is RootKind.OWN else f"{where.text()}  (not there)"
            )
        made = row(kind, where, margins=(0, 4, 0, 4), spacing=12, parent=holder)
        made.setStretch(1, 1)
        show = icon_button("folder", f"Open {root.path}", lambda: open_locally(path if path.is_dir() else path.parent))
        show.setEnabled(path.exists())
        made.addWidget(show)
        remove = icon_button("close", f"Stop indexing {root.path}", lambda: self._remove_root(root))
        keep = remove.sizePolicy()
        keep.setRetainSizeWhenHidden(True)
        remove.setSizePolicy(keep)
        remove.setVisible(self._roots.is_added(root))
        made.addWidget(remove)
        return holder

    # Changes ----------------------------------------------------------------------------------------

    def _set_root(self, name: str, on: bool) -> None:
        if self._settings.set(name, on):
            self._roots.changed.emit()

    def _remove_root(self, root: Root) -> None:
        undo = self._roots.remove(root.path)
        self.notice.emit(Notice(text=f"{root.path} is no longer indexed. Its files stay.", action="Undo", run=undo))

    @Slot()
    def _add_folder(self) -> None:
        choose_paths(self, "Add a folder of models", self._folders_chosen)

    @Slot(list)
    def _folders_chosen(self, names: Sequence[str]) -> None:
        self._adding.take([Path(name) for name in names])

    @Slot(int)
    def _appearance_chosen(self, _index: int) -> None:
        self._settings.set("appearance", self.appearance.currentData())

    @Slot(str)
    def _setting_changed(self, name: str) -> None:
        if name == "appearance":
            self.appearance.setCurrentIndex(self.appearance.findData(self._settings.now.appearance))
        elif name in self._switches:
            self._switches[name].setChecked(bool(getattr(self._settings.now, name)))
