"""What to load, and how: the loader, its options, whether it fits, whether the model's own code may run. No Qt.

The window and the command line load through this alone, so that both take the loader and options that are saved for a
model, refuse what does not fit, and run a model's code only with somebody's word for exactly these files.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from app import backends
from app.backends.base import Spec
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.memory import Estimate, Machine
from app.core.model_code import ModelCode, check_references, read_code
from app.core.options import OptionValue, build, describe
from app.core.stack import AdapterStack
from app.engine.protocol import Load, Loaded
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.terminal import readable_bytes

NO_ADAPTERS = AdapterStack()
TRUST = "trust_remote_code"  # the option by which a loader is asked to run a model's own code


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A load that was decided on.

    Attributes:
        options: changed fields of the loader's options, checked.
        chosen: the loader that somebody asked for, "" when it was left to Weft.
    """

    entry: ModelEntry
    spec: Spec
    options: dict[str, OptionValue]
    chosen: str = ""


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why a load does not fit, in a sentence, and the numbers behind it."""

    message: str
    estimate: Estimate
    machine: Machine


class LoadPlanner:
    """Decides what a load will be.

    Args:
        is_ready: whether the environment of this name can be used.
        machine: what there is now, free memory included.
    """

    def __init__(
        self,
        model_settings: ModelSettings,
        settings: SettingsStore,
        *,
        is_ready: Callable[[str], bool],
        machine: Callable[[], Machine],
    ) -> None:
        self._model_settings = model_settings
        self._settings = settings
        self._is_ready = is_ready
        self._machine = machine

    # What to load -------------------------------------------------------------------------------

    def choose_loader(self, entry: ModelEntry, loader_id: str = "") -> Spec:
        """The loader asked for, else the one saved for the model, else the preferred one, else the best that is ready.

        Raises:
            WeftError: none takes the model.
        """
        saved = loader_id or self._model_settings.get(entry.id)[0] or ""
        cuda = bool(self._machine().gpus)
        if not saved:
            wish = backends.specs().get(self._settings.settings.loaders.get(entry.format.value, ""))
            if wish is not None and not backends.refusal(wish, entry, cuda=cuda):
                saved = wish.id
        if saved and not loader_id and saved not in backends.specs():
            saved = ""  # saved by a Weft that had this loader
        return backends.choose(entry, ready=self._is_ready, cuda=cuda, preferred=saved)

    def saved_options(self, entry: ModelEntry, spec: Spec) -> dict[str, OptionValue]:
        """The options saved for this model and loader, without what this version no longer knows or takes."""
        known = {field.name for field in describe(spec.options)}
        kept: dict[str, OptionValue] = {}
        for name, value in self._model_settings.get(entry.id, spec.id)[1].items():
            if name in known:
                try:
                    build(spec.options, {name: value})
                except WeftError:
                    continue
                kept[name] = value
        return kept

    def plan(
        self, entry: ModelEntry, loader_id: str = "", options: Mapping[str, OptionValue] | None = None
    ) -> LoadPlan:
        """The load of a model with these options, or with those saved for it.

        Raises:
            WeftError: no loader takes the model, or an option is wrong.
        """
        spec = self.choose_loader(entry, loader_id)
        values = dict(options) if options is not None else self.saved_options(entry, spec)
        build(spec.options, values)
        return LoadPlan(entry=entry, spec=spec, options=values, chosen=loader_id)

    def shortage(self, plan: LoadPlan, *, freed: int = 0) -> Shortage | None:
        """Why it does not fit; None when it does, or nobody can tell.

        Args:
            freed: bytes that the model loaded now will give back first.
        """
        here = self._machine()
        estimate = plan.spec.estimate(plan.entry, build(plan.spec.options, plan.options), here)
        message = shortage(estimate, here, freed=freed)
        return Shortage(message=message, estimate=estimate, machine=here) if message else None

    def command(self, plan: LoadPlan, adapters: AdapterStack = NO_ADAPTERS, *, allowed: bool = False) -> Load:
        """What the engine is told.

        Args:
            allowed: the user has just said that the model's own code may run; otherwise what was remembered counts.

        Raises:
            WeftError: the code that was just allowed lies elsewhere than in the model's folder.
        """
        if allowed:
            self.code(plan.entry)
        runs = _may_run_code(plan) and (allowed or self.trusts_code(plan.entry))
        return Load(
            model=plan.entry,
            options={**plan.options, TRUST: True} if runs else plan.options,
            adapters=adapters,
            trust_remote_code=runs,
            calibration=self._calibration(plan.spec),
        )

    # What was measured --------------------------------------------------------------------------

    def _calibration(self, spec: Spec) -> dict[str, int]:
        start = _calibration_key(spec.id, "")
        return {
            name.removeprefix(start): value
            for name, value in self._settings.settings.calibration.items()
            if name.startswith(start) and type(value) is int
        }

    def remember(self, plan: LoadPlan, loaded: Loaded) -> None:
        """Keep what the engine measured on this machine for the next load. Raises WeftError when that cannot be written."""
        known = self._settings.settings.calibration
        measured = {_calibration_key(plan.spec.id, name): value for name, value in loaded.calibration.items()}
        if any(known.get(name) != value for name, value in measured.items()):
            self._settings.update(calibration={**known, **measured})

    # Code of a model's own ----------------------------------------------------------------------

    def code(self, entry: ModelEntry) -> ModelCode:
        """The Python files that could run; none when the model asks for none.

        Raises:
            WeftError: HOSTILE or UNSUPPORTED when they lie elsewhere; NOT_FOUND when there are none; BAD_INPUT when they cannot be read whole.
        """
        if not entry.custom_code:
            return ModelCode()
        check_references(entry.name, entry.custom_code)
        found = read_code(Path(entry.path))
        if not found.files:
            raise WeftError(
                ErrorKind.NOT_FOUND,
                f"{entry.name} wants to run {entry.custom_code[0]}, which is missing.",
                "Download the model again.",
            )
        return found

    def trusts_code(self, entry: ModelEntry) -> bool:
        """Whether the user allowed exactly these files."""
        try:
            return self._model_settings.trusts_code(entry.id, self.code(entry).digest)
        except WeftError:
            return False

    def allow_code(self, entry: ModelEntry, digest: str) -> None:
        """Remember the yes; "" takes it back."""
        self._model_settings.trust_code(entry.id, digest)

    def wants_code(self, plan: LoadPlan) -> bool:
        """Whether the options ask for the model's own code, which nobody has allowed yet: then ask before loading."""
        return _may_run_code(plan) and plan.options.get(TRUST) is True and not self.trusts_code(plan.entry)

    def code_would_help(self, plan: LoadPlan, error: WeftError) -> bool:
        """Whether a load that failed like this may go well with the model's own code."""
        return (
            _may_run_code(plan)
            and error.kind in (ErrorKind.HOSTILE, ErrorKind.UNSUPPORTED, ErrorKind.PERMISSION)
            and not self.trusts_code(plan.entry)
        )


