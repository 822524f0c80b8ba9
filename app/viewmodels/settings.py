"""Settings as the window changes them: saved at once, and whoever depends on one hears of it."""

from __future__ import annotations

from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import WeftError
from app.engine.environment_spec import EnvironmentSpec
from app.engine.environments import Environments, EnvironmentState
from app.store.settings import Settings, SettingsStore
from app.viewmodels.background import Background
from app.viewmodels.jobs import JobCenter
from app.workers.load_plan import measured_threads, without_measurements


class SettingsView(QObject):
    """The settings in use.

    Signals:
        changed(name): a setting has another value. failed(WeftError): it could not be saved, and is as it was.
    """

    changed = Signal(str)
    failed = Signal(object)

    def __init__(self, store: SettingsStore, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._store = store

    @property
    def now(self) -> Settings:
        return self._store.settings

    def set(self, name: str, value: object) -> bool:
        """Save one setting. False (after `failed`) when that was not possible."""
        if getattr(self._store.settings, name) == value:
            return True
        try:
            self._store.update(**{name: value})
        except WeftError as error:
            self.failed.emit(error)
            return False
        self.changed.emit(name)
        return True

    def measured_threads(self) -> list[int]:
        """See `load_plan.measured_threads`."""
        return measured_threads(self.now.calibration)

    def measure_again(self) -> None:
        """Forget what was measured on this machine: the next load does it anew."""
        self.set("calibration", without_measurements(self.now.calibration))


class EngineList(QObject):
    """The engine environments: what there is of each, its size (measured off the window's thread), and what can be done.

    Signals:
        changed: a state or a size is another. failed(WeftError): an environment could not be removed.
    """

    changed = Signal()
    failed = Signal(object)

    def __init__(self, environments: Environments, jobs: JobCenter, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._environments = environments
        self._jobs = jobs
        self._sizes: dict[str, int] = {}
        self._removing: set[str] = set()
        self._work = Background(self)
        self._work.done.connect(self._done)
        jobs.changed.connect(self.changed)
        jobs.environment_changed.connect(self._measure)

    def specs(self) -> dict[str, EnvironmentSpec]:
        return self._environments.specs()

    def state(self, name: str) -> EnvironmentState:
        return self._environments.state(name)

    def problems(self, name: str) -> dict[str, str]:
        """Optional parts that could not be installed, with the reason."""
        return self._environments.failed_layers(name)

    def outside(self, name: str) -> str:
        """The Python that a developer put in place of this environment; "" when it is Weft's own."""
        python = self._environments.python(name)
        return "" if python == self._environments.interpreter(name) else str(python)

    def is_installing(self, name: str) -> bool:
        return self._jobs.is_installing(name)

    def is_removing(self, name: str) -> bool:
        return name in self._removing

    def size(self, name: str) -> int | None:
        """Bytes on disk; None while they are being counted."""
        return self._sizes.get(name)

    def measure(self) -> None:
        """Count again what every environment takes."""
        for name in self.specs():
            self._measure(name)

    @Slot(str)
    def _measure(self, name: str) -> None:
        self._work.run(("size", name), lambda: self._environments.size(name))

    def install(self, name: str, *, repair: bool = False) -> None:
        self._jobs.install(name, repair=repair)

    def cancel(self, name: str) -> None:
        self._jobs.cancel_install(name)

    def remove(self, name: str) -> None:
        """Delete an environment in the background."""
        self._removing.add(name)
        self.changed.emit()
        self._work.run(("remove", name), lambda: self._environments.remove(name))

    def close(self) -> None:
        self._work.close()

    @Slot(object, object, object)
    def _done(self, key: object, result: object, error: object) -> None:
        assert isinstance(key, tuple)
        what, name = key
        if what == "remove":
            self._removing.discard(name)
            self._measure(name)
        elif isinstance(result, int):
            self._sizes[name] = result
        if error is not None:
            self.failed.emit(error)
        self.changed.emit()
