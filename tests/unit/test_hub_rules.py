"""Names on the hub, what belongs together, where it goes on disk, how long to wait, how to share a limit."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.unfinished import DownloadNote, pending_files, read_note, write_note
from app.hub.files import Listing, RemoteFile
from app.hub.journal import ENDINGS, LONGEST_NAME, PartHeader, beside
from app.hub.limits import RateLimit, retry_delay
from app.hub.local_copies import find_copies, take_copy
from app.hub.part import PartFile, arrived_bytes, remove_parts
from app.hub.places import folder_for, local_name, local_path, refuse_collisions
from app.hub.positional import PositionalFile
from app.hub.reference import HubReference, check_file_path, parse_reference
from app.hub.selection import gguf_choices, is_adapter, lost_parts, pick, quantization, repository_choice, usual
from app.hub.trouble import gated_error
from app.viewmodels.transfer_rates import Speed, shares


def files(*paths: str, size: int = 10) -> list[RemoteFile]:
    return [
        RemoteFile(repo="user/tiny", commit="c" * 40, path=path, size=size + place) for place, path in enumerate(paths)
    ]


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("user/model", "user/model", "", ""),
        ("  'user/model'  ", "user/model", "", ""),
        ("user/model:dev", "user/model", "dev", ""),
        ("user/model@refs/pr/3", "user/model", "refs/pr/3", ""),
        ("https://huggingface.co/user/model", "user/model", "", ""),
        ("huggingface.co/user/model/", "user/model", "", ""),
        ("https://hf.co/user/model/tree/dev%2Fx", "user/model", "dev/x", ""),
        ("https://huggingface.co/user/model/tree/main/folder", "user/model", "main", ""),
        ("https://huggingface.co/user/model/blob/main/a/b.gguf?x=1#y", "user/model", "main", "a/b.gguf"),
        ("https://huggingface.co/user/model/resolve/refs%2Fpr%2F1/b.gguf?download=true", "user/model", "refs/pr/1", "b.gguf"),
        ("https://huggingface.co/user/model/discussions/4", "user/model", "", ""),
        ("weft://open_from_hf?model=user/model&file=b.gguf", "user/model", "", "b.gguf"),
        ("weft://download?repo=user%2Fmodel&revision=dev", "user/model", "dev", ""),
        ("weft://user/model@dev", "user/model", "dev", ""),
        ("lmstudio://open_from_hf?model=user/model", "user/model", "", ""),
    ],
)  # fmt: skip
def test_names_addresses_and_links_are_read(text: str, repo: str, revision: str, file: str) -> None:
    reference = parse_reference(text)
    assert (reference.repo, reference.revision, reference.file) == (repo, revision, file)
    assert reference.from_link == text.startswith(("weft:", "lmstudio:"))


@pytest.mark.attack
@pytest.mark.parametrize(
    "text",
    [
        "", "model", "user/model/more", "../model", "user/..", "user/mo del", "user/model:../x", "user/model:-x",
        "https://example.org/user/model", "ftp://huggingface.co/user/model", "https://huggingface.co/datasets/user/data",
        "https://huggingface.co.evil.org/user/model", "https://evil.org@huggingface.co/user/model",
        "https://huggingface.co/user/model/blob/main/..%2F..%2Fx", "weft://x?model=user/model&file=../../x",
        "weft://x?model=user/model&file=/etc/passwd", "weft://", "weft://" * 2000, "https://[", "user/" + "x" * 200,
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused_in_words(text: str) -> None:
    with pytest.raises(WeftError) as caught:
        parse_reference(text)
    assert caught.value.kind in (ErrorKind.BAD_INPUT, ErrorKind.HOSTILE)
    assert caught.value.hint


@pytest.mark.attack
def test_no_text_makes_the_reader_fail_otherwise() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pieces = [
        "user",
        "/",
        ":",
        "@",
        "https://",
        "huggingface.co",
        "weft://",
        "?model=",
        "%2F",
        "..",
        "\\",
        "\0",
        "é",
        "[",
        " ",
        "tree",
        "#",
    ]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        try:
            found = parse_reference(text)
        except WeftError:
            continue
        assert "/" in found.repo and ".." not in found.repo


def test_a_mirror_s_own_addresses_are_read() -> None:
    assert parse_reference("http://mirror:8080/user/model", "http://mirror:8080").repo == "user/model"
    with pytest.raises(WeftError):
        parse_reference("http://mirror:8080/user/model", "http://mirror:9090")


@pytest.mark.attack
@pytest.mark.parametrize(
    "path",
    ["/x", "../x", "a/../x", "a//b", "a/./b", "C:/x", "c:x", "a\\b", "a\0b", "a\nb", "", "\ud800", "x/" * 3000 + "x"],
)
def test_file_paths_that_could_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(WeftError) as caught:
        check_file_path(path)
    assert caught.value.kind is ErrorKind.HOSTILE


def test_a_time_in_a_file_s_name_is_no_drive() -> None:
    check_file_path("evals/results_2024-05-16T12:34:56.json")
    assert local_path(Path("m"), "C/a:b", windows=True) == Path("m/C/a_b")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Llama-3-8B.Q4_K_M.gguf", "Q4_K_M"), ("llama-iq2_xxs.gguf", "IQ2_XXS"), ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("q8_0/model-q8_0-00001-of-00003.gguf", "Q8_0"), ("m-f16.gguf", "F16"), ("m-BF16.gguf", "BF16"), ("m-TQ1_0.gguf", "TQ1_0"),
        ("m-MXFP4_MOE.gguf", "MXFP4_MOE"), ("model.gguf", ""), ("Q4ever.gguf", ""), ("m.Q4_0_4_8.gguf", "Q4_0_4_8"), ("m-Q4_K.gguf", "Q4_K"),
    ],
)  # fmt: skip
def test_quantizations_are_read_from_names(name: str, wanted: str) -> None:
    assert quantization(name) == wanted


def test_a_split_gguf_and_its_projector_are_one_choice() -> None:
    listed = files(
        "m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf", "mmproj-m-f32.gguf", "README.md"
    )  # fmt: skip
    choices = {choice.quantization: choice for choice in gguf_choices(listed)}
    assert [file.path for file in choices["Q4_K_M"].all_files] == [
        "m-Q4_K_M-00001-of-00002.gguf",
        "m-Q4_K_M-00002-of-00002.gguf",
        "mmproj-m-f16.gguf",
    ]
    assert choices["Q8_0"].projector is not None
    assert lost_parts(choices["Q4_K_M"]) == 0 and lost_parts(choices["Q8_0"]) == 0
    lame = gguf_choices(files("m-00002-of-00003.gguf"))[0]
    assert lost_parts(lame) == 2
    [odd] = gguf_choices(files("m-00002-of-00003.gguf", "m-00002-OF-00003.gguf", "m-00009-of-00003.gguf", "m.gguf"))
    assert lost_parts(odd) == 2, "what is no part of that set stands for none"


def test_a_repository_is_fetched_without_what_it_has_twice() -> None:
    listed = files(
        "config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "tokenizer.json", "onnx/model.onnx",
        ".gitattributes", "README.md", "picture.png", "flax_model.msgpack", "generation_config.json", "LICENSE",
    )  # fmt: skip
    kept = {file.path for file in repository_choice(listed).files}
    assert kept >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "generation_config.json",
        "LICENSE",
    }
    assert not kept & {
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        ".gitattributes",
        "flax_model.msgpack",
    }
    old = {file.path for file in repository_choice(files("config.json", "pytorch_model.bin")).files}
    assert old == {"config.json", "pytorch_model.bin"}
    below = files(
        "config.json", "pytorch_model.bin", "checkpoint-5/model.safetensors", "checkpoint-5/pytorch_model.bin"
    )
    kept = {file.path for file in repository_choice(below).files}
    assert kept == {"config.json", "pytorch_model.bin", "checkpoint-5/model.safetensors"}
    with pytest.raises(WeftError, match="no model or adapter"):
        usual(files("README.md", "config.json"))


def test_an_adapter_is_told_from_a_model() -> None:
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert is_adapter(files(*adapter)) and is_adapter(files("adapter_config.json", "adapter_model.bin"))
    # What training programs leave there too.
    assert is_adapter(files(*adapter, "config.json", "training_args.bin", "checkpoint-9/model.safetensors"))
    assert not is_adapter(files(*adapter, "config.json", "model-00001-of-00002.safetensors"))
    assert is_adapter(files(*adapter, "voice-f16.gguf")) and not is_adapter(files("config.json", "model.safetensors"))
    assert not is_adapter(files("checkpoint-9/adapter_config.json", "model.safetensors"))


def test_files_are_picked_by_path_name_pattern_and_quantization() -> None:
    listed = files("sub/m-Q4_K_M-00001-of-00002.gguf", "sub/m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf", "config.json")
    assert len(pick(listed, ["m-Q4_K_M-00001-of-00002.gguf"])) == 2
    assert [file.path for file in pick(listed, ["q8_0"])] == ["m-Q8_0.gguf"]
    assert len(pick(listed, ["*.gguf"])) == 3
    with pytest.raises(WeftError, match=r"no file 'm-Q8.gguf'") as caught:
        pick(listed, ["m-Q8.gguf"])
    assert "m-Q8_0.gguf" in caught.value.hint
    with pytest.raises(WeftError, match="2 GGUF models"):
        usual(listed)


def test_branches_get_folders_of_their_own_and_adapters_their_library() -> None:
    models, loras = Path("/m"), Path("/l")
    place = lambda **fields: folder_for(Listing(repo="u/n", commit="c", files=(), **fields), models, loras)  # noqa: E731
    assert place(revision="main") == Path("/m/u/n")
    assert place(revision="dev/a b") == Path("/m/u/n@dev~a~b")
    assert place(revision="dev/x") != place(revision="dev-x")
    assert place(revision="main", kind="adapter") == Path("/l/u/n")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "windows"),
    [("con", "_con"), ("AUX.json", "_AUX.json"), ("com1.tar.gz", "_com1.tar.gz"), ("a?b*.txt", "a_b_.txt"), ("end. ", "end._"), ("model.gguf", "model.gguf"), ("naïve-模型.gguf", "naïve-模型.gguf")],
)  # fmt: skip
def test_names_that_windows_reserves_get_another_there_and_only_there(name: str, windows: str) -> None:
    assert local_name(name, windows=True) == windows
    assert local_name(name, windows=False) == name


@pytest.mark.fault
def test_names_that_are_one_file_on_many_systems_are_refused_together() -> None:
    for pair in (("README.md", "readme.md"), ("caf\u00e9.txt", "cafe\u0301.txt")):
        with pytest.raises(WeftError) as caught:
            refuse_collisions(files(*pair))
        assert pair[0] in str(caught.value) or repr(pair[0]) in str(caught.value)
        refuse_collisions(files(pair[0]))
    with pytest.raises(WeftError):
        refuse_collisions(files("a?.txt", "a*.txt"), windows=True)
    for pair in (("a", "a/b"), ("Data", "data/x/y"), ("m.gguf", "m.gguf.part.journal"), ("d/m.gguf", "d/M.gguf.PART")):
        for order in (pair, pair[::-1]):
            with pytest.raises(WeftError) as caught:
                refuse_collisions(files(*order))
            assert caught.value.kind is ErrorKind.HOSTILE
    with pytest.raises(WeftError, match="notes what it has fetched"):
        refuse_collisions(files(".weft-download.json"))
    refuse_collisions(files("m.part", "m.gguf", "a/b", "ab", "a/.part", "x.old", "x"))
    long = "n" * 240 + ".gguf"
    for ending in ENDINGS:
        with pytest.raises(WeftError):
            refuse_collisions(files(f"d/{beside(Path(long), ending)}", f"d/{long}"))


def test_the_names_of_a_hundred_thousand_files_are_looked_through_at_once() -> None:
    many = files(*(f"part-{number % 300:03d}/shard-{number:06d}/weights.safetensors" for number in range(100_000)))
    started = time.process_time()
    refuse_collisions(many)
    assert time.process_time() - started < 3  # 0.2 s; it took seconds when every name was made into paths
    with pytest.raises(WeftError):
        refuse_collisions([*many, *files("PART-007")])


@pytest.mark.fault
def test_a_name_of_255_bytes_can_be_fetched_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    name = "é" * 125 + ".gguf"
    assert len(name.encode()) == LONGEST_NAME
    part = PartFile(tmp_path / name, PartHeader(url="u", size=3, etag="e"))
    part.write(0, b"abc")
    part.claim(0, 3)
    assert arrived_bytes(tmp_path / name) == 3
    assert all(len(path.name.encode()) <= LONGEST_NAME for path in tmp_path.iterdir())
    part.finish()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    other = beside(tmp_path / ("é" * 124 + "ab.gguf"), ".part")
    assert other != beside(tmp_path / name, ".part")
    with pytest.raises(WeftError, match="too long"):
        local_path(tmp_path, "x" * 256)


def test_where_nothing_writes_at_offsets_a_seek_serves(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    file = PositionalFile(path)
    file._seeks = True
    data = random.randbytes(100_000)
    pieces = [(at, data[at : at + 1000]) for at in range(0, len(data), 1000)]
    random.shuffle(pieces)
    half = len(pieces) // 2
    threads = [
        threading.Thread(target=lambda part=part: [file.write(*piece) for piece in part])
        for part in (pieces[:half], pieces[half:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read(0, len(data)) == data == path.read_bytes()
    file.close()


@pytest.mark.fault
def test_a_torn_journal_claims_only_what_it_can_prove(tmp_path: Path) -> None:
    header = PartHeader(url="u", size=1000, etag="e")
    part = PartFile(tmp_path / "f", header)
    part.write(0, bytes(600))
    part.claim(0, 300)
    part.claim(400, 600)
    part.close()
    with part.journal_path.open("ab") as journal:
        journal.write(b"600 9\n-5 20\n700 1000\n300 35")  # backwards, negative, beyond the file, torn
    again = PartFile(tmp_path / "f", header)
    assert again.spans == [(0, 300), (400, 600)]
    again.write(300, bytes(100))
    again.claim(300, 400)  # it does not join the torn line
    again.close()
    third = PartFile(tmp_path / "f", header)
    assert third.spans == [(0, 600)]
    third.close()
    other = PartFile(tmp_path / "f", PartHeader(url="u", size=1000, etag="another"))
    assert other.arrived == 0  # never spliced
    other.close()


@pytest.mark.fault
def test_after_a_power_failure_only_what_the_disk_confirmed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claims reached the disk and the bytes did not: zeros lie there, and nothing says so."""
    from app.hub import positional

    header = PartHeader(url="u", size=3000, etag="e")
    part = PartFile(tmp_path / "f", header)
    part.write(0, b"x" * 1000)
    part.claim(0, 1000)
    part.sync()
    part.write(1000, b"x" * 1500)
    part.claim(1000, 2500)
    part.close()
    again = PartFile(tmp_path / "f", header)  # killed, not without power: all of it counts
    assert again.spans == [(0, 2500)] and arrived_bytes(tmp_path / "f") == 2500
    again.close()
    real = positional.boot_mark()
    for mark in ("00000000-another-run", f"{time.time() - time.monotonic() + 100:.0f}"):
        monkeypatch.setattr(positional, "boot_mark", lambda mark=mark: mark)
        assert arrived_bytes(tmp_path / "f") == 1000
    after = PartFile(tmp_path / "f", header)
    assert after.spans == [(0, 1000)]
    after.claim(1000, 1200)
    after.close()
    monkeypatch.setattr(positional, "boot_mark", lambda: real)
    assert after.spans == [(0, 1200)]


