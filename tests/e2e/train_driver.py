"""Runs the real window and trains in it, for a test that kills it.

python -m tests.e2e.train_driver EVENTS DATA begin    the starter is trained on DATA, for a long time
python -m tests.e2e.train_driver EVENTS DATA resume   the run that was cut off goes on by its button, and is stopped and kept

EVENTS is a file to which one JSON document per line is appended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, Slot
from PySide6.QtWidgets import QApplication

from app import bootstrap, house
from app.core.errors import WeftError
from app.core.jobs import Job
from app.store.library import starter

SETTINGS = {
    "epochs": 500.0,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "max_length": 64,
    "checkpoint_every": 3,
    "evaluate_every": 100,
}


class DrivenHouse(house.House):
    """The house, with somebody in it."""

    events: Path
    data: Path
    mode: str

    def open(self, arguments: Sequence[str] = ()) -> None:
        super().open(arguments)
        self.window.show_page("train")
        self.train: Any = self.window.page("train")
        self.train.failed.connect(self._failed)
        self.tasks.metric.connect(self._metric)
        self.tasks.ended.connect(self._over)
        self.steps = 0
        QTimer.singleShot(1500, self, self._begin)

    def tell(self, event: str, **facts: object) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")

    @Slot()
    def _begin(self) -> None:
        if self.mode == "begin":
            self.train.train_on(starter("starter"))
            self.train.take([self.data])
            self.train.setup._draft.set_values("train", SETTINGS)
            self.train.setup.start.click()
            return
        self.train.list.setCurrentRow(0)
        view = self.train.run
        self.tell("reopened", words=view.note.text.text(), resume=view.resume.isVisible())
        view.resume.click()

    @Slot(int, int, object)
    def _metric(self, job: int, step: int, values: dict[str, float]) -> None:
        if "loss" not in values:
            return
        self.steps += 1
        self.tell("step", step=step)
        if self.mode == "resume" and self.steps == 3:
            self.train.run.stop.click()

    @Slot(object, object, object)
    def _over(self, job: Job, result: Any, error: WeftError | None) -> None:
        self.tell(
            "ended",
            adapter=(result or {}).get("adapter", ""),
            ended=(result or {}).get("ended", ""),
            error=str(error or ""),
        )
        application = QApplication.instance()
        assert application is not None
        QTimer.singleShot(500, application.quit)

    @Slot(object)
    def _failed(self, error: WeftError) -> None:
        self.tell("failed", message=str(error))


if __name__ == "__main__":
    DrivenHouse.events, DrivenHouse.data, DrivenHouse.mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    house.House = DrivenHouse  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(bootstrap.main([]))
