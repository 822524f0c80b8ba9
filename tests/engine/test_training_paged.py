"""Paged optimizers without a graphics card: the state lies in a file, leaves memory and comes back, and changes no bit."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.training import paged_torch, run_torch
from app.training.optimizers_torch import make_optimizer
from app.training.paged_torch import StateFile, load_state
from app.training.train_config import TrainConfig
from tests import seeds
from tests.engine import fork_kit, tiny_models, training_kit
from tests.engine.training_kit import Remembering, config, in_plain_peft, train

SEED = seeds.of(__name__, 10**6)
PLAIN = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}
MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has")


class Net(torch.nn.Module):
    """Parameters of odd sizes, one of which never gets a gradient."""

    def __init__(self, *sizes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        made = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
        self.kept = torch.nn.ParameterList(made)
        self.idle = torch.nn.Parameter(torch.ones(5))

    def train_on(self, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(SEED + step)
            for parameter in self.kept:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()


def some_sizes() -> list[tuple[int, ...]]:
    rng = random.Random(SEED)
    return [(rng.randint(1, 40), rng.randint(1, 300)) for _ in range(5)] + [(64, 257), (7,)]


def make(optimizer: str, net: Net, place: Path) -> torch.optim.Optimizer:
    settings = TrainConfig(optimizer=optimizer, learning_rate=3e-3, weight_decay=0.02)  # type: ignore[arg-type]
    return make_optimizer(settings, net, [place])


def same_parameters(one: Net, other: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def saved(optimizer: torch.optim.Optimizer) -> bytes:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    names = ("exp_avg", "exp_avg_sq", "state1", "state2")
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


@pytest.mark.parametrize("paged", PLAIN)
def test_bits_and_checkpoints_are_those_of_the_plain_optimizer(paged: str, tmp_path: Path) -> None:
    sizes = some_sizes()
    print(f"seed {SEED}, {sizes}")
    plain, other, resumed = Net(*sizes), Net(*sizes), Net(*sizes)
    first, second, third = (
        make(PLAIN[paged], plain, tmp_path),
        make(paged, other, tmp_path),
        make(paged, resumed, tmp_path),
    )
    plain.train_on(first, 0, 5)
    other.train_on(second, 0, 5)
    assert same_parameters(plain, other) and saved(first) == saved(second)
    resumed.load_state_dict(other.state_dict())
    load_state(third, torch.load(io.BytesIO(saved(second)), weights_only=True))
    for net, optimizer in ((plain, first), (other, second), (resumed, third)):
        net.train_on(optimizer, 5, 9)
    assert same_parameters(plain, other) and same_parameters(plain, resumed)
    for one, two, three in zip(moments(first), moments(second), moments(third), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@linux
@pytest.mark.parametrize("paged", PLAIN)
@pytest.mark.parametrize("came_from", ["itself", "plain"])
def test_a_state_that_is_loaded_lies_in_the_file(paged: str, came_from: str, tmp_path: Path) -> None:
    """Before the next step and after it: a copy in memory would train to the same bits, and fill the memory."""
    sizes, places = some_sizes(), (tmp_path / "one", tmp_path / "two")
    for place in places:
        place.mkdir()
    net, resumed = Net(*sizes), Net(*sizes)
    first = make(paged if came_from == "itself" else PLAIN[paged], net, places[0])
    net.train_on(first, 0, 2)
    second = make(paged, resumed, places[1])
    load_state(second, torch.load(io.BytesIO(saved(first)), weights_only=True))
    for _ in range(2):
        state = moments(second)
        assert len(state) == 2 * len(sizes) and lie_in_a_nameless_file(state, places[1])
        resumed.train_on(second, 2, 3)


def mapping_of(pointer: int) -> str:
    """What the mapping that holds an address maps: a file's path, or something in brackets, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        head = line.split()
        start, end = (int(part, 16) for part in head[0].split("-"))
        if start <= pointer < end:
            return " ".join(head[5:])
    raise AssertionError("the address lies in no mapping")


