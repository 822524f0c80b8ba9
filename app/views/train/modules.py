"""Which modules of the model are trained: its own names, each with a check mark."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt, Slot
from PySide6.QtWidgets import QListWidget, QListWidgetItem, QWidget

from app.viewmodels.train_draft import TrainDraft
from app.views.widgets import Fold, button, column, label, row

_NAME = Qt.ItemDataRole.UserRole
_MOST_ROWS = 9
_ROW = 24


class ModulesChoice(Fold):
    """The names that the chosen model has, read from the model itself. Follows `targets` and sets it."""

    def __init__(self, draft: TrainDraft, parent: QWidget | None = None) -> None:
        self._draft = draft
        self._filling = False
        self.list = QListWidget()
        self.list.setAccessibleName("Trained modules of this model")
        self.list.setAccessibleDescription("Space checks or unchecks a module")
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.all = button("All linear", lambda: draft.set_targets([]), kind="link")
        self.attention = button("Attention only", self._attention, kind="link")
        self.further = label(tone="muted", wrap=True)
        content = QWidget()
        column(row_of(self.all, self.attention), self.list, self.further, spacing=4, parent=content)
        super().__init__("Modules", content, parent=parent)
        self.list.itemChanged.connect(self._changed)
        draft.modules_known.connect(self.show_modules)
        draft.changed.connect(self.show_choice)
        self.show_modules()

    @Slot()
    def show_modules(self) -> None:
        """Fill the list with the model's names."""
        found = self._draft.modules
        self.setVisible(found is not None)
        if found is None:
            return
        self.header.setText(f"Modules of this model ({found.layers} layers)")
        self._filling = True
        self.list.clear()
        for name, count in found.linear.items():
            self._add(name, f"{name}  ×{count}")
        for name in found.embeddings:
            self._add(name, f"{name}  (embedding)" if "head" not in name else f"{name}  (output)")
        self._filling = False
        self.list.setFixedHeight(_ROW * max(1, min(_MOST_ROWS, self.list.count())) + 2 * self.list.frameWidth() + 2)
        known = set(found.linear)
        self.attention.setVisible(bool(_attention_names(known)))
        self.further.setVisible(bool(found.experts))
        self.further.setText(
            f"Experts in one tensor, for Trained parameters: {', '.join(found.experts)}." if found.experts else ""
        )
        self.show_choice()

    def _add(self, name: str, text: str) -> None:
        item = QListWidgetItem(text)
        item.setData(_NAME, name)
        item.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable | Qt.ItemFlag.ItemIsUserCheckable)
        item.setCheckState(Qt.CheckState.Unchecked)
        item.setSizeHint(QSize(0, _ROW))
        self.list.addItem(item)

    @Slot()
    def show_choice(self) -> None:
        """Check what is trained."""
        found = self._draft.modules
        if found is None:
            return
        chosen = set(self._draft.targets) or set(found.linear)
        by_pattern = bool(self._draft.values["method"].get("target_regex"))
        self.list.setEnabled(not by_pattern)
        self.list.setToolTip("Trained modules by pattern goes before this list" if by_pattern else "")
        self._filling = True
        for place in range(self.list.count()):
            item = self.list.item(place)
            on = item.data(_NAME) in chosen
            item.setCheckState(Qt.CheckState.Checked if on else Qt.CheckState.Unchecked)
        self._filling = False

    @Slot(QListWidgetItem)
    def _changed(self, _item: QListWidgetItem) -> None:
        found = self._draft.modules
        if self._filling or found is None:
            return
        items = [self.list.item(place) for place in range(self.list.count())]
        checked = [str(item.data(_NAME)) for item in items if item.checkState() is Qt.CheckState.Checked]
        listed = {str(item.data(_NAME)) for item in items}
        typed = [name for name in self._draft.targets if name not in listed]  # full names and the like stay
        names = checked + typed
        self._draft.set_targets([] if not names or set(names) == set(found.linear) else names)
        self.show_choice()

    def _attention(self) -> None:
        found = self._draft.modules
        if found is not None:
            self._draft.set_targets(_attention_names(set(found.linear)))


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "c_attn", "Wqkv")


def _attention_names(known: set[str]) -> list[str]:
    return [name for name in _ATTENTION if name in known]


def row_of(*widgets: QWidget) -> QWidget:
    """Widgets side by side, at the left."""
    holder = QWidget()
    row(*widgets, 1, parent=holder)
    return holder
