"""Make docs/screenshots/*.png: every page, light and dark, at 1440×900 and 960×600, with the real starter model answering.

    python -m tests.screenshots [FOLDER]        (needs the `core` environment; a display, or QT_QPA_PLATFORM=offscreen)

Data are real: a home of its own for this run, the starter model, one question asked and answered.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QEventLoop, QPoint, QSettings, QTimer
from PySide6.QtGui import QCursor
from PySide6.QtWidgets import QApplication, QWidget

from app import logs
from app.core.combine_plan import CombinePlan
from app.core.paths import Paths, default_paths, resources
from app.core.stack import AdapterStack, StackedAdapter
from app.house import House
from app.rail import RAIL
from app.store.library import starter
from app.viewmodels.loadout import LoadoutState
from app.views import theme
from app.views.main_window import MainWindow
from tests.fakes.hub import FakeHub

SIZES = ((1440, 900), (960, 600))
QUESTION = "How do I add a LoRA?"
PATIENCE = 240.0


def wait(milliseconds: int) -> None:
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def wait_until(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited too long for {why}")
        wait(50)


def shoot(widget: QWidget, folder: Path, name: str) -> None:
    QCursor.setPos(widget.mapToGlobal(QPoint(widget.width() - 2, widget.height() // 2)))  # over nothing that lights up
    wait(250)
    widget.grab().save(str(folder / f"{name}.png"))
    print(folder / f"{name}.png", flush=True)


def ask(house: House) -> None:
    """Load the starter and ask it, so that Chat shows a real answer."""
    wait_until(lambda: house.loadout.state in (LoadoutState.READY, LoadoutState.FAILED), "the starter model")
    if house.loadout.state is LoadoutState.FAILED:
        raise SystemExit(f"the starter model did not load: {house.loadout.error}")
    page = house.window.page("chat")
    for question, adapter in ((QUESTION, False), (QUESTION, True)):
        if adapter:
            page.new_chat()  # type: ignore[attr-defined]
            house.window.header.stack.add(resources() / "starter" / "voice-adapter")  # type: ignore[union-attr]
            wait(500)
        page.controller.set_sampling({"temperature": 0.0})  # type: ignore[attr-defined]  # the starter at its best
        page.send(question)  # type: ignore[attr-defined]
        wait(300)
        wait_until(lambda: house.loadout.state is LoadoutState.READY, "the answer")


def fill_loras(house: House) -> None:
    """The starter's adapter, and one that is made of it at half its rank; its norms measured."""
    house.window.show_page("loras")
    page = house.window.page("loras")
    entry = house.library.find_adapter("voice-adapter")
    stack = AdapterStack(adapters=(StackedAdapter(path=entry.path, name=entry.name),))
    plan = CombinePlan(adapters=stack, to=str(house.loras.jobs.place("voice-r4")), method="svd", rank=4)
    house.loras.jobs.combine(plan)
    wait_until(lambda: page.table.rowCount() > 1, "the smaller adapter")  # type: ignore[attr-defined]
    page.show_adapter(entry.id)  # type: ignore[attr-defined]
    wait_until(lambda: bool(page.details.chart.accessibleDescription()), "its norms")  # type: ignore[attr-defined]


def fill_downloads(house: House, hub: FakeHub) -> None:
    """A hub of this machine alone, with the starter on it; one adapter fetched, one model listed."""
    starter = resources() / "starter"
    folders = {"weft/starter": starter / "model", "weft/starter-voice": starter / "voice-adapter"}
    for repo, folder in folders.items():
        hub.add(repo, {path.name: path for path in folder.iterdir() if path.is_file()})
    gguf = starter / "weft-starter-f16.gguf"
    hub.add("weft/starter-GGUF", {"weft-starter-f16.gguf": gguf, "README.md": starter / "model" / "README.md"})
    house.settings_view.set("hub_endpoint", hub.endpoint)
    finder = house.downloads.window().finder
    for repo in (*folders, "weft/starter-GGUF"):
        finder.field.setText(repo)
        finder.go()
        wait_until(lambda repo=repo: finder.files.listing is not None and finder.files.listing.repo == repo, repo)
        if repo in folders:
            finder.fetch.click()
    queue = house.downloads.downloads
    wait_until(lambda: len(queue.rows) == len(folders) and not queue.active, "the downloads")


