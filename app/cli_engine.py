"""What the commands that run a model share: the arguments of a load and of sampling, and an engine with the model in it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from app.backends import specs
from app.backends.base import Capability, Spec
from app.cli_library import require_adapters
from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import ModelEntry
from app.core.options import OptionValue, build, describe, parse_assignments, parse_value
from app.core.paths import Paths, default_paths
from app.core.sampling import Sampling, worded
from app.core.stack import AdapterStack
from app.engine import launch, machine, protocol
from app.engine.client import EngineClient
from app.engine.environments import USABLE, Environments
from app.store.database import Database
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.terminal import ProgressLine
from app.workers.load_plan import TRUST, LoadPlan, LoadPlanner

_ALLOW = f"If you trust who made them, add --option {TRUST}=true."


def add_load_arguments(command: argparse.ArgumentParser) -> None:
    """MODEL, --loader, --option and --anyway."""
    command.add_argument("model", metavar="MODEL", help="`starter`, a library name, or a path")
    command.add_argument("--loader", default="", help="one of: " + ", ".join(specs()))
    command.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the loader (may be repeated)"
    )
    command.add_argument("--anyway", action="store_true", help="load although it seems not to fit into memory")


def add_adapter_arguments(command: argparse.ArgumentParser) -> None:
    """--adapter and --bake."""
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="an adapter by path or library name, at weight 1 unless told otherwise (may be repeated)",
    )
    command.add_argument(
        "--bake",
        action="store_true",
        help="write the adapters into the loaded weights: the model's own speed, more memory",
    )


def add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    """One option for each field of Sampling."""
    for field in describe(Sampling):
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"sampling_{field.name}",
            metavar="V",
            help=field.help.replace("%", "%%"),
        )


def sampling_given(parsed: argparse.Namespace) -> dict[str, OptionValue]:
    """The sampling fields that were typed. Raises WeftError BAD_INPUT for a value out of its range."""
    given = {f.name: (f, getattr(parsed, f"sampling_{f.name}")) for f in describe(Sampling)}
    values = {name: parse_value(field, text) for name, (field, text) in given.items() if text is not None}
    build(Sampling, values)
    return values


def sampling_for(model: ModelEntry, given: Mapping[str, OptionValue]) -> Sampling:
    """What was typed, then what the model's maker says, then Weft's own. Tells what of the maker's is used, and what cannot be."""
    for note in model.own_sampling.notes:
        print(f"note: {note}", file=sys.stderr)
    own = {name: value for name, value in model.own_sampling.values().items() if name not in given}
    if own:
        print(f"note: {model.name} brings settings of its own: {worded(own)}", file=sys.stderr)
    return build(Sampling, {**own, **given})


def conversation(system: str, *turns: str) -> list[Message]:
    """Turns of the user under a system prompt, where there is one."""
    messages = [Message(role="system", content=system)] if system else []
    return messages + [Message(role="user", content=turn) for turn in turns]


@contextlib.contextmanager
def loaded_engine(
    parsed: argparse.Namespace,
    model: ModelEntry,
    stack: AdapterStack,
    *,
    baked: bool = False,
    also: Sequence[AdapterStack] = (),
    needs: Capability | None = None,
) -> Iterator[EngineClient]:
    """An engine with this model, loaded as the arguments say, under this stack. What is wrong is refused before anything starts.

    Args:
        also: stacks that it will be asked for later. needs: what the loader must be able to do.
    """
    paths = default_paths()
    environments = Environments(paths.environments)
    with planner_for(paths, environments) as planner:
        plan, command = plan_load(planner, model, parsed, stack)
        for one in also:
            require_adapters(plan.spec, one)
        if needs is not None and needs not in plan.spec.capabilities:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The loader {plan.spec.title} cannot do {needs.value}.",
                "Choose another loader; `weft loaders` says which can.",
            )
        with _engine(plan.spec, paths, environments) as engine:
            _load(engine, planner, plan, msgspec.structs.replace(command, baked=baked))
            yield engine


@contextlib.contextmanager
def planner_for(paths: Paths, environments: Environments) -> Iterator[LoadPlanner]:
    """Plans loads with what is saved for each model."""
    database = Database(paths.database)
    try:
        yield LoadPlanner(
            ModelSettings(database),
            SettingsStore(paths.settings),
            is_ready=lambda name: environments.state(name) in USABLE,
            machine=machine.probe,
        )
    finally:
        database.close()


def plan_load(
    planner: LoadPlanner, model: ModelEntry, parsed: argparse.Namespace, stack: AdapterStack
) -> tuple[LoadPlan, protocol.Load]:
    """The load as the window would do it, with the options given here over those that are saved for the model.

    Raises:
        WeftError: PERMISSION, OUT_OF_MEMORY, UNSUPPORTED, BAD_INPUT.
    """
    spec = planner.choose_loader(model, parsed.loader)
    given = parse_assignments(spec.options, parsed.option)
    plan = planner.plan(model, spec.id, {**planner.saved_options(model, spec), **given})
    allowed = given.get(TRUST) is True
    if not allowed and planner.wants_code(plan):
        raise WeftError(
            ErrorKind.PERMISSION,
            f"{model.name} wants to run its own Python code, which nobody has allowed.",
            f"Read the Python files in {model.path}. {_ALLOW}",
        )
    if not parsed.anyway and (short := planner.shortage(plan)) is not None:
        raise WeftError(
            ErrorKind.OUT_OF_MEMORY,
            f"{model.name} may not fit. {short.message}",
            "Close other programs, take a shorter context length or a smaller quantization, or add --anyway.",
        )
    require_adapters(spec, stack)
    return plan, planner.command(plan, stack, allowed=allowed)


@contextlib.contextmanager
def _engine(spec: Spec, paths: Paths, environments: Environments) -> Iterator[EngineClient]:
    if environments.state(spec.environment) not in USABLE:
        environments.install_for_command_line(spec.environment)
    engine = launch.engine_for(spec.id, paths)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown()


def _load(engine: EngineClient, planner: LoadPlanner, plan: LoadPlan, command: protocol.Load) -> None:
    line = ProgressLine()
    line.show(Progress(phase=f"Loading {plan.entry.name}"))
    try:
        for event in engine.call(command):
            if isinstance(event, protocol.ProgressEvent):
                line.show(event.progress)
            elif isinstance(event, protocol.Loaded):
                line.clear()
                for note in event.notes:
                    print(f"note: {note}", file=sys.stderr)
                _remember(planner, plan, event)
    except WeftError as error:
        if command.trust_remote_code or not planner.code_would_help(plan, error):
            raise
        raise WeftError(error.kind, error.message, f"It brings Python code of its own. {_ALLOW}") from error
    finally:
        line.clear()


def _remember(planner: LoadPlanner, plan: LoadPlan, loaded: protocol.Loaded) -> None:
    try:
        planner.remember(plan, loaded)
    except WeftError as error:
        print(f"note: {error.message}", file=sys.stderr)  # the model runs; it will be measured again
