"""`weft train RUN.toml`: the window's training, headless."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app.cli_library import find_model
from app.cli_task import run_task
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import ModelEntry
from app.core.paths import default_paths, resources
from app.engine.environments import USABLE, Environments
from app.engine.machine import probe
from app.engine.surroundings import child_environment
from app.store.toml_text import dump
from app.terminal import ProgressLine, print_json
from app.training import methods, run_file
from app.training.distribution import check_configuration, processes_here, uses_cards
from app.training.estimate import check_room
from app.training.run_config import RunConfig, TrainNews, TrainParameters
from app.training.run_resume import SUFFIX, check_place

ENVIRONMENT = "core"


def add_parser(commands: Any) -> None:
    """Add `train` to the command line's parsers."""
    command: argparse.ArgumentParser = commands.add_parser("train", help="train an adapter as a RUN.toml says")
    command.set_defaults(run=run)
    command.add_argument("file", type=Path, metavar="RUN.toml", help="model, data, method, training and output")
    command.add_argument("--resume", action="store_true", help="go on with the unfinished run of this output folder")
    command.add_argument(
        "--preview", action="store_true", help="show what the model would be trained on, and train nothing"
    )
    command.add_argument(
        "--launch", type=Path, metavar="CONFIG", help="train in several processes, as this accelerate config file says"
    )
    command.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write a folder that trains on another machine, and train nothing here",
    )
    command.add_argument("--with-model", action="store_true", help="with --export: copy the model too, however large")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns the exit status. Raises WeftError."""
    config = run_file.read(parsed.file)
    if parsed.preview:
        return _preview(config, parsed.json)
    told = methods.check(config)
    for note in told:
        print(f"note: {note}", file=sys.stderr)
    model = model_of(config)
    parameters = TrainParameters(
        config=config, model=model, resume="yes" if parsed.resume else "no", run_file=dump(run_file.to_table(config))
    )
    if parsed.export is not None:
        return _export(parameters, parsed)
    if parsed.launch is None:  # else the first process looks: this may be a further machine
        check_place(Path(config.output.dir), parameters)
        cards = len(probe().gpus)
        check_room(config, model, card=bool(cards) and config.model.device != "cpu")
        for note in methods.check_machine(config, cards):
            told.append(note)
            print(f"note: {note}", file=sys.stderr)
    _environment()
    try:
        if parsed.launch is not None:
            result = _launch(parameters, parsed.launch, told)
        else:
            result = run_task(ENVIRONMENT, "train", parameters, on_metric=_Metrics(), on_news=_news(told))
    except WeftError as error:
        unfinished = Path(config.output.dir + SUFFIX)
        if error.kind is ErrorKind.CANCELLED and any((unfinished / "checkpoints").glob("step-*")):
            print(
                f"note: go on with `weft train {parsed.file} --resume`; what was learnt lies in {unfinished}",
                file=sys.stderr,
            )
        raise
    if parsed.json:
        print_json(result)
    elif result:
        _print_result(result)
    else:
        print("note: this machine's processes are done; the adapter lies on the first machine", file=sys.stderr)
    return 0


def model_of(config: RunConfig) -> ModelEntry:
    """The library's entry of the base; of the starter's two forms the safetensors one. Raises WeftError NOT_FOUND."""
    return find_model(config.model.path, "transformers")


def _environment() -> None:
    environments = Environments(default_paths().environments)
    if environments.state(ENVIRONMENT) not in USABLE:
        environments.install_for_command_line(ENVIRONMENT)


def _preview(config: RunConfig, as_json: bool) -> int:
    from app.training.data_config import PreviewParameters, PreviewResult
    from app.training.preview_text import render

    if not config.model.path:
        raise WeftError(ErrorKind.BAD_INPUT, "There is no model to read the tokenizer of.", "Set path under [model].")
    _environment()
    parameters = PreviewParameters(data=config.data_config(), model=model_of(config).path)
    found = run_task(ENVIRONMENT, "preview_data", parameters)
    if as_json:
        print_json(found)
    else:
        print(render(msgspec.convert(found, PreviewResult)))
    return 0


def _export(parameters: TrainParameters, parsed: argparse.Namespace) -> int:
    from app.training.run_export import export, requirements_of

    pins = requirements_of(resources() / "environments" / "core.toml")
    folder = parsed.export.expanduser().absolute()
    steps = export(parameters, folder, pins, parameters.run_file, with_model=parsed.with_model)
    if parsed.json:
        sys.stdout.write(msgspec.json.encode({"folder": str(folder), "next": steps}).decode() + "\n")
    else:
        print(folder)
        print("\n".join(f"next: {each}" for each in steps), file=sys.stderr)
    return 0


def _launch(parameters: TrainParameters, config: Path, told: list[str]) -> dict[str, Any]:
    """Run under `accelerate launch`; its first process speaks in lines on stdout."""
    if not config.is_file():
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no file {config}.", "Make one with `accelerate config --config_file FILE`."
        )
    try:
        text = config.read_text("utf-8")
        check_configuration(text)
    except (OSError, UnicodeDecodeError) as error:
        raise WeftError(ErrorKind.BAD_INPUT, f"{config} cannot be read: {error}.", "Name accelerate's file.") from error
    if parameters.config.train.optimizer.startswith("paged"):
        card = uses_cards(text) and parameters.config.model.device != "cpu" and bool(probe().gpus)
        check_room(parameters.config, parameters.model, card=card, processes=processes_here(text))
    paths = default_paths()
    python = Environments(paths.environments).python(ENVIRONMENT)
    metrics, news, line = _Metrics(), _news(told), ProgressLine()
    paths.logs.mkdir(parents=True, exist_ok=True)
    log = paths.logs / "train-launched.log"
    with tempfile.TemporaryDirectory(prefix="weft-launch-") as place, log.open("w", encoding="utf-8") as errors:
        file = Path(place) / "run.json"
        file.write_bytes(msgspec.json.encode(parameters))
        command = [str(python), "-m", "accelerate.commands.launch", "--config_file", str(config.absolute())]
        command += ["-m", "app.training.run_launched", str(file)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",  # child_environment's
            errors="replace",
            cwd=place,
            env=child_environment(),
        )
        try:
            found = _follow(process, metrics, news, line)
        except BaseException:
            process.terminate()  # the launcher ends its processes
            raise
        finally:
            line.clear()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if "result" in found:
        return found["result"]
    if "error" in found:
        raise WeftError(ErrorKind(found["error"]), _failed_where(found), found["hint"])
    if not found and process.returncode == 0:  # a further machine, where the first process does not run
        return {}
    raise WeftError(
        ErrorKind.CRASHED,
        f"The launched processes ended with status {process.returncode}.",
        f"The log {log} says why; where several machines train together, see what the others say, too.",
    )


def _failed_where(event: dict[str, Any]) -> str:
    """The message of `failed`; of another process than the first with its number and machine."""
    if not event.get("process"):
        return event["message"]
    return f"{event['message']} (Process {event['process']}, on {event['machine']}.)"


def _follow(
    process: subprocess.Popen[str], metrics: _Metrics, news: Callable[[str], str | None], line: ProgressLine
) -> dict[str, Any]:
    """Print what the first process says.

    Returns:
        `done`, or the first `failed` of any process (what the others say after it follows from it), or `started` where
        the first process then fell silent, or {} where it never spoke.
    """
    assert process.stdout is not None
    last: dict[str, Any] = {}
    for text in process.stdout:
        if not text.startswith("{"):
            continue  # a library's own print
        try:
            event = msgspec.json.decode(text)
        except msgspec.DecodeError:
            continue  # a library's, too, or two processes' words in each other
        said: str | None = None
        match event.get("kind"):
            case "progress":
                line.show(Progress(phase=event["phase"], done=event["done"], total=event["total"], unit=event["unit"]))
            case "metric":
                said = metrics(event["step"], event["values"])
            case "news":
                said = news(event["json"])
            case "started":
                last = last or event
                if event["processes"] > 1:
                    said = f"{event['processes']} processes ({event['distribution']})"
            case "log" if event["level"] in ("warning", "error"):
                said = f"{event['level']}: {event['text']}"
            case "done":
                last = event
            case "failed" if "error" not in last or (event["message"], event["process"]) == (last["message"], 0):
                last = event  # what all of them say is said by the first
            case _:
                pass
        if said:
            line.clear()
            print(said, file=sys.stderr)
    return last


class _Metrics:
    """Metrics as lines on stderr: held-out losses, and the training loss about fifty times in a run."""

    def __init__(self) -> None:
        self._last = 0.0
        self._shown = 0

    def __call__(self, step: int, values: dict[str, float]) -> str | None:
        if "held_out_loss" in values:
            return f"step {step}: held-out loss {values['held_out_loss']:.4f}"
        if "loss" not in values:
            return None
        total = step + values.get("seconds_left", 0.0) * step / max(1e-9, self._seconds(step, values))
        if step > 1 and step - self._shown < max(1, total / 50):
            return None
        self._shown = step
        left = int(values.get("seconds_left", 0.0))
        return (
            f"step {step}: loss {values['loss']:.4f}, learning rate {values['learning_rate']:.2e}, gradient {values['grad_norm']:.2f}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        )

    def _seconds(self, step: int, values: dict[str, float]) -> float:
        self._last = max(self._last, values.get("seconds_left", 0.0))
        return self._last or float(step)


def _news(told: list[str]) -> Callable[[str], str | None]:
    def words(json: str) -> str | None:
        news = msgspec.json.decode(json, type=TrainNews)
        if news.kind == "note" and news.text not in told:
            return f"note: {news.text}"
        if news.kind == "estimate":
            return news.text
        if news.kind == "data":
            values = news.values
            return f"{values['examples']:,.0f} examples to train on, {values['held_out']:,.0f} held out, {values['tokens']:,.0f} tokens"
        if news.kind == "samples":
            return "\n".join(f"step {news.step}  {question}\n    → {answer}" for question, answer in news.samples)
        return None

    return words


def _print_result(result: dict[str, Any]) -> None:
    print(result["adapter"])
    losses = result["losses"]
    said = [f"{result['steps']} steps in {result['seconds'] / 60:.1f} minutes"]
    if losses:
        said.append(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    if result["held_out_loss"] is not None:
        before = result["base_held_out_loss"]
        said.append(f"held-out {f'{before:.4f} → ' if before is not None else ''}{result['held_out_loss']:.4f}")
    if result["ended"] != "complete":
        said.append(
            {"stopped": "stopped", "early": "ended early", "nan": "ended at a loss that was no number"}[result["ended"]]
        )
    print(", ".join(said), file=sys.stderr)