def _may_run_code(plan: LoadPlan) -> bool:
    return bool(plan.entry.custom_code) and any(field.name == TRUST for field in describe(plan.spec.options))


def _calibration_key(loader: str, name: str) -> str:
    # By machine, since a home may lie on a network.
    return f"{platform.node() or 'here'}/{loader}/{name}"


def measured_threads(calibration: Mapping[str, OptionValue]) -> list[int]:
    """Numbers of threads that were measured to be the fastest on this machine, one for each loader and size of models."""
    here = _calibration_key("", "").removesuffix("//") + "/"
    return [
        value
        for name, value in sorted(calibration.items())
        if name.startswith(here) and "threads" in name.removeprefix(here).split("/") and type(value) is int
    ]


def without_measurements(calibration: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """What was measured, without this machine's: the next loads measure anew."""
    here = _calibration_key("", "").removesuffix("//") + "/"
    return {name: value for name, value in calibration.items() if not name.startswith(here)}


def shortage(estimate: Estimate, machine: Machine, *, freed: int = 0) -> str:
    """Why a load does not fit, in a sentence; "" when it does.

    Args:
        freed: bytes that the model loaded now will give back first; counted where the new one lacks them.
    """
    ram_free, vram_free = machine.ram_free + freed, machine.vram_free + (freed if estimate.gpu else 0)
    if not machine.ram_free:
        return ""
    if estimate.gpu > vram_free:
        return f"It needs about {readable_bytes(estimate.gpu)} of graphics memory, and {readable_bytes(vram_free)} is free."
    if estimate.ram > ram_free:
        return f"It needs about {readable_bytes(estimate.ram)} of memory, and {readable_bytes(ram_free)} is free."
    return ""
