"""The window's speed, as ratios against a bare PySide6 program in the same run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.core.paths import default_paths
from app.core.roots import Root
from app.store.database import Database
from app.store.library import LibraryStore
from app.store.refresh import library_roots, refresh
from app.store.settings import SettingsStore
from tests.fakes.library_files import make_library

pytestmark = pytest.mark.bench

RUNS = 9
ROWS = 10_000
SECONDS = 20.0
RATE = 200.0
TICK_MS = 5.0


def probe(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.window_probe", *arguments],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> object:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return json.loads(out)


def first_paint(mode: str) -> dict[str, float]:
    seconds = finish(probe(mode, repr(time.time())))
    assert isinstance(seconds, dict)
    return seconds


def test_first_paint_takes_at_most_a_third_longer_than_a_bare_window(home: Path) -> None:
    first_paint("paint-weft")  # writes bytecode, makes the database: neither belongs to a start
    bare, weft = [], []
    for _ in range(RUNS):
        bare.append(first_paint("paint-bare"))
        weft.append(first_paint("paint-weft"))
    ours, reference = (statistics.median(run["window"] for run in runs) for runs in (weft, bare))
    page = statistics.median(run["page"] for run in weft)
    print(f"\nfirst paint: ours {ours * 1000:.0f} ms, bare {reference * 1000:.0f} ms, ratio {ours / reference:.2f} (at most 1.3)")
    print(f"its first page: {page * 1000:.0f} ms, ratio {page / reference:.2f}")
    assert ours <= 1.3 * reference


def test_the_event_loop_stays_free_while_an_answer_streams(home: Path, tmp_path: Path) -> None:
    make_library(tmp_path / "library", ROWS * 8 // 5)  # a third of the entries are adapters
    index(tmp_path / "library")
    streaming = probe("loop-weft", str(SECONDS), str(RATE))
    bare = probe("loop-bare", str(SECONDS + 5))  # beside it, so that both see the same machine
    ours, reference = finish(streaming), finish(bare)
    assert isinstance(ours, dict) and isinstance(reference, list)
    assert ours["rows"] >= ROWS
    assert ours["characters"] > RATE * SECONDS, "the answer did not stream"
    rows = [(name, percentile(gaps, 50), percentile(gaps, 99.9), max(gaps)) for name, gaps in (("ours", ours["gaps"]), ("bare", reference))]
    for name, middle, high, worst in rows:
        print(f"\n{name}: gap between ticks of {TICK_MS:g} ms: median {middle:.1f}, p99.9 {high:.1f}, longest {worst:.1f} ms", end="")
    ratio = rows[0][2] / rows[1][2]
    print(f"\nratio at p99.9 {ratio:.2f} (at most 2); longest {rows[0][3]:.1f} ms (at most 100)")
    assert ratio <= 2
    assert rows[0][3] <= 100


@pytest.mark.skipif(not os.environ.get("WEFT_PYTHON_CORE"), reason="WEFT_PYTHON_CORE names no interpreter with PyTorch")
def test_the_event_loop_stays_free_while_a_model_is_trained(home: Path) -> None:
    """p99.9 of the gaps is at most 16 ms; where the machine itself does worse, at most twice what a bare window gets beside it."""
    training = probe("loop-train", str(SECONDS))
    bare = probe("loop-bare", str(SECONDS + 15))
    ours, reference = finish(training), finish(bare)
    assert isinstance(ours, dict) and isinstance(reference, list)
    assert ours["steps"] > 20, "nothing was trained meanwhile"
    high, theirs = percentile(ours["gaps"], 99.9), percentile(reference, 99.9)
    print(f"\ngap between ticks of {TICK_MS:g} ms, p99.9: ours {high:.1f} ms, bare {theirs:.1f} ms, longest {max(ours['gaps']):.1f} ms; {ours['steps']} steps")
    assert high <= max(16.0, 2 * theirs)


def index(folder: Path) -> None:
    """Let the library know a folder, as if Weft had been open with it before."""
    paths = default_paths()
    settings = SettingsStore(paths.settings)
    settings.update(roots=(str(folder),))
    database = Database(paths.database)
    refresh(LibraryStore(database), [*library_roots(settings.settings, paths), Root(path=str(folder))])
    database.close()


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(len(ordered) * percent / 100))]
