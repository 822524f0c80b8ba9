"""The part of a menu that saves the present stack, and puts on, renames and deletes saved ones."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtWidgets import QDialog, QMenu, QWidget

from app.core.errors import WeftError
from app.store.stacks import SavedStack
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.saved_stacks import SavedStacks
from app.views.icons import icon
from app.views.page import Notice

SHOWN = 60


def fill_saved_stacks(
    menu: QMenu, saved: SavedStacks, stack: StackModel, parent: QWidget, *, notice: Callable[[Notice], object]
) -> None:
    """Add the entries. notice: shows a toast."""
    keep = menu.addAction(icon("plus"), "Save this stack…", lambda: save_stack(saved, parent, notice))
    keep.setEnabled(bool(stack.entries))
    keep.setToolTip("" if stack.entries else "Add an adapter to the stack first.")
    try:
        known = saved.list()
    except WeftError as error:
        menu.addAction(str(error)).setEnabled(False)
        return
    if not known:
        menu.addAction("No saved stacks yet").setEnabled(False)
        return
    menu.addAction("Saved stacks").setEnabled(False)  # a heading; the style sheet draws no sections
    for each in known[:SHOWN]:
        put = menu.addAction(each.name.replace("&", "&&"), lambda _=False, each=each: apply_stack(saved, each, notice))
        put.setToolTip(f"Put on {each.stack.title}")
    menu.addSeparator()
    renaming, deleting = menu.addMenu("Rename"), menu.addMenu("Delete")
    for each in known[:SHOWN]:
        text = each.name.replace("&", "&&")
        renaming.addAction(text, lambda _=False, each=each: rename_stack(saved, each, parent))
        deleting.addAction(text, lambda _=False, each=each: delete_stack(saved, each, notice))


def save_stack(saved: SavedStacks, parent: QWidget, notice: Callable[[Notice], object]) -> QDialog:
    """Ask for a name, and keep the present stack under it."""
    from app.views.loras.sheets import NameSheet

    def take(name: str) -> None:
        saved.save(name, replace=saved.is_taken(name))
        notice(Notice(text=f"The stack is saved as {name}.", tone="positive"))

    sheet = NameSheet(
        "Save this stack",
        saved.present.title,
        "Save",
        take,
        name=" + ".join(adapter.name for adapter in saved.present.adapters if adapter.weight)[:80],
        warn=lambda name: "There is one of that name: it is replaced." if saved.is_taken(name) else "",
        parent=parent.window(),
    )
    sheet.open()
    return sheet


def apply_stack(saved: SavedStacks, one: SavedStack, notice: Callable[[Notice], object]) -> None:
    """Put it on; what is gone is said."""
    missing = saved.apply(one)
    if missing:
        notice(Notice(text=" ".join(missing), tone="warning"))


def rename_stack(saved: SavedStacks, one: SavedStack, parent: QWidget) -> QDialog:
    """Ask for another name."""
    from app.views.loras.sheets import NameSheet

    def check(name: str) -> str:
        same = name.casefold() == one.name.casefold()
        return "There is one of that name already." if saved.is_taken(name) and not same else ""

    sheet = NameSheet(
        f"Rename {one.name}",
        one.stack.title,
        "Rename",
        lambda name: saved.rename(one.id, name),
        name=one.name,
        check=check,
        parent=parent.window(),
    )
    sheet.open()
    return sheet


def delete_stack(saved: SavedStacks, one: SavedStack, notice: Callable[[Notice], object]) -> None:
    """Forget it, with a way back."""
    undo = saved.delete(one.id)
    notice(Notice(text=f"The saved stack {one.name} is deleted.", action="Undo" if undo else "", run=undo))
