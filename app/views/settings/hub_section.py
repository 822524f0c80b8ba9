"""Settings, Hub: its address, the token, the proxy. A wrong value says so at its field."""

from __future__ import annotations

from urllib.parse import urlsplit

from PySide6.QtCore import QUrl, Slot
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import QLineEdit, QWidget

from app.core.errors import WeftError
from app.store.secrets import PUBLIC_HUB, TokenStore, Where
from app.viewmodels.background import Background
from app.viewmodels.hub_queries import HubQueries
from app.viewmodels.settings import SettingsView
from app.views.theme import set_property
from app.views.widgets import button, column, label, row

_KEPT: dict[Where, str] = {
    "": "None is set. Public models need none.",
    "keyring": "Kept in the system's keyring.",
    "session": "This system has no keyring: it is kept until Weft is closed.",
    "environment": "Taken from HF_TOKEN in the environment.",
}
_LABEL = 120


class HubSection(QWidget):
    """Three fields. The token is only ever written: what is kept is never shown."""

    def __init__(
        self, settings: SettingsView, tokens: TokenStore, queries: HubQueries, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._settings = settings
        self._tokens = tokens
        self._queries = queries
        self._trying = ""
        self._kept = ""
        self._work = Background(self)
        self._work.done.connect(self._worked)
        self.endpoint = self._line("Address of the hub", settings.now.hub_endpoint, PUBLIC_HUB)
        self.proxy = self._line("Proxy", settings.now.proxy, "What the system says; or http://proxy:3128")
        self.token = self._line("Access token", "", "hf_…")
        self.token.setEchoMode(QLineEdit.EchoMode.Password)
        self.endpoint.editingFinished.connect(self._save_endpoint)
        self.proxy.editingFinished.connect(self._save_proxy)
        self.token.returnPressed.connect(self._save_token)
        self.token.textChanged.connect(self._token_typed)
        self.save = button("Save token", self._save_token)
        self.forget = button("Forget", self._forget, tip="Take the token out of the keyring")
        self.make = button("Make one…", self._open_page, kind="link", icon_name="open")
        self.notes = {name: label(tone="muted", wrap=True) for name in ("endpoint", "token", "proxy")}
        lines = column(spacing=4, parent=self)
        for text, field, name, buttons in (
            ("Address", self.endpoint, "endpoint", ()),
            ("Access token", self.token, "token", (self.save, self.forget, self.make)),
            ("Proxy", self.proxy, "proxy", ()),
        ):
            caption = label(text)
            caption.setFixedWidth(_LABEL)
            caption.setBuddy(field)
            made = row(caption, field, *buttons)
            made.setStretch(1, 1)
            lines.addLayout(made)
            self.notes[name].setContentsMargins(_LABEL + 8, 0, 0, 6)
            lines.addWidget(self.notes[name])
        self._say("endpoint", "Empty is the usual one. A mirror must speak the same protocol.")
        self._say("proxy", "For downloads and questions to the hub. Empty is what the system says.")
        self._token_typed()
        self._look()
        queries.user.connect(self._known)
        queries.failed.connect(self._unknown)

    def _line(self, name: str, text: str, hint: str) -> QLineEdit:
        made = QLineEdit(text)
        made.setPlaceholderText(hint)
        made.setAccessibleName(name)
        made.setMaxLength(1000)
        return made

    def _say(self, name: str, text: str, tone: str = "muted") -> None:
        note = self.notes[name]
        note.setText(text)
        set_property(note, "tone", tone)
        field = {"endpoint": self.endpoint, "token": self.token, "proxy": self.proxy}[name]
        set_property(field, "invalid", "true" if tone == "negative" else "false")

    # Address and proxy ------------------------------------------------------------------------------

    @Slot()
    def _save_endpoint(self) -> None:
        text = self.endpoint.text().strip().rstrip("/")
        if text and not _is_address(text, ("http", "https")):
            self._say("endpoint", "Write it as https://hub.example.org.", "negative")
            return
        plain = urlsplit(text).scheme == "http" and urlsplit(text).hostname not in ("localhost", "127.0.0.1", "::1")
        self._say(
            "endpoint",
            "Plain http: whoever is on the way can read your token."
            if plain
            else "Empty is the usual one. A mirror must speak the same protocol.",
            "warning" if plain else "muted",
        )
        self._settings.set("hub_endpoint", text)
        self._look()

    @Slot()
    def _save_proxy(self) -> None:
        text = self.proxy.text().strip()
        complete = text if not text or "://" in text else f"http://{text}"
        if complete and not _is_address(complete, ("http", "https")):
            self._say("proxy", "Weft uses http proxies: write it as http://proxy:3128.", "negative")
            return
        self._say("proxy", "For downloads and questions to the hub. Empty is what the system says.")
        self._settings.set("proxy", complete)
        self._queries.stop()  # the next question goes the new way

    # Token ------------------------------------------------------------------------------------------

    @Slot()
    def _token_typed(self) -> None:
        self.save.setEnabled(bool(self.token.text().strip()))

    @Slot()
    def _save_token(self) -> None:
        token, endpoint = self.token.text().strip(), self._settings.now.hub_endpoint
        if token:
            self._trying = token
            self._work.run(("set", token), lambda: self._tokens.set(token, endpoint))

    @Slot()
    def _forget(self) -> None:
        endpoint = self._settings.now.hub_endpoint
        self._work.run(("forget", ""), lambda: self._tokens.set("", endpoint))

    def _look(self) -> None:
        endpoint = self._settings.now.hub_endpoint
        self._work.run(("look", ""), lambda: self._tokens.get(endpoint)[1])

    @Slot(object, object, object)
    def _worked(self, key: object, result: object, error: object) -> None:
        assert isinstance(key, tuple)
        what, token = key
        if isinstance(error, WeftError):
            self._say("token", str(error), "negative")
            return
        where: Where = result  # type: ignore[assignment]
        if what == "forget":
            self._look()
            return
        self.forget.setEnabled(where in ("keyring", "session"))
        self._say("token", _KEPT[where], "warning" if where == "session" else "muted")
        if what == "set":
            self.token.clear()
            self._kept = _KEPT[where]
            self._queries.who(token)

    @Slot(str)
    def _known(self, user: str) -> None:
        if self._trying:
            self._trying = ""
            self._say("token", f"It belongs to {user}. {self._kept}", "positive")

    @Slot(str, object)
    def _unknown(self, kind: str, error: WeftError) -> None:
        if kind == "hub_user" and self._trying:
            self._trying = ""
            self._say("token", f"Saved, but the hub does not accept it: {error.message}", "negative")

    @Slot()
    def _open_page(self) -> None:
        base = self._settings.now.hub_endpoint or PUBLIC_HUB
        QDesktopServices.openUrl(QUrl(f"{base}/settings/tokens"))


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in schemes and bool(url.hostname) and (url.port is None or url.port > 0) and " " not in text
    except ValueError:
        return False
