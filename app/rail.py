"""The pages on the rail, from top to bottom. Another page is another line here and a builder in `app.house`."""

from __future__ import annotations

from app.views.page import PageSpec

RAIL = (
    PageSpec(name="chat", title="Chat", icon="chat", loadout_bar=True),
    PageSpec(name="compare", title="Compare", icon="compare", loadout_bar=True),
    PageSpec(name="models", title="Models", icon="models"),
    PageSpec(name="loras", title="LoRAs", icon="loras"),
    PageSpec(name="train", title="Train", icon="train"),
    PageSpec(name="downloads", title="Downloads", icon="download", bottom=True, window=True),
    PageSpec(name="jobs", title="Jobs", icon="jobs", bottom=True),
    PageSpec(name="settings", title="Settings", icon="settings", bottom=True),
)