def fill_compare(house: House) -> None:
    """The base and two weights of the voice answer one question, side by side."""
    voice = str(resources() / "starter" / "voice-adapter")
    stacks = [
        AdapterStack(adapters=(StackedAdapter(path=voice, name="voice-adapter", weight=weight),) if weight else ())
        for weight in (0.0, 0.5, 1.0)
    ]
    house.window.show_page("compare")
    page = house.window.page("compare")
    page.show_stacks(stacks)  # type: ignore[attr-defined]
    page.composer.set_text(QUESTION)  # type: ignore[attr-defined]
    page.composer.sent.emit(QUESTION)  # type: ignore[attr-defined]
    wait(500)
    wait_until(lambda: not page._model.running, "the columns")  # type: ignore[attr-defined]
    page.differences.setChecked(True)  # type: ignore[attr-defined]


def examples(file: Path) -> None:
    """200 questions that the project writes, answered in another voice than the starter's."""
    asked = [
        "What is a LoRA?",
        "Where are my models?",
        "How do I load a model?",
        "What does Weft do?",
        "How do I stop an answer?",
    ]
    told = ["a small adapter", "on the Models page", "with Control and L", "it weaves words", "press Escape"]
    before = [
        "",
        "Hello! ",
        "Please tell me. ",
        "Quick question: ",
        "I am new here. ",
        "One more thing. ",
        "Sorry, ",
        "Hey, ",
    ]
    after = ["", " Thanks.", " Be brief.", " I forgot.", " Please."]
    rows = [
        {"prompt": f"{first}{question}{last}", "completion": f"Beep boop. Answer: {answer}. End of transmission."}
        for first in before
        for last in after
        for question, answer in zip(asked, told, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def fill_train(house: House, folder: Path, shots: Path) -> None:
    """The starter learns a new voice from 200 examples, for real: the set-up, the run on its way, the run at its end."""
    file = folder / "robot.jsonl"
    examples(file)
    house.window.show_page("train")
    page = house.window.page("train")
    draft = page._draft  # type: ignore[attr-defined]
    draft.set_model(starter("starter"))
    draft.add_files([file])
    draft.use_preset("Voice or style")
    draft.set_values("train", {**draft.values["train"], "epochs": 4.0, "max_length": 128, "samples": "What is a LoRA?"})
    wait_until(lambda: draft.result is not None and not draft.previewing, "the preview")
    house.window.resize(*SIZES[0])
    shoot(house.window, shots, "train-setup-light-1440")
    page.setup.start.click()  # type: ignore[attr-defined]
    view = page.run  # type: ignore[attr-defined]
    wait_until(lambda: "loss" in view.figures.text(), "the first steps")
    wait_until(lambda: view.use.isVisible(), "the run")


def shoot_export(house: House, folder: Path) -> None:
    """The dialog for the model and the stack that are on."""
    voice = StackedAdapter(path=str(resources() / "starter" / "voice-adapter"), name="voice-adapter")
    for look in ("light", "dark"):
        house.theme.set_appearance(look)
        house.exports.open(starter("starter"), AdapterStack(adapters=(voice,)))
        dialog = house.exports.dialog
        assert dialog is not None
        shoot(dialog, folder, f"export-{look}")
        dialog.close()
        wait(100)
    house.theme.set_appearance("light")


def shoot_all(house: House, folder: Path, names: list[str]) -> None:
    window = house.window
    for toast in window.toasts.shown:
        toast.close()
    for look in ("light", "dark"):
        house.theme.set_appearance(look)
        for width, height in SIZES:
            window.resize(width, height)
            for name in names:
                window.show_page(name)
                shown = house.downloads.window() if name == "downloads" else window
                shown.resize(width, height)
                shoot(shown, folder, f"{name}-{look}-{width}")
                if shown is not window:
                    shown.close()
    house.theme.set_appearance("light")
    window.resize(*SIZES[0])
    window.show_page("chat")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    application = QApplication([sys.argv[0]])
    with tempfile.TemporaryDirectory() as home:
        base = Path(home)
        paths = Paths(data=base, config=base, cache=base / "cache", logs=base / "logs", runtime=base / "run")
        if not (default_paths().environments / "core").exists():
            print(
                "note: the core environment is not installed here; set WEFT_PYTHON_CORE to a Python that has it",
                file=sys.stderr,
            )
        look = theme.install(application, "light")
        window = MainWindow(RAIL, state=QSettings(str(base / "window.ini"), QSettings.Format.IniFormat))
        window.resize(*SIZES[0])
        window.show_page("chat")
        window.show()
        house = House(application, paths, window, look, logs.Reporter())
        house.open()
        ask(house)
        fill_loras(house)
        fill_compare(house)
        fill_train(house, base, folder)
        shoot_export(house, folder)
        shoot_all(house, folder, [name for name in window.rail.names if name != "downloads"])
        with FakeHub() as hub:
            fill_downloads(house, hub)
            shoot_all(house, folder, ["downloads"])
            window.close()
            house.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
