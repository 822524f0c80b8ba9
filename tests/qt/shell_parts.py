"""What the shell's tests build: stores in the test's own home, a loadout over the fake engine, the pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from app.core.library import ModelEntry, ModelFormat, ModelShape
from app.core.memory import Machine
from app.core.paths import Paths, default_paths
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout
from app.viewmodels.machine_watch import MachineWatch
from app.workers.engine_worker import EngineWorker
from tests.fakes.fake_engine import Script, fake_client

GB = 10**9


def machine(free: int = 16 * GB) -> Machine:
    return Machine(system="linux", cpu_count=2, ram_total=32 * GB, ram_free=free)


def model(name: str = "maker/tiny-1B", folder: str = "/models", *, size: int = GB, **fields: object) -> ModelEntry:
    """A GGUF model entry that llama.cpp's SPEC takes; no file of it exists."""
    path = f"{folder}/{name}.gguf"
    shape = ModelShape(
        layers=4,
        hidden=64,
        intermediate=128,
        heads=4,
        kv_heads=4,
        head_dim=16,
        value_dim=16,
        vocabulary=100,
        context=2048,
    )
    entry = ModelEntry(
        id=path,
        name=name,
        path=path,
        root=folder,
        format=ModelFormat.GGUF,
        quantization="Q4_K_M",
        architecture="llama",
        model_type="llama",
        parameters=size * 2,
        bytes=size,
        weight_bytes=size,
        shape=shape,
        files=(path,),
        has_chat_template=True,
    )
    return msgspec.structs.replace(entry, **fields)


class Installed:
    """Environments as the loadout sees them; what is not in `missing` is ready."""

    def __init__(self, *missing: str) -> None:
        self.missing = set(missing)

    def is_ready(self, name: str) -> bool:
        return name not in self.missing

    def title(self, name: str) -> str:
        return f"Environment {name}"


@dataclass
class Rooms:
    """Stores and view models of one test. `script` is what engines made from now on do."""

    paths: Paths
    database: Database
    settings: SettingsStore
    library: LibraryStore
    model_settings: ModelSettings
    jobs: JobStore
    roots: LibraryRoots
    environments: Installed
    script: Script = field(default_factory=Script)
    free: int = 16 * GB
    made: list[str] = field(default_factory=list)
    closers: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def build(cls) -> Rooms:
        paths = default_paths()
        database = Database(paths.database)
        settings = SettingsStore(paths.settings)
        rooms = cls(
            paths=paths,
            database=database,
            settings=settings,
            library=LibraryStore(database),
            model_settings=ModelSettings(database),
            jobs=JobStore(database),
            roots=LibraryRoots(settings, paths),
            environments=Installed(),
        )
        rooms.closers.append(database.close)
        return rooms

    def make_worker(self, loader: str) -> EngineWorker:
        self.made.append(loader)
        self.paths.logs.mkdir(parents=True, exist_ok=True)
        return EngineWorker(fake_client(self.paths.logs, self.script))

    def loadout(self) -> Loadout:
        made = Loadout(
            make_worker=self.make_worker,
            library=self.library,
            model_settings=self.model_settings,
            settings=self.settings,
            environments=self.environments,
            machine=lambda: machine(self.free),
            log_of=lambda _: self.paths.logs / "fake.log",
        )
        self.closers.insert(0, made.close)
        return made

    def watch(self) -> MachineWatch:
        made = MachineWatch()
        made._now = machine(self.free)
        self.closers.insert(0, made.close)
        return made

    def close(self) -> None:
        for close in self.closers:
            close()


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path