def test_a_run_of_the_system_is_told_by_when_it_began_where_it_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.hub import positional

    assert positional.same_boot(positional.boot_mark())
    monkeypatch.setattr(positional, "boot_mark", lambda: "1000000")
    assert positional.same_boot("1000002")
    assert not any(positional.same_boot(mark) for mark in ("1000030", "999000", "", "nonsense", "nan"))


@pytest.mark.fault
def test_parts_that_somebody_fetches_now_are_not_removed(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "f", PartHeader(url="u", size=10, etag="e"))
    part.write(0, b"0123456789")
    part.claim(0, 10)
    (tmp_path / "f.copy.part").write_bytes(b"left by a kill")
    assert not remove_parts(tmp_path / "f")
    part.finish()
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    PartFile(tmp_path / "f", PartHeader(url="v", size=10, etag="e")).close()
    assert remove_parts(tmp_path / "f") and remove_parts(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_two_processes_cannot_hold_one_part_file(tmp_path: Path) -> None:
    from app.hub.part import Locked

    header = PartHeader(url="u", size=10, etag="e")
    first = PartFile(tmp_path / "f", header)
    with pytest.raises(Locked):
        PartFile(tmp_path / "f", header)
    first.close()
    PartFile(tmp_path / "f", header).close()


def test_the_note_says_what_is_missing_and_survives_nonsense(tmp_path: Path) -> None:
    assert pending_files(tmp_path) == frozenset()
    write_note(tmp_path, DownloadNote(repo="user/tiny", pending=("a", "b/c")))
    assert pending_files(tmp_path) == {"a", "b/c"}
    for nonsense in (b"", b"{", b"[]", b'{"pending": 3}', b"\xff\xfe", b"[" * 100_000):
        (tmp_path / ".weft-download.json").write_bytes(nonsense)
        assert read_note(tmp_path) is None and pending_files(tmp_path) == frozenset()


def test_copies_are_found_in_the_cache_and_in_other_roots_and_linked(tmp_path: Path) -> None:
    data = random.randbytes(1_200_000)
    file = RemoteFile(repo="user/tiny", commit="c", path="m.gguf", size=len(data), sha256="ab" * 32)
    cache, lmstudio, own = tmp_path / "hub", tmp_path / "lm", tmp_path / "own" / "user" / "tiny"
    blob = cache / "models--user--tiny" / "blobs" / file.sha256
    for path in (blob, lmstudio / "user" / "tiny" / "m.gguf", own / "m.gguf"):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    assert find_copies([file], [cache], own) == {"m.gguf": str(blob)}
    assert find_copies([file], [lmstudio], own) == {"m.gguf": str(lmstudio / "user" / "tiny" / "m.gguf")}
    assert find_copies([file], [tmp_path / "own"], own) == {}
    target = tmp_path / "taken"
    take_copy(blob, target)
    assert target.read_bytes() == data
    small = RemoteFile(repo="user/tiny", commit="c", path="config.json", size=2, git_oid="cd" * 20)
    mine = lmstudio / "user" / "tiny" / "config.json"
    mine.write_bytes(b"{}")
    assert find_copies([file, small], [lmstudio], own)["config.json"] == str(mine)
    take_copy(mine, tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"[]")
    assert mine.read_bytes() == b"{}"  # a copy that can be edited


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        ("You must be authenticated to access it.", False, "no token is set"), ("you are not in the authorized list", True, "not accepted yet"),
        ("Your request to access model a/b is awaiting a review from the repo authors.", True, "still waits"), ("has been rejected by the repo's authors", True, "denied"),
    ],
)  # fmt: skip
def test_what_stands_between_a_person_and_a_gated_model_is_named(words: str, token: bool, said: str) -> None:
    error = gated_error("a/b", "https://hub.example/a/b", words, has_token=token)
    assert said in error.message and "https://hub.example/a/b" in error.hint and error.kind is ErrorKind.PERMISSION


