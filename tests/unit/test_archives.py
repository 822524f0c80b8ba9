"""Archives: what is good is unpacked byte by byte; every attack is refused in time and memory, with nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.core.archive_guard import Limits
from app.core.archives import archive_stem, is_archive, unpack
from app.core.errors import ErrorKind, WeftError


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as out:
        warnings.simplefilter("ignore")  # of names that stand in it twice
        for name, data in members:
            out.writestr(name, data)
    return path


def tarred(
    path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w", form: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, mode, format=form) as out:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def random_files(seed: int) -> dict[str, bytes]:
    numbers = random.Random(seed)
    sizes = [0, 1, 511, 512, 513, 100_000, 3_000_001]
    noise = [numbers.randbytes(size) for size in sizes]
    names = ["a.txt", "deep/er/b.bin", "ünïcode 模型.json", "deep/c", "d" * 120, "e/" + "f" * 150 + "/g.txt", "h.zip"]
    return dict(zip(names, noise, strict=True)) | {"text.txt": b"the same words again " * 20_000}


@pytest.mark.parametrize("kind", ["stored", "deflate", "bzip2", "tar", "gz", "bz2", "xz", "gnu"])
def test_what_is_good_comes_out_as_it_went_in(tmp_path: Path, kind: str, seed: int) -> None:
    files = random_files(seed)
    if kind in ("stored", "deflate", "bzip2"):
        methods = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}
        path = zipped(tmp_path / "x.zip", [("deep/", b""), *files.items()], methods[kind])
    else:
        folder = tarfile.TarInfo("./deep")
        folder.type = tarfile.DIRTYPE
        members = [(folder, b""), *((tarfile.TarInfo(f"./{n}"), d) for n, d in files.items())]
        mode = "w" if kind in ("tar", "gnu") else f"w:{kind}"
        form = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
        path = tarred(tmp_path / ("x.tar" + ("" if mode == "w" else f".{kind}")), members, mode, form)
    told: list[tuple[int, int]] = []
    assert unpack(path, tmp_path / "out", progress=lambda d, o: told.append((d, o))) == len(files)
    assert contents(tmp_path / "out") == files
    assert told and all(0 <= done <= of == path.stat().st_size for done, of in told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", path.name]


def test_litter_of_macs_is_left_out_and_names_are_known(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", [("a/b.txt", b"1"), ("__MACOSX/a/._b.txt", b"2"), ("a/.DS_Store", b"3")])
    unpack(path, tmp_path / "out")
    assert contents(tmp_path / "out") == {"a/b.txt": b"1"}
    assert [archive_stem(Path(n)) for n in ("x.tar.gz", "y.b.ZIP", "z.tgz")] == ["x", "y.b", "z"]
    assert is_archive(Path("A.ZIP")) and is_archive(Path("a.7z")) and not is_archive(Path("adapter_model.bin"))


def test_large_zips_have_larger_numbers(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.zip"
    data = random.Random(seed).randbytes(1000)
    with zipfile.ZipFile(path, "w") as out, out.open("a.bin", "w", force_zip64=True) as file:
        file.write(data)
    unpack(path, tmp_path / "out")
    assert contents(tmp_path / "out") == {"a.bin": data}


# Attacks ----------------------------------------------------------------------------------------


def link(kind: bytes, name: str = "a", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(info, "/etc/passwd")


def zip_device(path: Path) -> None:
    info = zipfile.ZipInfo("device")
    info.create_system, info.external_attr = 3, 0o060666 << 16
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(info, "")


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, out.open("a", "w") as file:
        for _ in range(100):
            file.write(b"\0" * (1 << 20))


def zip_liar(path: Path) -> None:
    """Claims 10 bytes, unpacks to 200 MB."""
    zip_bomb(path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 10)
    path.write_bytes(data)


def zip_overlapping(path: Path) -> None:
    """Fifield's: many entries of one kernel of packed bytes."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = body.compress(b"\0" * 50_000_000) + body.flush()
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(packed), 50_000_000, 1, 0) + b"a"
    entries = b"".join(
        struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, 0, len(packed), 60_000, 4, 0, 0, 0, 0, 0, 0
        )
        + f"{i:04}".encode()
        for i in range(500)
    )
    start = len(local) + len(packed)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 500, 500, len(entries), start, 0)
    path.write_bytes(local + packed + entries + end)


def zip_million(path: Path) -> None:
    entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 1_000_000
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1_000_000, 1_000_000, len(directory), 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(directory + record + locator + end)


def zip_huge_directory(path: Path) -> None:
    path.write_bytes(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 9, 9, 2**32 - 2, 0, 0))


