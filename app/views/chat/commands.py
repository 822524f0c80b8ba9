"""What Ctrl+K offers because of the Chat page: what it can do, sampling presets, and every chat by its title."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from app.viewmodels.chat import ChatController
from app.viewmodels.chat_list import ConversationList
from app.viewmodels.chat_presets import Presets, Values
from app.views.page import PaletteCommand

CHATS = 200


class Commanded(Protocol):
    """What the commands take of the page."""

    controller: ChatController
    model: ConversationList
    presets: Presets

    def new_chat(self) -> object: ...
    def ask_import(self) -> object: ...
    def toggle_panel(self) -> object: ...
    def apply_preset(self, values: Values) -> object: ...
    def open(self, conversation: int) -> object: ...


def chat_commands(page: Commanded, to_front: Callable[[], object]) -> list[PaletteCommand]:
    """The commands as things stand now. `to_front` brings the page to the front."""

    def there(run: Callable[[], object]) -> Callable[[], None]:
        def go() -> None:
            to_front()
            run()

        return go

    found = [
        PaletteCommand(title="New chat", group="Chat", run=there(page.new_chat), shortcut="Ctrl+N", icon="plus"),
        PaletteCommand(title="Import chats…", group="Chat", run=there(page.ask_import), icon="import"),
        PaletteCommand(
            title="Stop the answer",
            group="Chat",
            run=page.controller.stop,
            shortcut="Esc",
            icon="stop",
            enabled=bool(page.controller.writing_conversation),
        ),
        PaletteCommand(
            title="System prompt and sampling",
            group="Chat",
            run=there(page.toggle_panel),
            shortcut="Ctrl+Shift+B",
            icon="side-panel",
        ),
    ]
    found += [
        PaletteCommand(
            title=f"Sampling: {name}", group="Preset", run=partial(page.apply_preset, values), icon="settings"
        )
        for name, values in page.presets.all().items()
    ]
    found += [
        PaletteCommand(
            title=conversation.title, group="Chat", run=there(partial(page.open, conversation.id)), icon="chat"
        )
        for conversation in page.model.conversations[:CHATS]
    ]
    return found
