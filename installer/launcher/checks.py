"""`run.py test`: style, types, imports, and pytest in two interpreters: the window's and the engines'.

The window's tests (unit, qt, e2e, benchmarks) run in `.venv`. The engines' (engine, gpu) need torch and llama.cpp and
run in an environment of their own, `tests`, which is made like any engine environment and lies among them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

from installer.launcher import system_libraries, virtual_environment
from installer.launcher.say import Stop, say
from installer.launcher.virtual_environment import ROOT

WINDOW, ENGINES = "window", "engines"
FOLDERS = {WINDOW: ("tests/unit", "tests/qt", "tests/e2e", "tests/benchmarks"), ENGINES: ("tests/engine", "tests/gpu")}
NOTHING_COLLECTED = 5  # pytest's exit status
Result = TypeVar("Result")


class Part(NamedTuple):
    """Tests that run in a process of their own."""

    group: str
    name: str
    python: Path
    paths: list[str]


class Outcome(NamedTuple):
    """How one check went. `ok` None: there was nothing to do."""

    name: str
    ok: bool | None
    words: str
    seconds: float


def main(arguments: list[str]) -> int:
    """Install what is needed, run everything, print what came of it. Returns the exit status."""
    options, rest = _parser().parse_known_args(arguments)
    tier = _tier(options)
    plan = targets(rest, options)
    more = () if system_libraries.has_compiler() or ENGINES not in plan else ("build-essential",)
    fonts = () if system_libraries.has_fonts() else ("fonts-dejavu-core",)
    if sys.platform.startswith("linux") and shutil.which("apt-get"):
        asked = options.yes or bool(os.environ.get("CI"))
        system_libraries.ensure(yes=options.yes, x11=options.display, more=(*more, *fonts) if asked else ())
    python = virtual_environment.ensure("dev")
    environment = _environment(options)
    interpreters = {WINDOW: python}
    if ENGINES in plan or "tests/e2e" in str(plan) or options.bench:
        interpreters[ENGINES] = engine_python(python)
        for name in ("WEFT_PYTHON_CORE", "WEFT_PYTHON_LLAMACPP", "WEFT_PYTHON_EXPORT"):
            environment.setdefault(name, str(interpreters[ENGINES]))
    outcomes: list[Outcome] = []
    if not options.bench and plan.keys() == {WINDOW, ENGINES} and "-k" not in rest:
        outcomes += [_static(name, [str(part) for part in command], environment) for name, command in static_checks(python)]
    arguments = [*tier, *_options(rest)]
    if environment["WEFT_TEST_RUN"] and not any("hypothesis-seed" in argument for argument in rest):
        arguments.append(f"--hypothesis-seed={zlib.crc32(environment['WEFT_TEST_RUN'].encode())}")
    together: list[Part] = []
    for group, paths in plan.items():
        if group == ENGINES and paths == ["tests/engine"]:
            lists = shards(list((ROOT / "tests" / "engine").glob("test_*.py")), max(2, processes() - 1))
            together += [Part(group, f"part {number}", interpreters[group], files) for number, files in enumerate(lists, 1)]
            continue
        # A process for each of the window's folders: should native code (Qt's, a library's) end one of them, the others still run and
        # report. Not because of what widgets leave behind: tests/conftest.py frees that after each test, in Qt's own thread.
        for part in [[path] for path in paths] if group == WINDOW else [paths]:
            if group == WINDOW and len(part) == 1 and part[0] in FOLDERS[WINDOW] and not options.bench:
                together.append(Part(group, part[0], interpreters[group], part))
            else:
                outcomes.append(_pytest(group, interpreters[group], part, arguments, environment))
    outcomes += _side_by_side(together, arguments, environment)
    return _summary(outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py test",
        description="Run Weft's tests. Without arguments: style, types, imports and the default tier.",
        epilog="Anything else goes to pytest: a path (only that runs), -k NAME, -x, …",
    )
    parser.add_argument("--slow", action="store_true", help="the default tier and the tests that take minutes")
    parser.add_argument("--gpu", action="store_true", help="the default tier and the tests that need an NVIDIA graphics card")
    parser.add_argument("--bench", action="store_true", help="the benchmarks alone, which want a quiet machine")
    parser.add_argument("--display", action="store_true", help="show windows on the real display instead of drawing them off screen")
    parser.add_argument("--yes", action="store_true", help="as root: install missing Debian packages without asking")
    return parser


def _tier(options: argparse.Namespace) -> list[str]:
    if options.bench:
        return ["-m", "bench", "-s"]
    left_out = [name for name, on in (("slow", options.slow), ("gpu", options.gpu)) if not on] + ["bench"]
    return ["-m", " and ".join(f"not {name}" for name in left_out)]


def targets(rest: list[str], options: argparse.Namespace) -> dict[str, list[str]]:
    """Which folders or files each interpreter runs: those named, else all of the tier."""
    named = [argument for argument in rest if not argument.startswith("-") and Path(argument.split("::")[0]).exists()]
    if named:
        plan: dict[str, list[str]] = {}
        for argument in named:
            path, *inside = argument.split("::")
            absolute = Path(path).resolve()
            group = ENGINES if any(absolute.is_relative_to(ROOT / folder) for folder in FOLDERS[ENGINES]) else WINDOW
            plan.setdefault(group, []).append("::".join([str(absolute), *inside]))
        return plan
    if options.bench:
        return {WINDOW: ["tests/benchmarks"]}
    wanted = {
        WINDOW: [folder for folder in FOLDERS[WINDOW] if folder != "tests/benchmarks"],
        ENGINES: [folder for folder in FOLDERS[ENGINES] if options.gpu or folder != "tests/gpu"],
    }
    return {group: [folder for folder in folders if (ROOT / folder).is_dir()] for group, folders in wanted.items()}


def _options(rest: list[str]) -> list[str]:
    return [argument for argument in rest if argument.startswith("-") or not Path(argument.split("::")[0]).exists()]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.setdefault("WEFT_TEST_RUN", _tree())  # tests/seeds.py
    if not options.display:
        environment["QT_QPA_PLATFORM"] = "offscreen"
    return environment


def _tree() -> str:
    """What names the state of the code that is committed, "" where git cannot tell."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "--short=12", "HEAD^{tree}"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return ""


