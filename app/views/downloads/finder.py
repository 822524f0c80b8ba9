"""The upper half: one field that takes names, addresses and search words; results; the files of a repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QModelIndex, Qt, Signal, Slot
from PySide6.QtGui import QKeySequence, QShortcut
from PySide6.QtWidgets import QCheckBox, QFrame, QLineEdit, QProgressBar, QStackedWidget, QWidget

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.hub.files import Listing, SearchHit
from app.hub.reference import HubReference, parse_reference
from app.viewmodels import hub_tables
from app.viewmodels.fitting import Fitting
from app.viewmodels.hub_queries import HubQueries
from app.viewmodels.hub_tables import FileTable, HitRole, ResultTable
from app.viewmodels.units import readable_bytes, short_path
from app.views.downloads.tables import FileCell, ResultCell, Table
from app.views.downloads.trouble_banner import TroubleBanner
from app.views.option_fields import QuietCombo
from app.views.widgets import Chip, ElidedLabel, EmptyState, button, column, icon_button, label, row

_KINDS = (
    ("Any kind", ()),
    ("GGUF", ("gguf",)),
    ("LoRA adapters", ("lora",)),
    ("Safetensors", ("safetensors",)),
    ("GPTQ", ("gptq",)),
    ("AWQ", ("awq",)),
)
_SORTS = (
    ("Most downloaded", "downloads"),
    ("Trending", "trending_score"),
    ("Most liked", "likes"),
    ("Recently updated", "last_modified"),
    ("Newest", "created_at"),
)
EMPTY, RESULTS, FILES, NOTHING = range(4)


class Finder(QWidget):
    """Finds what to fetch.

    Signals:
        wanted(Listing, files, copies): fetch these. settings_wanted: the token or the hub's address must be set.
    """

    wanted = Signal(object, object, bool)
    settings_wanted = Signal()

    def __init__(
        self,
        queries: HubQueries,
        *,
        judge: Callable[[ModelEntry], Fitting],
        endpoint: Callable[[], str],
        folder: Callable[[Listing], Path],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._queries = queries
        self._endpoint = endpoint
        self._folder = folder
        self._reference: HubReference | None = None
        self._asks = False
        self._stale = False  # the list that is shown is not of what was asked for last
        self.results = ResultTable(self)
        self.files = FileTable(judge, self)
        self._stack = QStackedWidget()
        self._stack.addWidget(self._empty_page())
        self._stack.addWidget(self._result_page())
        self._stack.addWidget(self._file_page())
        self._stack.addWidget(
            EmptyState("search", "Nothing found", "Try fewer or other words, or another kind of model.")
        )
        self.banner = TroubleBanner()
        self.banner.near_wanted.connect(self._ask_near)
        self.banner.settings_wanted.connect(self.settings_wanted)
        self.banner.again_wanted.connect(self.go)
        self._busy = QProgressBar()
        self._busy.setRange(0, 0)
        self._busy.setTextVisible(False)
        self._busy.setFixedHeight(3)
        self._busy.setMaximumHeight(3)
        keep = self._busy.sizePolicy()
        keep.setRetainSizeWhenHidden(True)
        self._busy.setSizePolicy(keep)
        self._busy.hide()
        column(self._head(), self._busy, self.banner, self._stack, spacing=0, parent=self).setStretch(3, 1)
        queries.asking.connect(self._asking)
        queries.waits.connect(self.banner.show_wait)
        queries.searched.connect(self._searched)
        queries.listed.connect(self._listed)
        queries.failed.connect(self._failed)
        self.files.ready.connect(self._ready)
        self.files.chosen.connect(self._show_choice)
        self._typed()

    # Parts ------------------------------------------------------------------------------------------

    def _head(self) -> QWidget:
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        self.field = QLineEdit()
        self.field.setPlaceholderText("Paste user/model or an address, or search the hub")
        self.field.setAccessibleName("Model name, address or search words")
        self.field.setClearButtonEnabled(True)
        self.field.setMaxLength(2000)
        self.field.textChanged.connect(self._typed)
        self.field.returnPressed.connect(self.go)
        below = QShortcut(QKeySequence(Qt.Key.Key_Down), self.field)
        below.setContext(Qt.ShortcutContext.WidgetShortcut)
        below.activated.connect(self._go_down)
        self.kind = QuietCombo()
        self.kind.setAccessibleName("Kind of model")
        for text, tags in _KINDS:
            self.kind.addItem(text, tags)
        self.sort = QuietCombo()
        self.sort.setAccessibleName("Order of the results")
        for text, value in _SORTS:
            self.sort.addItem(text, value)
        for combo, width in ((self.kind, 136), (self.sort, 176)):
            combo.setFixedWidth(width)
            combo.currentIndexChanged.connect(self._search_again)
        self.start = button("Search", self.go, kind="primary")
        self.start.setMinimumWidth(112)
        made = row(self.field, self.kind, self.sort, self.start, margins=(16, 0, 16, 0), parent=head)
        made.setStretch(0, 1)
        return head

    def _empty_page(self) -> QWidget:
        return EmptyState(
            "download",
            "Find a model or a LoRA",
            "Search by words, or paste user/model, user/model:branch or a page's address. Downloads go on after "
            "cuts and restarts, and every file is checked before it appears in the library.",
        )

    def _result_page(self) -> QWidget:
        self.result_view = Table(
            "Search results",
            ResultCell(),
            {hub_tables.KIND: 144, hub_tables.DOWNLOADS: 104, hub_tables.LIKES: 80, hub_tables.UPDATED: 136},
            (hub_tables.LIKES, hub_tables.UPDATED, hub_tables.KIND),
        )
        self.result_view.setSelectionMode(Table.SelectionMode.SingleSelection)
        self.result_view.set_model(self.results)
        self.result_view.setSortingEnabled(True)
        self.result_view.horizontalHeader().setSortIndicator(-1, Qt.SortOrder.DescendingOrder)
        self.result_view.opened.connect(self._open_hit)
        return self.result_view

    def _file_page(self) -> QWidget:
        self.back = icon_button("chevron-left", "Back to the results", self._back)
        self._name = ElidedLabel()
        self._what = label(tone="muted")
        self._gated = Chip("gated", "warning")
        head = QWidget()
        self._top = row(self.back, self._name, self._gated, self._what, spacing=12, parent=head)
        self._top.setStretch(1, 1)
        self.file_view = Table(
            "Files",
            FileCell(),
            {hub_tables.QUANTIZATION: 112, hub_tables.SIZE: 88, hub_tables.FITS: 96, hub_tables.NOTE: 248},
            (hub_tables.NOTE, hub_tables.QUANTIZATION),
        )
        self.file_view.setSelectionMode(Table.SelectionMode.SingleSelection)
        self.file_view.set_model(self.files)
        self.file_view.opened.connect(self._toggle_row)
        self.copies = QCheckBox()
        self.copies.setChecked(True)
        self.copies.toggled.connect(self._show_choice)
        self.copies.setToolTip(
            "They are compared with the hub's checksum first, and linked rather than copied where the disk can."
        )
        self._where = ElidedLabel(mode=Qt.TextElideMode.ElideMiddle)
        self._where.setProperty("tone", "muted")
        self.fetch = button("Download", self._fetch, kind="primary", icon_name="download", tip="Ctrl+Enter")
        foot = QFrame()
        foot.setObjectName("bar")
        links = [
            button(text, lambda which=which: self.files.check(which), kind="link", tip=tip)
            for text, which, tip in (
                ("Usual", "usual", "What loading needs, nothing twice: no .bin beside safetensors, no original/"),
                ("All", "all", "Every file"),
                ("None", "none", "No file"),
            )
        ]
        below = row(label("Select"), *links, self.copies, self._where, self.fetch, margins=(16, 8, 16, 8), parent=foot)
        below.setStretch(5, 1)
        page = QWidget()
        column(head, self.file_view, foot, spacing=0, parent=page).setStretch(1, 1)
        for keys in ("Ctrl+Return", "Ctrl+Enter"):
            made = QShortcut(QKeySequence(keys), page)
            made.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            made.activated.connect(self.fetch.click)
        return page

    # Asking -----------------------------------------------------------------------------------------

    def focus(self) -> None:
        self.field.setFocus()
        self.field.selectAll()

    def ask(self, reference: HubReference) -> None:
        """Get the file list of a repository."""
        text = reference.repo + (f":{reference.revision}" if reference.revision else "")
        if self.field.text() != text:
            self.field.setText(text)
        self._list(reference)

    def _list(self, reference: HubReference) -> None:
        self._reference = reference
        self._stale = True
        self._show_choice()
        self.banner.hide()
        self._queries.list_files(reference)

    @Slot()
    def go(self) -> None:
        """Get the file list of what is named in the field, or search for its words."""
        self.banner.hide()
        text = self.field.text().strip()
        if not text:
            self.field.setFocus()
            return
        reference = self._named()
        if reference is not None:
            self.ask(reference)
            return
        if "://" in text:
            try:
                parse_reference(text, self._endpoint())
            except WeftError as error:
                self._failed("hub_files", error)
            return
        self._search()

    def _named(self) -> HubReference | None:
        """The repository that the field names; None when it holds words to search for."""
        try:
            return parse_reference(self.field.text(), self._endpoint())
        except WeftError:
            return None

    def _search(self) -> None:
        self._reference = None
        self._queries.forget("hub_files")
        self._queries.search(
            self.field.text().strip(), sort=self.sort.currentData(), tags=tuple(self.kind.currentData())
        )

    @Slot()
    def _search_again(self) -> None:
        if self._stack.currentIndex() in (RESULTS, NOTHING) and self._named() is None and self.field.text().strip():
            self._search()

    @Slot()
    def _typed(self) -> None:
        named = self._named() is not None or "://" in self.field.text()
        self.start.setText("Get file list" if named else "Search")
        self.start.setAccessibleName(self.start.text())
        self.start.setEnabled(bool(self.field.text().strip()))

    # Answers ----------------------------------------------------------------------------------------

    @Slot(bool)
    def _asking(self, asking: bool) -> None:
        self._asks = asking
        self._show_busy()
        if not asking:
            self.banner.show_wait("")

    def _show_busy(self) -> None:
        self._busy.setVisible(self._asks or self.files.busy)

    @Slot(list)
    def _searched(self, hits: list[SearchHit]) -> None:
        self.result_view.horizontalHeader().setSortIndicator(-1, Qt.SortOrder.DescendingOrder)
        self.results.set_hits(hits)
        self._stack.setCurrentIndex(RESULTS if hits else NOTHING)
        if hits:
            self.result_view.setCurrentIndex(self.results.index(0, 0))
            self.result_view.scrollToTop()

    @Slot(object)
    def _listed(self, listing: Listing) -> None:
        wanted = self._reference.file if self._reference is not None else ""
        folder = self._folder(listing)
        self._stale = False
        branch = "" if listing.revision == "main" else f":{listing.revision}"
        self._name.setText(f"{listing.repo}{branch}")
        self._gated.setVisible(listing.gated)
        self._where.setText(f"to {short_path(str(folder), str(Path.home()))}")
        self.back.setVisible(bool(self.results.hits))
        self._top.setContentsMargins(8 if self.results.hits else 16, 6, 16, 6)  # the button has room of its own
        self._stack.setCurrentIndex(FILES)
        self.file_view.setFocus()
        self._what.setText(f"Sorting {len(listing.files):,} files\N{HORIZONTAL ELLIPSIS}")
        self._what.setToolTip("")
        self.files.set_listing(listing, wanted, folder)
        self._show_busy()

    @Slot()
    def _ready(self) -> None:
        """The lines of a file list are there, which takes a moment for many files."""
        listing = self.files.listing
        assert listing is not None
        self._show_busy()
        kind = "LoRA adapter" if listing.kind == "adapter" else "Model"
        kind = kind if self.files.holds_weights else "No model in it"
        whole = self.files.whole
        fits = f" · fits: {whole.word}" if whole is not None and whole.tone != "plain" else ""
        count = f"{len(listing.files):,} file" + ("" if len(listing.files) == 1 else "s")
        self._what.setText(f"{kind} · {count}{fits}")
        self._what.setToolTip(f"Judged by size alone.\n{whole.numbers}" if whole is not None else "")
        checked = next((place for place, line in enumerate(self.files.rows) if line.checked), 0)
        self.file_view.setCurrentIndex(self.files.index(checked, 0))

    @Slot(str, object)
    def _failed(self, kind: str, error: WeftError) -> None:
        if kind == "hub_user":
            return  # the settings' own question
        if kind == "hub_files" and self._stack.currentIndex() == FILES:
            # Not a list of something else under a name that is not there: Download would fetch the wrong thing.
            self.files.set_listing(None)
            self._show_busy()
            self._stack.setCurrentIndex(RESULTS if self.results.hits else EMPTY)
        self.show_error(error)

    def show_error(self, error: WeftError) -> None:
        """Say what failed above the list, with the buttons that help."""
        self.banner.show_error(error)

    @Slot()
    def _show_choice(self) -> None:
        files, elsewhere = self.files.any_chosen, self.files.elsewhere
        rest = self.files.bytes - self.files.in_place
        rest -= elsewhere if self.copies.isChecked() else 0
        # What is downloaded already is compared with the hub's checksum again, and fetched only where that differs.
        done = "Add to library" if elsewhere else "Check again" if files else "Download"
        self.fetch.setText(f"Download {readable_bytes(rest)}" if rest > 0 else done)
        self.fetch.setAccessibleName(self.fetch.text())
        self.fetch.setEnabled(files and not self._stale)
        self.copies.setVisible(bool(elsewhere))
        self.copies.setText(f"Use {readable_bytes(elsewhere)} that is on this machine")

    # Choosing ---------------------------------------------------------------------------------------

    @Slot(QModelIndex)
    def _open_hit(self, index: QModelIndex) -> None:
        hit: SearchHit | None = index.data(HitRole)
        if hit is not None:
            self._list(HubReference(repo=hit.repo))

    @Slot(QModelIndex)
    def _toggle_row(self, index: QModelIndex) -> None:
        line = self.files.rows[index.row()]
        state = Qt.CheckState.Unchecked if line.checked else Qt.CheckState.Checked
        self.files.setData(self.files.index(index.row(), hub_tables.FILE), state, Qt.ItemDataRole.CheckStateRole)

    @Slot()
    def _go_down(self) -> None:
        """From the field into what it found."""
        page = self._stack.currentIndex()
        if page in (RESULTS, FILES):
            (self.result_view if page == RESULTS else self.file_view).setFocus()

    @Slot(str)
    def _ask_near(self, repo: str) -> None:
        self.ask(HubReference(repo=repo))

    def _back(self) -> None:
        self._stack.setCurrentIndex(RESULTS)
        self.result_view.setFocus()

    @Slot()
    def _fetch(self) -> None:
        if self.files.listing is not None and self.files.any_chosen and not self._stale:
            self.wanted.emit(self.files.listing, self.files.files, self.copies.isChecked())