def in_memory(tensors: list[torch.Tensor]) -> float:
    """The share of their pages that is in memory, for whichever process."""
    page, found, every = mmap.PAGESIZE, 0, 0
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    for tensor in tensors:
        start = tensor.data_ptr() // page * page
        end = -(-(tensor.data_ptr() + tensor.nbytes) // page) * page
        pages = ctypes.create_string_buffer((end - start) // page)
        assert mincore(start, end - start, pages) == 0, os.strerror(ctypes.get_errno())
        found += sum(value & 1 for value in pages.raw)
        every += len(pages)
    return found / every


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[StateFile]:
    """The state files that optimizers make."""
    made: list[StateFile] = []

    class Remembered(StateFile):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(paged_torch, "StateFile", Remembered)
    return made


def lie_in_a_nameless_file(tensors: list[torch.Tensor], place: Path) -> bool:
    where = {mapping_of(tensor.data_ptr()) for tensor in tensors}
    print(where)
    return bool(where) and all(name.startswith(str(place)) and name.endswith("(deleted)") for name in where)


@linux
@pytest.mark.parametrize("paged", PLAIN)
def test_the_state_lies_in_a_nameless_file_and_leaves_memory_with_its_pages(
    paged: str, tmp_path: Path, files: list[StateFile]
) -> None:
    sizes = [(512, 1024)] * 4
    plain, net = Net(*sizes), Net(*sizes)
    first, second = make(PLAIN[paged], plain, tmp_path), make(paged, net, tmp_path)
    plain.train_on(first, 0, 2)
    net.train_on(second, 0, 1)
    state = moments(second)
    assert len(state) == 8 and files[0].place == tmp_path
    assert lie_in_a_nameless_file(state, tmp_path)
    assert not any(mapping_of(tensor.data_ptr()).startswith(str(tmp_path)) for tensor in moments(first))
    assert not list(tmp_path.iterdir())  # nothing that a kill could leave behind
    assert in_memory(state) > 0.9
    if paged_torch.in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is kept in memory itself, which its pages leave for the swap space only")
    try:
        files[0].write_out()
    except OSError as error:
        pytest.skip(f"this system's pages cannot be sent away by hand: {error}")
    assert in_memory(state) < 0.25
    net.train_on(second, 1, 2)  # they come back
    assert same_parameters(plain, net)


@linux
def test_where_memory_is_too_short_for_the_state_the_paged_one_trains(tmp_path: Path) -> None:
    """The system refuses further private memory: the plain optimizer's state finds none.

    With 8 bits bitsandbytes' threads and their stacks take as much as the state; that it lies in the file is shown above.
    """
    net = Net(*[(512, 512)] * 64)
    state = 64 * 2 * 512 * 512 * 4

    def steps(optimizer: str, limited: bool) -> Callable[[], None]:
        def work() -> None:
            torch.set_num_threads(1)
            made = make(optimizer, net, tmp_path)
            for parameter in net.kept:
                parameter.grad = torch.ones_like(parameter)
            if limited:
                fork_kit.allow_only(state // 2)
            made.step()
            made.step()

        return work

    fork_kit.in_a_fork(steps("adamw", False))
    with pytest.raises(fork_kit.Failed, match="allocate memory"):
        fork_kit.in_a_fork(steps("adamw", True))
    fork_kit.in_a_fork(steps("paged_adamw", True))


@linux
def test_work_in_a_fork_that_hangs_is_killed() -> None:
    assert fork_kit.in_a_fork(os.getpid) != os.getpid()
    reading, writing = os.pipe()
    try:
        with pytest.raises(fork_kit.Failed, match="had not ended after"):
            fork_kit.in_a_fork(lambda: os.read(reading, 1), deadline=0.2)
    finally:
        os.close(reading)
        os.close(writing)


# Places ----------------------------------------------------------------------------------------------


def test_a_place_with_room_on_a_disk_is_taken_and_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, memory, disk = tmp_path / "small", tmp_path / "memory", tmp_path / "disk"
    for place in (small, memory, disk):
        place.mkdir()
    free = {small: 65 * MIB, memory: 10**12, disk: 10**12}
    monkeypatch.setattr(paged_torch.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    monkeypatch.setattr(paged_torch, "in_memory", lambda place: place == memory)
    need = 2 * MIB
    chosen = StateFile(need, [small, memory, tmp_path / "not there", disk])
    assert chosen.place == disk and str(disk) in chosen.note() and not chosen.in_memory
    last = StateFile(need, [small, memory])
    assert last.place == memory and "kept in memory itself" in last.note()
    with pytest.raises(WeftError, match="no room") as caught:
        StateFile(need, [small])
    assert caught.value.kind is ErrorKind.DISK_FULL and "adamw_8bit" in caught.value.hint


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paged_torch, "_reserve", full)
    with pytest.raises(WeftError, match="No space left on device") as caught:
        StateFile(MIB, [tmp_path])
    assert caught.value.kind is ErrorKind.DISK_FULL


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_a_place_that_refuses_is_passed_over_and_told_in_the_system_s_words(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    good.mkdir()
    original = tempfile.TemporaryFile

    def made(*given: Any, dir: Path, **rest: Any) -> Any:
        if dir == bad:
            raise OSError(number, os.strerror(number))
        return original(*given, dir=dir, **rest)

    monkeypatch.setattr(paged_torch.tempfile, "TemporaryFile", made)
    assert StateFile(MIB, [bad, good]).place == good
    with pytest.raises(WeftError) as caught:
        StateFile(MIB, [tmp_path / "not there", bad])
    assert f"{bad}: {os.strerror(number)}" in str(caught.value) and "not there: No such file" in str(caught.value)
    full = number == errno.ENOSPC
    assert caught.value.kind is (ErrorKind.DISK_FULL if full else ErrorKind.PERMISSION)
    assert ("no room" in str(caught.value)) == full


@pytest.mark.parametrize("preallocates", [True, False])
def test_the_room_is_taken_at_once(preallocates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that finds no room later would end the process: no holes."""
    if not preallocates:
        monkeypatch.delattr(paged_torch.os, "posix_fallocate", raising=False)  # as on macOS and Windows
    with (tmp_path / "file").open("w+b") as file:
        paged_torch._reserve(file, 9 * MIB + 5)
        found = os.fstat(file.fileno())
    assert found.st_size == 9 * MIB + 5 and found.st_blocks * 512 >= found.st_size


@linux
def test_file_systems_in_memory_are_known(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.path.ismount(shared):
        pytest.skip("/dev/shm is no file system of its own here")
    assert paged_torch.in_memory(shared)
    assert not paged_torch.in_memory(Path("/proc"))


# With a card and back --------------------------------------------------------------------------------


@pytest.fixture
def card_state() -> Any:
    """bitsandbytes' own paged optimizers, which keep their state in plain memory where there is no card, and say so."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield bitsandbytes.optim


def test_a_state_made_on_a_card_goes_on_here_and_back(tmp_path: Path, card_state: Any) -> None:
    sizes = some_sizes()
    arguments = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02}
    there, here, back = Net(*sizes), Net(*sizes), Net(*sizes)
    first = card_state.PagedAdamW32bit(there.parameters(), **arguments)
    there.train_on(first, 0, 4)
    here.load_state_dict(there.state_dict())
    second = make("paged_adamw", here, tmp_path)
    load_state(second, torch.load(io.BytesIO(saved(first)), weights_only=True))
    there.train_on(first, 4, 7)
    here.train_on(second, 4, 7)
    back.load_state_dict(here.state_dict())
    third = card_state.PagedAdamW32bit(back.parameters(), **arguments)
    load_state(third, torch.load(io.BytesIO(saved(second)), weights_only=True))
    for net, optimizer in ((there, first), (here, second), (back, third)):
        net.train_on(optimizer, 7, 9)
    for one, two, three in zip(there.parameters(), here.parameters(), back.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6) and torch.allclose(one, three, atol=1e-6)


@pytest.mark.parametrize("kind", ["PagedAdamW32bit", "PagedAdamW8bit"])
def test_a_state_that_is_loaded_on_a_card_is_paged_again(
    kind: str, card_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes itself would load it into the card's own memory."""
    whole, resumed = Net((80, 100), (3, 4)), Net((80, 100), (3, 4))
    make_one = getattr(card_state, kind)
    first, second = make_one(whole.parameters(), lr=3e-3), make_one(resumed.parameters(), lr=3e-3)
    whole.train_on(first, 0, 3)
    resumed.load_state_dict(whole.state_dict())
    pages: list[torch.Tensor] = []
    original = second.get_state_buffer
    monkeypatch.setattr(second, "get_state_buffer", lambda *given: pages.append(original(*given)) or pages[-1])
    load_state(second, torch.load(io.BytesIO(saved(first)), weights_only=True))
    assert [id(tensor) for tensor in moments(second)] == [id(tensor) for tensor in pages] and len(pages) == 4
    for net, optimizer in ((whole, first), (resumed, second)):
        net.train_on(optimizer, 3, 5)
    assert same_parameters(whole, resumed)


# Runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card here: tests/gpu trains with them")
@pytest.mark.parametrize("paged", ["paged_adamw", pytest.param("paged_adamw_8bit", marks=pytest.mark.slow)])
def test_a_run_learns_what_the_plain_one_learns_and_goes_on_after_cancel(
    paged: str, model: ModelEntry, data: Path, tmp_path: Path, files: list[StateFile]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    method = {"r": 64} if paged.endswith("8bit") else {}  # smaller tensors keep a state of 32 bits

    def settings(name: str, optimizer: str) -> Any:
        chosen = {"optimizer": optimizer, "checkpoint_every": 3, "max_steps": 16}
        return config(tmp_path / name, model, data, method=method, train=chosen)

    plain = train(settings("plain", PLAIN[paged]), model)
    report = Remembering()
    result = train(settings("paged", paged), model, report)
    broken = Remembering()
    broken.at_step = lambda now: broken.cancel() if now == 8 else None
    with pytest.raises(WeftError) as caught:
        train(settings("broken", paged), model, broken)
    assert caught.value.kind is ErrorKind.CANCELLED
    resumed = train(settings("broken", paged), model, resume="yes")
    torch.set_num_threads(before)

    assert result.base_held_out_loss is not None and result.held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    in_plain_peft(Path(model.path), Path(result.adapter))
    weights = [(Path(each.adapter) / "adapter_model.safetensors").read_bytes() for each in (plain, result, resumed)]
    assert plain.losses == result.losses == resumed.losses and weights[0] == weights[1] == weights[2]
    told = [news["text"] for news in report.heard if news["kind"] == "note"]
    assert any("keeps its state in a file" in text for text in told)
    assert any(f"lies in a file in {files[0].place}" in text for text in told)
    assert not any("in a file" in text for text in result.notes)  # it is this machine's business, not the adapter's
    estimates = [news["values"] for news in report.heard if news["kind"] == "estimate"]
    assert 0 < estimates[0]["file"] <= files[0].size and estimates[0]["optimizer"] < estimates[0]["file"] / 20


@pytest.mark.parametrize("first", [True, False])
def test_beside_the_run_is_the_second_choice_of_each_process(first: bool, tmp_path: Path) -> None:
    place = tmp_path / "away" / "a.training"
    settings = SimpleNamespace(output=SimpleNamespace(dir=str(tmp_path / "away" / "a")))
    run = SimpleNamespace(config=settings, folder=SimpleNamespace(path=place) if first else None)

    def places() -> list[Path]:
        return run_torch.Run._places(run)  # type: ignore[arg-type]

    assert places() == [Path(tempfile.gettempdir()), tmp_path]  # a further machine, where nothing is made
    assert not (tmp_path / "away").exists()
    place.mkdir(parents=True)
    assert places() == [Path(tempfile.gettempdir()), place]


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    one, two = StateFile(MIB, [tmp_path]), StateFile(MIB, [tmp_path])
    owner = torch.zeros(9)
    one.tensor(owner, "exp_avg", torch.float32).fill_(1)
    assert not two.tensor(owner, "exp_avg", torch.float32).any()
