"""What the window benchmarks run in processes of their own, so that nothing of the test's interpreter counts.

python -m tests.benchmarks.window_probe paint-bare SPAWNED       first paint of a bare six-page window
python -m tests.benchmarks.window_probe paint-weft SPAWNED       the same of Weft's, and of its first page
python -m tests.benchmarks.window_probe loop-bare SECONDS        gaps between ticks of an idle event loop
python -m tests.benchmarks.window_probe loop-train SECONDS       the same while the starter is trained in a child, its curves in sight
python -m tests.benchmarks.window_probe loop-weft SECONDS RATE   the same while Weft streams RATE tokens a second

SPAWNED is time.time() when the process was started. Prints one JSON document.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QElapsedTimer, QEvent, QObject, Qt, QTimer, Slot

if TYPE_CHECKING:
    from PySide6.QtWidgets import QApplication, QWidget

TICK_MS = 5


class PaintWatch(QObject):
    """Notes when the first widget of each class has been painted; ends the program when all were."""

    def __init__(self, application: QApplication, spawned: float, **awaited: type[QWidget]) -> None:
        super().__init__(application)
        self._application, self._spawned, self._awaited = application, spawned, awaited
        self._seconds: dict[str, float] = {}
        application.installEventFilter(self)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Paint:
            for name, kind in self._awaited.items():
                if isinstance(watched, kind) and name not in self._seconds:
                    self._seconds[name] = 0.0
                    # The paint itself follows this filter: the time is taken when the loop comes round again.
                    QTimer.singleShot(0, self, functools.partial(self._painted, name))
        return False

    def _painted(self, name: str) -> None:
        self._seconds[name] = time.time() - self._spawned
        if len(self._seconds) == len(self._awaited) and all(self._seconds.values()):
            print(json.dumps(self._seconds), flush=True)
            self._application.exit(0)


class LoopWatch(QObject):
    """Ticks every few milliseconds and keeps the gaps, in milliseconds."""

    def __init__(self, parent: QObject) -> None:
        super().__init__(parent)
        self.gaps: list[float] = []
        self._clock = QElapsedTimer()
        self._timer = QTimer(self, interval=TICK_MS, timerType=Qt.TimerType.PreciseTimer)
        self._timer.timeout.connect(self._tick)

    def start(self) -> None:
        self.gaps.clear()
        self._clock.start()
        self._timer.start()

    @Slot()
    def _tick(self) -> None:
        self.gaps.append(self._clock.nsecsElapsed() / 1e6)
        self._clock.restart()


def paint_bare(spawned: float) -> int:
    """A main window with six pages that hold what pages hold: a title, a field, a table or a text, a button."""
    from PySide6.QtWidgets import (
        QApplication,
        QHBoxLayout,
        QLabel,
        QLineEdit,
        QListWidget,
        QMainWindow,
        QPlainTextEdit,
        QPushButton,
        QStackedWidget,
        QTableWidget,
        QVBoxLayout,
        QWidget,
    )

    application = QApplication([])
    application.setStyle("Fusion")
    PaintWatch(application, spawned, window=QMainWindow, page=QPlainTextEdit)
    window, pages, rail = QMainWindow(), QStackedWidget(), QListWidget()
    for name in ("Chat", "Compare", "Models", "LoRAs", "Train", "Evaluate"):
        page = QWidget()
        layout = QVBoxLayout(page)
        for part in (QLabel(name), QLineEdit(), QPlainTextEdit() if name == "Chat" else QTableWidget(20, 6), QPushButton(name)):
            layout.addWidget(part)
        pages.addWidget(page)
        rail.addItem(name)
    body = QWidget()
    row = QHBoxLayout(body)
    row.addWidget(rail)
    row.addWidget(pages, 1)
    window.setCentralWidget(body)
    window.resize(1280, 800)
    window.show()
    return application.exec()


def paint_weft(spawned: float) -> int:
    """Weft as `python -m app` starts it."""
    from PySide6.QtWidgets import QApplication

    from app import bootstrap
    from app.views.main_window import MainWindow
    from app.views.page import Page

    class Watched(QApplication):
        def __init__(self, arguments: list[str]) -> None:
            super().__init__(arguments)
            PaintWatch(self, spawned, window=MainWindow, page=Page)

    bootstrap.QApplication = Watched  # pyright: ignore[reportAttributeAccessIssue]
    return bootstrap.main([])


def loop_bare(seconds: float) -> int:
    """An event loop that has nothing to do."""
    from PySide6.QtWidgets import QApplication, QWidget

    application = QApplication([])
    window = QWidget()
    window.resize(1280, 800)
    window.show()
    watch = LoopWatch(application)
    watch.start()
    QTimer.singleShot(int(seconds * 1000), application.quit)
    application.exec()
    print(json.dumps(watch.gaps))
    return 0


ANSWER = """## How it works