def test_retry_after_is_obeyed_in_both_forms_and_against_the_server_s_clock() -> None:
    assert 60 <= retry_delay(1, "60") <= 61
    date, later = "Wed, 01 Jan 2020 00:00:00 GMT", "Wed, 01 Jan 2020 00:01:00 GMT"
    assert 60 <= retry_delay(1, later, date) <= 61  # however wrong this computer's clock is
    assert all(retry_delay(1, nonsense) < 1 for nonsense in ("nonsense", "²", "-5", "9" * 5000, "Wed, 99 Foo"))
    assert retry_delay(1, "999999999") <= 3600
    assert retry_delay(20) <= 60
    assert len({retry_delay(3) for _ in range(20)}) > 10  # jitter


def test_a_rate_limit_holds_and_can_be_changed_while_others_wait() -> None:
    limit, never = RateLimit(1_000_000), threading.Event()
    started = time.monotonic()
    for _ in range(10):
        limit.wait_for(50_000, never)
    assert 0.3 < time.monotonic() - started < 5
    limit.change(1000)
    waiter = threading.Thread(target=limit.wait_for, args=(100_000, never))
    waiter.start()
    time.sleep(0.1)
    limit.change(0)
    waiter.join(2)
    assert not waiter.is_alive()


def test_a_limit_is_shared_and_what_one_leaves_goes_to_the_others() -> None:
    assert shares(0, [1, 2]) == [0, 0]
    assert shares(1e6, [0, 0]) == [5e5, 5e5]
    slow, fast = shares(1e6, [1e5, 5e5])
    assert slow == pytest.approx(1.25e5) and slow + fast == pytest.approx(1e6)
    for _ in range(200):
        speeds = [random.choice([0, random.uniform(1, 3e6)]) for _ in range(random.randrange(1, 8))]
        limit = random.uniform(1e5, 1e7)
        assert sum(shares(limit, speeds)) <= limit * 1.001 + 1024 * len(speeds)


def test_speed_is_smoothed_and_time_left_is_not_promised_when_nothing_comes() -> None:
    now = [0.0]
    speed = Speed(lambda: now[0])
    for step in range(100):
        now[0] = step * 0.5
        speed.add(step * 500_000 + (200_000 if step % 2 else 0))
    assert speed.now == pytest.approx(1e6, rel=0.1)
    left = speed.left(10_000_000)
    assert left is not None and 8 < left < 12
    now[0] += 10
    assert speed.left(10_000_000) is None
    # Two seconds to connect, then a burst out of buffers, then 1 MB/s: what is shown is never more than the mean so far.
    now, speed = [0.0], Speed(lambda: now[0])
    for step in range(40):
        now[0] = step * 0.5
        came = 0 if step < 4 else 4_000_000 + (step - 4) * 500_000
        speed.add(came)
        assert speed.now <= came / max(0.5, now[0] - 1.5) * 1.001
    assert speed.now == pytest.approx(1e6, rel=0.1)


def test_a_reference_reads_as_it_is_written() -> None:
    assert str(HubReference(repo="u/m", revision="dev", file="a.gguf")) == "u/m:dev a.gguf"
