"""What a pickled checkpoint would run is found before torch is imported."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import ErrorKind, WeftError
from app.core.pickle_scan import check

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    def __init__(self, call: object = os.system, argument: str = "echo owned") -> None:
        self.parts = (call, (argument,))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return self.parts  # type: ignore[return-value]


def torch_like(extra: bytes = b"") -> bytes:
    """The opcodes of a state dict as torch writes it."""
    return (
        b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x08\x00\x00\x00x.weightq\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"q\x03((X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07"
        b"K\x04tq\x08QK\x00K\x02K\x02\x86q\tK\x02K\x01\x86q\n\x89"
        + extra
        + b"ccollections\nOrderedDict\nq\x0b)Rq\x0ctq\rRq\x0eu."
    )


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


LEGACY_START = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
)


def test_plain_tensors_pass(tmp_path: Path) -> None:
    check(zipped(tmp_path / "a.bin", {"archive/data.pkl": torch_like(), "archive/data/0": b"\0" * 16}))
    legacy = tmp_path / "b.bin"
    legacy.write_bytes(LEGACY_START + torch_like() + pickle.dumps(["0"], 2) + b"\0" * 16)
    check(legacy)


@pytest.mark.attack
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [os.system, eval, subprocess.Popen, collections.namedtuple, getattr])
def test_any_other_global_is_refused_and_named(tmp_path: Path, protocol: int, call: object) -> None:
    data = pickle.dumps({"x": Evil(call)}, protocol)
    for path in (zipped(tmp_path / "z.bin", {"archive/data.pkl": data}), tmp_path / "raw.bin", tmp_path / "legacy.pt"):
        if path.name == "raw.bin":
            path.write_bytes(data)
        if path.name == "legacy.pt":
            path.write_bytes(LEGACY_START + data + pickle.dumps([], 2))
        with pytest.raises(WeftError) as caught:
            check(path)
        assert caught.value.kind in (ErrorKind.HOSTILE, ErrorKind.CORRUPT) and caught.value.hint
        if 2 <= protocol < 4 and not (path.name != "raw.bin" and protocol > 2):
            assert caught.value.kind is ErrorKind.HOSTILE


@pytest.mark.attack
@pytest.mark.parametrize(
    ("where", "words"),
    [
        (b"cos\nsystem\n", "'os.system'"),
        (b"cbuiltins\neval\n", "builtins.eval"),
        (b"ctorch\nload\n", "torch.load"),
        (b"ctorch.serialization\nload\n", "torch.serialization.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "STACK_GLOBAL"),
        (b"(S'x'\nios\nsystem\n", "STRING|INST"),
        (b"\x82\x01", "EXT1"),
        (b"\x92", "NEWOBJ_EX"),
    ],
)
def test_hostile_instructions_inside_a_good_pickle(tmp_path: Path, where: bytes, words: str) -> None:
    with pytest.raises(WeftError, match=words) as caught:
        check(zipped(tmp_path / "a.bin", {"archive/data.pkl": torch_like(where)}))
    assert caught.value.kind is ErrorKind.HOSTILE and "safetensors" in caught.value.hint


@pytest.mark.attack
def test_every_pickle_of_an_archive_is_looked_at(tmp_path: Path) -> None:
    bad = pickle.dumps(Evil(), 2)
    for members in (
        {"archive/data.pkl": torch_like(), "other/data.pkl": bad},
        {"archive/data.pkl": torch_like(), "archive/extra.pkl": bad},
    ):
        with pytest.raises(WeftError) as caught:
            check(zipped(tmp_path / "a.bin", members))
        assert caught.value.kind is ErrorKind.HOSTILE


@pytest.mark.attack
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", torch_like())
        archive.writestr("a/data.pkl", torch_like())
    with pytest.raises(WeftError, match="twice"):
        check(path)
    with pytest.raises(WeftError, match="TorchScript") as caught:
        check(zipped(tmp_path / "script.pt", {"a/data.pkl": torch_like(), "a/code/x.py": b"", "a/constants.pkl": b""}))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    with pytest.raises(WeftError, match=r"no data\.pkl"):
        check(zipped(tmp_path / "none.bin", {"a/x": b""}))


@pytest.mark.attack
def test_bombs_end_soon_and_small(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.bin", {"a/data.pkl": b"(" * (400 * 2**20)}, zipfile.ZIP_DEFLATED)
    long = tmp_path / "long.bin"
    long.write_bytes(b"\x80\x02" + b"N" * (31 * 2**20))
    many = tmp_path / "many.bin"
    directory = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65_535, 65_535, 60 * 2**20, 0, 0)
    many.write_bytes(b"PK\3\4" + b"\0" * 1000 + directory)
    lengths = tmp_path / "lengths.bin"
    lengths.write_bytes(b"\x80\x02X\xff\xff\xff\xff" + b"a" * 100)
    code = (
        "import resource, sys, time; from pathlib import Path\n"
        "from app.core.errors import WeftError; from app.core.pickle_scan import check\n"
        "mapped = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + 256 * 2**20,) * 2)\n"
        "for name in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try: check(Path(name)); print('accepted')\n"
        "    except WeftError as error: print(error.kind, time.process_time() - start)\n"
    )
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS and /proc are Linux's")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (bomb, long, many, lengths))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, _ in lines] == ["hostile", "hostile", "hostile", "corrupt"]
    assert all(float(seconds) < 2 for _, seconds in lines)


@pytest.mark.fault
def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.bin", {"archive/data.pkl": torch_like(), "archive/data/0": b"\0" * 64}).read_bytes()
    for cut in range(0, len(whole) - 1, 9):
        (tmp_path / "b.bin").write_bytes(whole[:cut])
        with pytest.raises(WeftError):
            check(tmp_path / "b.bin")


@pytest.mark.attack
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6))
def test_any_bytes_end_in_words(tmp_path: Path, data: bytes, changes: list[tuple[int, int]]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", torch_like())
    damaged = bytearray(buffer.getvalue())
    for at, value in changes:
        damaged[at % len(damaged)] = value
    for content in (data, b"\x80\x02" + data, bytes(damaged)):
        (tmp_path / "x.bin").write_bytes(content)
        try:
            check(tmp_path / "x.bin")
        except WeftError:
            continue


@pytest.mark.attack
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_accepted_pickle_names_a_foreign_global(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the scan accepts, Python's own disassembler finds only allowed globals in."""
    import pickletools

    from app.core.pickle_scan import ALLOWED

    good = bytearray(torch_like())
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.bin").write_bytes(bytes(good))
    try:
        check(tmp_path / "x.bin")
    except WeftError:
        return
    try:
        for opcode, argument, _ in pickletools.genops(bytes(good)):
            assert opcode.name not in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX")
            if opcode.name == "GLOBAL":
                assert str(argument).replace(" ", ".", 1) in ALLOWED
    except ValueError:
        return  # the disassembler gives up at bytes that are no UTF-8; what came before was looked at


def test_a_large_checkpoint_is_scanned_fast(tmp_path: Path) -> None:
    one = b"X\x08\x00\x00\x00x.weightctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x000K\x02\x86\x89tR"
    data = b"\x80\x02}(" + one * 20_000 + b"u."
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": data})
    start = time.process_time()
    check(path)
    print(f"20,000 tensors: {time.process_time() - start:.2f} s")
    assert time.process_time() - start < 2
