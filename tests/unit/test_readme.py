"""The README names every command there is, and its examples are commands that are understood."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from app import cli
from app.backends import specs
from app.backends.base import Capability

README = Path(__file__).resolve().parents[2] / "README.md"
OF_THE_LAUNCHER = {"test", "environments"}  # run.py's own; see installer/launcher/start.py


def examples() -> list[list[str]]:
    """Arguments of each `python3 run.py …` line of the README's blocks, without the sentence behind it."""
    lines = re.findall(r"^ *python3 run\.py (.+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(re.split(r" {4,}", line)[0]) for line in lines]


def commands() -> set[str]:
    parser = cli._parser()
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return set(choices)


def test_the_readme_shows_every_command_and_no_other() -> None:
    shown = {arguments[0] for arguments in examples() if not arguments[0].startswith("-")} - OF_THE_LAUNCHER
    assert shown == commands()


@pytest.mark.parametrize(
    "arguments", [a for a in examples() if a[0] not in OF_THE_LAUNCHER and a[0][0] != "-"], ids=" ".join
)
def test_an_example_of_the_readme_parses(arguments: list[str]) -> None:
    assert callable(cli._parser().parse_args(arguments).run)


def capability_table() -> str:
    """The README's table of loaders, as their files claim it."""
    header = ["loader", "loads", *(capability.value for capability in Capability)]
    rows = [
        [spec.title, ", ".join(sorted(f.value for f in spec.formats))]
        + ["✅" if capability in spec.capabilities else "–" for capability in Capability]
        for spec in specs().values()
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def test_the_table_of_loaders_says_what_they_claim() -> None:
    expected = capability_table()
    assert expected in README.read_text(encoding="utf-8"), f"the README's table should be:\n{expected}"