def tar_million(path: Path) -> None:
    headers = b"".join(tarfile.TarInfo(f"a{i}").tobuf() for i in range(10_000))
    with gzip.open(path, "wb", compresslevel=1) as out:
        for _ in range(100):
            out.write(headers)


def tar_bomb(path: Path, kind: Callable[..., Any]) -> None:
    info = tarfile.TarInfo("a")
    info.size = 2 << 30
    with kind(path, "wb") as out:
        out.write(info.tobuf())
        for _ in range(100):
            out.write(b"\0" * (1 << 20))


def tar_long_header(path: Path, kind: bytes) -> None:
    """A name of 4 GB, which the standard library would read into memory."""
    info = tarfile.TarInfo("a")
    info.size, info.type = 4 << 30, kind
    with path.open("wb") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        out.truncate(1 << 30)


def tar_sparse(path: Path) -> None:
    info = tarfile.TarInfo("a")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    tarred(path, [(info, b"x" * 512)])


def plain(name: str) -> Callable[[Path], object]:
    return lambda path: zipped(path, [("ok.txt", b"1"), (name, b"2")])


def plain_tar(name: str) -> Callable[[Path], object]:
    return lambda path: tarred(path, [(tarfile.TarInfo("ok.txt"), b"1"), (tarfile.TarInfo(name), b"2")])


NAMES = {
    "zip-slip": "../../evil", "inner-slip": "a/../../evil", "backslash-slip": "..\\..\\evil", "absolute": "/tmp/evil", "drive": "C:\\evil",
    "drive-relative": "c:evil", "unc": "\\\\server\\share", "reserved": "nul", "reserved-with-ending": "a/COM1.txt", "trailing-dot": "a./b",
    "trailing-space": "b ", "stream": "a:b", "control": "a\x1fb", "turned": "a\u202egnp.exe", "question": "what?", "long": "x" * 300,
    "deep": "a/" * 40 + "b", "case": "OK.TXT", "wide": "ｏｋ.txt", "file-as-folder": "ok.txt/inside", "twice": "ok.txt",
}  # fmt: skip
ATTACKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    **{f"zip {key}": ("x.zip", plain(name), "") for key, name in NAMES.items()},
    **{f"tar {key}": ("x.tar", plain_tar(name), "") for key, name in NAMES.items()},
    "zip link": ("x.zip", zip_link, "a link"),
    "zip device": ("x.zip", zip_device, "device"),
    "zip bomb": ("x.zip", zip_bomb, "bomb"),
    "zip liar": ("x.zip", zip_liar, "more than it claims"),
    "zip overlapping": ("x.zip", zip_overlapping, "overlap"),
    "zip million entries": ("x.zip", zip_million, "entries"),
    "zip huge directory": ("x.zip", zip_huge_directory, "directory"),
    "zip case folders": ("x.zip", lambda p: zipped(p, [("a/b", b"1"), ("A/c", b"2")]), "one name"),
    "tar link": ("x.tar", lambda p: tarred(p, [(link(tarfile.SYMTYPE), b"")]), "a link"),
    "tar hard link": ("x.tar", lambda p: tarred(p, [(link(tarfile.LNKTYPE), b"")]), "a link"),
    "tar long link": ("x.tar", lambda p: tarred(p, [(link(tarfile.SYMTYPE, "a", "x" * 5000), b"")], form=tarfile.GNU_FORMAT), "a link"),
    "tar link then through it": (
        "x.tar",
        lambda p: tarred(p, [(link(tarfile.SYMTYPE, "d", "/tmp"), b""), (tarfile.TarInfo("d/evil"), b"1")]),
        "a link",
    ),
    "tar device": ("x.tar", lambda p: tarred(p, [(link(tarfile.BLKTYPE), b"")]), "device"),
    "tar character device": ("x.tar", lambda p: tarred(p, [(link(tarfile.CHRTYPE), b"")]), "device"),
    "tar pipe": ("x.tar", lambda p: tarred(p, [(link(tarfile.FIFOTYPE), b"")]), "pipe"),
    "tar sparse": ("x.tar", tar_sparse, "not a file"),
    "tar long name": ("x.tar", lambda p: tar_long_header(p, b"L"), "header"),
    "tar long pax": ("x.tar", lambda p: tar_long_header(p, b"x"), "header"),
    "tar.gz million entries": ("x.tar.gz", tar_million, "entries"),
    "tar.gz bomb": ("x.tar.gz", lambda p: tar_bomb(p, partial(gzip.open, compresslevel=9)), "bomb"),
    "tar.bz2 bomb": ("x.tar.bz2", lambda p: tar_bomb(p, bz2.open), "bomb"),
    "tar.xz bomb": ("x.tar.xz", lambda p: tar_bomb(p, partial(lzma.open, preset=1)), "bomb"),
    "tar.xz of much memory": (
        "x.tar.xz",
        lambda p: p.write_bytes(
            lzma.compress(b"x" * 4096, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "mode": 1, "nice_len": 8, "mf": lzma.MF_HC3}])
        ),
        "MiB to unpack",
    ),
}  # fmt: skip