def engine_python(python: Path) -> Path:
    """The interpreter of the environment `tests`, installed first where it is not."""
    command = [str(python), "-m", "app.engine.environment_command"]
    command += ["--definitions", str(ROOT / "tests" / "environments")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Overrides name the engines' interpreter for Weft; here it is being made.
    environment.pop("WEFT_PYTHON_TESTS", None)
    status = subprocess.run([*command, "install", "tests"], cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise Stop("The engines' test environment could not be installed; the reason stands above.", status)
    answer = subprocess.run(
        [*command, "python", "tests"], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return Path(answer.stdout.strip())


def static_checks(python: Path) -> list[tuple[str, list[str | Path]]]:
    """Style, types and imports, as commands."""
    tools = python.parent
    suffix = ".exe" if os.name == "nt" else ""
    return [
        ("ruff", [tools / f"ruff{suffix}", "check", "--quiet", "."]),
        ("import contracts", [tools / f"lint-imports{suffix}", "--no-cache"]),
        ("pyright", [tools / f"pyright{suffix}", "--pythonpath", python]),
    ]


def _static(name: str, command: list[str], environment: dict[str, str]) -> Outcome:
    say(name)
    ran, seconds = _timed(lambda: subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True))
    if ran.returncode:
        print(ran.stdout + ran.stderr, flush=True)
        return Outcome(name, False, "see above", seconds)
    return Outcome(name, True, "", seconds)


def shards(files: list[Path], count: int) -> list[list[str]]:
    """Test files in `count` lists that take about as long, by their sizes: the largest first, each to the shortest list."""
    lists: list[list[str]] = [[] for _ in range(max(1, count))]
    sizes = [0] * len(lists)
    for file in sorted(files, key=lambda file: (-file.stat().st_size, file.name)):
        shortest = sizes.index(min(sizes))
        lists[shortest].append(str(file.relative_to(ROOT)))
        sizes[shortest] += file.stat().st_size
    return [sorted(names) for names in lists if names]


def processes() -> int:
    """How many test processes run at once. Each computes on one thread, and waits a third of its time for children and disks."""
    return min(4, (os.cpu_count() or 1) + 1)


def _side_by_side(parts: list[Part], arguments: list[str], environment: dict[str, str]) -> list[Outcome]:
    """Parts that do not mind each other, several at once. What measures time in them counts the processor's, or leaves room."""
    # The longest begins first: whole ways through real engines take longest.
    parts = sorted(parts, key=lambda part: (part.name != "tests/e2e", part.group != ENGINES))
    if parts:
        say(f"{len(parts)} parts, {processes()} at once; each is shown when it has ended")

    def one(part: Part) -> tuple[Outcome, str]:
        with tempfile.TemporaryDirectory(prefix="weft-tests-") as folder:
            report, output = Path(folder) / "report.xml", Path(folder) / "output.txt"
            command = [str(part.python), "-m", "pytest", *part.paths, *arguments, f"--junitxml={report}"]
            command += ["-o", f"cache_dir=.pytest_cache/{part.group}-{part.name.replace('/', '-').replace(' ', '-')}"]
            with output.open("wb") as file:
                work = functools.partial(
                    subprocess.run, command, cwd=ROOT, env=environment, check=False, stdout=file, stderr=subprocess.STDOUT
                )
                ran, seconds = _timed(work)
            outcome = _outcome(f"{part.group}: {part.name}", ran.returncode, _counts(report), seconds)
            return outcome, output.read_text("utf-8", "replace")

    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(processes()) as pool:
        for done in as_completed([pool.submit(one, part) for part in parts]):
            outcome, text = done.result()
            print(text, flush=True)
            outcomes.append(outcome)
    return outcomes


def _pytest(group: str, python: Path, paths: list[str], arguments: list[str], environment: dict[str, str]) -> Outcome:
    name = f"{group}' tests" if group.endswith("s") else f"{group}'s tests"
    if group == WINDOW and len(paths) == 1:
        name += f" ({Path(paths[0].split('::')[0]).name})"
    if not paths:
        return Outcome(name, None, "no such tests", 0.0)
    say(f"{name}, in {python}")
    with tempfile.TemporaryDirectory(prefix="weft-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", *paths, *arguments, f"--junitxml={report}", "-o", f"cache_dir=.pytest_cache/{group}"]
        ran, seconds = _timed(lambda: subprocess.run(command, cwd=ROOT, env=environment, check=False))
        words = _counts(report)
    return _outcome(name, ran.returncode, words, seconds)


def _outcome(name: str, status: int, words: str, seconds: float) -> Outcome:
    if status == NOTHING_COLLECTED:
        return Outcome(name, None, "none selected", seconds)
    if status < 0 or not words:
        words = f"pytest ended with status {status}"
    return Outcome(name, status == 0, words, seconds)


def _counts(report: Path) -> str:
    """`120 passed, 3 skipped`, from pytest's report; "" when there is none."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return ""
    total, bad, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
    counts = [(total - bad - errors - skipped, "passed"), (bad, "failed"), (errors, "errors"), (skipped, "skipped")]
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "none"


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started


def _summary(outcomes: list[Outcome]) -> int:
    width = max(len(outcome.name) for outcome in outcomes)
    print("\n" + "=" * 60)
    for outcome in outcomes:
        mark = {True: "ok", False: "FAILED", None: "-"}[outcome.ok]
        print(f"{mark:7} {outcome.name:{width}}  {outcome.seconds:6.1f} s  {outcome.words}")
    failed = [outcome for outcome in outcomes if outcome.ok is False]
    ran = [outcome for outcome in outcomes if outcome.ok]
    if failed:
        print(f"\nFAILED: {', '.join(outcome.name for outcome in failed)}", flush=True)
        return 1
    if not any("tests" in outcome.name or ENGINES in outcome.name for outcome in ran):
        print("\nNo test was selected.", flush=True)
        return NOTHING_COLLECTED
    print("\nAll is well.", flush=True)
    return 0