The **adapter** adds `B·A` to each weight, so that *every* layer changes a little. It is small, and it can be taken away \
again without any trace.

1. Drop the file on the window.
2. Move its weight.
   - 0 is the base
   - 1 is the adapter

| weight | means |
| --- | --- |
| 0 | base |
| 1 | adapter |

```python
def merge(w, a, b, s):
    return w + s * (b @ a)  # one rounding
```

"""


def loop_weft(seconds: float, rate: float) -> int:
    """Weft's whole window, its library open, an answer streaming from an engine in a child process."""
    import tempfile

    from PySide6.QtWidgets import QApplication

    from app import house
    from app.bootstrap import main
    from app.workers.engine_worker import EngineWorker
    from tests.fakes.fake_engine import Script, fake_client

    folder = Path(tempfile.mkdtemp(prefix="weft-bench-"))
    answer = ANSWER * (int(rate * (seconds + 8)) // len(ANSWER.split()) + 1)

    class BenchHouse(house.House):
        def _engine_worker(self, loader: str) -> EngineWorker:
            return EngineWorker(fake_client(folder, Script(answers=(answer,), rate=rate)))

        def open(self, arguments: Any = ()) -> None:
            super().open(arguments)
            self.watch = LoopWatch(self)
            self.window.show_page("models")
            QTimer.singleShot(2500, self, self._begin)

        def _begin(self) -> None:
            self.window.show_page("chat")
            QTimer.singleShot(1500, self, self._send)

        def _send(self) -> None:
            page: Any = self.window.page("chat")
            page.controller.send("Tell me everything about adapters.")
            QTimer.singleShot(1000, self, self.watch.start)
            QTimer.singleShot(int(1000 + seconds * 1000), self, self._end)

        def _end(self) -> None:
            streamed = len(self.chats.messages(self.chats.conversations()[0].id)[-1].content)
            print(json.dumps({"gaps": self.watch.gaps, "rows": self.library.count(), "characters": streamed}), flush=True)
            application = QApplication.instance()
            assert application is not None
            application.quit()

    house.House = BenchHouse  # pyright: ignore[reportAttributeAccessIssue]
    return main([])


def loop_train(seconds: float) -> int:
    """Weft's whole window, the starter learning from 200 examples in a child process, its curves, answers and figures shown."""
    import tempfile

    from PySide6.QtWidgets import QApplication

    from app import house
    from app.bootstrap import main
    from app.store.library import starter

    file = Path(tempfile.mkdtemp(prefix="weft-bench-")) / "robot.jsonl"
    rows = [{"prompt": f"What is number {n}?", "completion": f"Beep. It is {n * 7}. Boop."} for n in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    class BenchHouse(house.House):
        def open(self, arguments: Any = ()) -> None:
            super().open(arguments)
            self.watch = LoopWatch(self)
            self.steps = 0
            self.tasks.metric.connect(self._metric)
            self.tasks.ended.connect(self._over)
            QTimer.singleShot(2500, self, self._begin)

        def _begin(self) -> None:
            self.window.show_page("train")
            page: Any = self.window.page("train")
            page.setup._draft.set_model(starter("starter"))
            page.take([file])
            settings = {"epochs": 1000.0, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64, "evaluate_every": 50, "samples": "What is number 7?"}
            page.setup._draft.set_values("train", settings)
            QTimer.singleShot(1500, self, page.setup.start.click)

        @Slot(int, int, object)
        def _metric(self, _job: int, step: int, _values: object) -> None:
            self.steps += 1
            if step == 1:
                QTimer.singleShot(1000, self, self.watch.start)
                QTimer.singleShot(int(1000 + seconds * 1000), self, self._end)

        @Slot(object, object, object)
        def _over(self, _job: object, _result: object, error: object) -> None:
            print(f"the training ended: {error}", file=sys.stderr, flush=True)
            self._quit()

        def _end(self) -> None:
            print(json.dumps({"gaps": self.watch.gaps, "steps": self.steps}), flush=True)
            self._quit()

        def _quit(self) -> None:
            application = QApplication.instance()
            assert application is not None
            application.quit()

    house.House = BenchHouse  # pyright: ignore[reportAttributeAccessIssue]
    return main([])


if __name__ == "__main__":
    modes: dict[str, Any] = {"paint-bare": paint_bare, "paint-weft": paint_weft, "loop-bare": loop_bare, "loop-weft": loop_weft, "loop-train": loop_train}
    sys.exit(modes[sys.argv[1]](*(float(argument) for argument in sys.argv[2:])))