@pytest.mark.attack
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_in_time_with_nothing_left(tmp_path: Path, attack: str) -> None:
    if attack == "tar.xz of much memory" and _free_memory() < 12 << 30:
        pytest.skip("making the attack itself takes 10 GiB")
    name, make, words = ATTACKS[attack]
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    make(place / name)
    started = time.process_time()
    with pytest.raises(WeftError) as refused:
        unpack(place / name, place / "out")
    seconds = time.process_time() - started
    assert refused.value.kind is ErrorKind.HOSTILE and words in refused.value.message and refused.value.hint, (
        refused.value
    )
    assert seconds < 2, f"{attack}: {seconds:.2f} s"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [f"a/b/c/{name}"]
    assert [p.name for p in place.iterdir()] == [name]


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.attack
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child's peak memory is read from Linux's /proc")
def test_no_attack_takes_more_than_256_mib(tmp_path: Path) -> None:
    heavy = ["zip bomb", "zip liar", "zip million entries", "tar.gz million entries", "tar long pax", "tar.gz bomb", "tar.bz2 bomb", "tar.xz bomb"]  # fmt: skip
    paths: list[str] = []
    for number, attack in enumerate(heavy):
        name, make, _ = ATTACKS[attack]
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / name)
        paths.append(str(folder / name))
    code = (
        "import sys\nfrom pathlib import Path\nfrom app.core.archives import unpack\n"
        "from app.core.errors import WeftError\n"
        "for p in sys.argv[1:]:\n    try:\n        unpack(Path(p), Path(p).parent / 'out')\n    except WeftError: continue\n    sys.exit('let through ' + p)\n"
        # Not getrusage: its peak begins at that of the process that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * 1024
    print(f"peak {peak / 2**20:.0f} MiB")
    assert peak < 256 << 20


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz", "x.tar.bz2"])
def test_truncated_and_flipped_archives_are_refused_or_right(tmp_path: Path, kind: str, seed: int) -> None:
    """Any damage ends in an error, or (a tar has no checksums of its data) in files of the right sizes; never outside."""
    numbers = random.Random(seed)
    files = {f"d/{i}.bin": numbers.randbytes(3000) for i in range(4)}
    good = tmp_path / kind
    if kind == "x.zip":
        zipped(good, list(files.items()))
    else:
        mode = "w" if kind == "x.tar" else f"w:{kind.rpartition('.')[2]}"
        tarred(good, [(tarfile.TarInfo(n), d) for n, d in files.items()], mode)
    data = good.read_bytes()
    place = tmp_path / "in" / "ner"
    place.mkdir(parents=True)
    refused = 0
    for number in range(120):
        bad = bytearray(data)
        if number % 2:
            bad = bad[: numbers.randrange(len(bad) - 1100 if kind == "x.tar" else len(bad) - 1)]
        else:
            for _ in range(numbers.randrange(1, 4)):
                bad[numbers.randrange(len(bad))] = numbers.randrange(256)
        path = place / kind
        path.write_bytes(bad)
        out = place / f"out{number}"
        try:
            unpack(path, out, limits=Limits(total=1 << 24))
        except WeftError as error:
            refused += 1
            assert error.hint and not out.exists(), error
        else:
            assert kind == "x.tar" or set(contents(out).values()) <= set(files.values())
            assert number % 2 == 0 or contents(out) == files, "a truncated archive passed"
    assert refused >= 60
    assert {p.name for p in tmp_path.iterdir()} == {"in", kind} and [p.name for p in (tmp_path / "in").iterdir()] == [
        "ner"
    ]


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    for name, start, words in (("a.7z", b"7z\xbc\xaf\x27\x1c", "7-Zip"), ("a.rar", b"Rar!\x1a\x07", "RAR"), ("a.tar.zst", b"\x28\xb5\x2f\xfd", "Zstandard"), ("a.zip", b"nothing", "no zip")):  # fmt: skip
        (tmp_path / name).write_bytes(start + b"\0" * 600)
        with pytest.raises(WeftError, match=words) as refused:
            unpack(tmp_path / name, tmp_path / "out")
        assert refused.value.hint
    path = zipped(tmp_path / "secret.zip", [("a", b"1")])
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(WeftError, match="encrypted"):
        unpack(path, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(WeftError, match="exists already"):
        unpack(path, tmp_path / "taken")
