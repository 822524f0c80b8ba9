"""A run as a folder for a rented machine: config, data, the code that trains, and the line that starts it. No ML.

Nothing of it needs this machine: paths in it are relative, and the training code is Weft's own, as plain files.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import msgspec

import app
from app.core.errors import ErrorKind, WeftError
from app.training.run_config import RunConfig, TrainParameters

ROOMS = ("core", "engine", "adapters", "generation", "training")
LARGEST_MODEL = 2 * 2**30  # bytes; larger ones are fetched there instead of carried

ACCELERATE = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
mixed_precision: 'no'
"""
# For a model that is larger than a card.
SHARED_OUT = (
    ACCELERATE.replace("MULTI_GPU", "FSDP")
    + """fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
"""
)
START = """#!/bin/sh
# Set num_processes in accelerate.yaml to the number of graphics cards; for one card or none: python -m app.training.run_launched run.json
# Where the model is larger than a card, its tensors are shared out over all of them: take --config_file accelerate-fsdp.yaml
cd "$(dirname "$0")" && exec accelerate launch --config_file accelerate.yaml -m app.training.run_launched run.json
"""


def requirements_of(definition: Path) -> str:
    """requirements.txt of an environment's definition: the pins that runs are tested with."""
    layers = tomllib.loads(definition.read_text("utf-8"))["layers"]
    return "".join(f"{pin}\n" for layer in layers for pin in layer["requirements"])


def export(
    parameters: TrainParameters, folder: Path, requirements: str, run_file: str, *, with_model: bool = False
) -> list[str]:
    """Write the folder, staged beside it and renamed.

    Args:
        requirements: requirements.txt, the pins that the run was tested with. run_file: RUN.toml as text, for people.
        with_model: copy the base too, however large.

    Returns:
        What is left to do, in sentences.

    Raises:
        WeftError: BAD_INPUT when the folder is there; NOT_FOUND for data that is not.
    """
    if folder.exists():
        raise WeftError(ErrorKind.BAD_INPUT, f"{folder} is there already.", "Choose another folder.")
    staged = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        steps = _fill(parameters, staged, requirements, run_file, with_model)
        staged.rename(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return steps


def _fill(parameters: TrainParameters, staged: Path, requirements: str, run_file: str, with_model: bool) -> list[str]:
    config, model = parameters.config, parameters.model
    config = _carry_data(config, staged)
    steps: list[str] = []
    source = Path(model.path)
    if with_model or model.bytes <= LARGEST_MODEL:
        target = staged / "model" / source.name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=False, ignore=shutil.ignore_patterns(".*"))
        else:
            target.parent.mkdir()
            shutil.copyfile(source, target)
    else:
        (staged / "model").mkdir()
        steps.append(f"Put the model {model.name} into model/{source.name}; it was too large to carry along.")
    place = f"model/{source.name}"
    replace = msgspec.structs.replace
    model = replace(
        model,
        path=place,
        id=place,
        root="",
        files=tuple(f"{place}/{Path(f).name}" if source.is_dir() else place for f in model.files),
    )
    config = replace(config, model=replace(config.model, path=place), output=replace(config.output, dir="adapter"))
    carried = TrainParameters(config=config, model=model, resume="if_there", run_file=run_file)
    (staged / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(carried), indent=1))
    (staged / "run.toml").write_text(run_file, "utf-8")
    (staged / "requirements.txt").write_text(requirements, "utf-8")
    (staged / "accelerate.yaml").write_text(ACCELERATE, "utf-8")
    (staged / "accelerate-fsdp.yaml").write_text(SHARED_OUT, "utf-8")
    start = staged / "start.sh"
    start.write_text(START, "utf-8")
    start.chmod(0o755)
    _carry_code(staged / "app")
    steps += [
        "python -m pip install -r requirements.txt",
        "./start.sh",
        "Bring the folder adapter/ back and add it on the LoRAs page.",
    ]
    lines = [
        f"# A training run of Weft on {model.name}",
        "",
        "On the machine that is to train:",
        "",
        *(f"1. {each}" for each in steps),
    ]
    lines += ["", "A run that was interrupted goes on with the same line."]
    (staged / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
    return steps


def _carry_data(config: RunConfig, staged: Path) -> RunConfig:
    count = 0

    def carry(text: str) -> str:
        nonlocal count
        source = Path(text)
        if not source.exists():
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no data at {source}.", "Correct the run's files.")
        count += 1
        target = staged / "data" / f"{count:02d}-{source.name}"
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        return f"data/{target.name}"

    replace = msgspec.structs.replace
    data = replace(
        config.data,
        files=tuple(map(carry, config.data.files)),
        held_out_files=tuple(map(carry, config.data.held_out_files)),
    )
    method = config.method
    if method.calibration:
        method = replace(method, calibration=carry(method.calibration))
    return replace(config, data=data, method=method)


def _carry_code(target: Path) -> None:
    home = Path(app.__file__).parent
    target.mkdir()
    shutil.copyfile(home / "__init__.py", target / "__init__.py")
    for room in ROOMS:
        shutil.copytree(home / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
