"""Training data without a machine-learning library: reading files, recognising formats, splits and packs."""

from __future__ import annotations

import csv
import io
import json
import random
import string
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import ErrorKind, WeftError
from app.training import read_json, readers
from app.training.batches import longest_batch, plan_epoch, split, tokens_of
from app.training.data_config import DataConfig, DataReport
from app.training.encode import Encoded, Example
from app.training.formats import Row
from app.training.rows import Rows, load_rows
from tests import seeds


@pytest.fixture
def rng() -> random.Random:
    seed = seeds.fresh(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def load(path: Path, **options: Any) -> tuple[list[Row], DataReport]:
    rows = load_rows(DataConfig(files=(str(path),), **options))
    return list(rows), rows.report


def text(rng: random.Random, longest: int = 40) -> str:
    alphabet = string.printable + 'äöü織🧵"\\\\""{}[],:\n'
    return "x" + "".join(rng.choice(alphabet) for _ in range(rng.randint(0, longest)))


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {text(rng, 8): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [text(rng), rng.random() * 1e9, rng.choice([True, False, None]), rng.randrange(1 << 40)][kind]


# Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("as_list", [True, False])
def test_json_is_split_as_json_reads_it(
    tmp_path: Path, rng: random.Random, indent: int | None, as_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record and its line, with blocks so small that each edge falls everywhere once."""
    for _ in range(25):
        monkeypatch.setattr(read_json, "BLOCK", rng.randint(1, 50))
        objects = [{text(rng, 6): value(rng) for _ in range(rng.randint(1, 4))} for _ in range(rng.randint(2, 8))]
        pieces = [json.dumps(each, indent=indent, ensure_ascii=rng.random() < 0.5) for each in objects]
        whole, lines = "[" if as_list else "", []
        for number, piece in enumerate(pieces):
            whole += rng.choice(["", " ", "\n", "\r\n\t"])
            lines.append(whole.count("\n") + 1)
            whole += piece + rng.choice(["", " ", "\n\n"]) + ("," if as_list and number + 1 < len(pieces) else "")
        path = tmp_path / "data.json"
        path.write_bytes((whole + ("]\n" if as_list else "")).encode())
        records = list(readers.read(path))
        assert [record.value for record in records] == objects
        assert [record.line for record in records] == lines


def test_csv_rows_and_their_lines(tmp_path: Path, rng: random.Random) -> None:
    for delimiter in ",;\t":
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
        writer.writerow(["prompt", "completion"])
        wanted, lines = [], []
        for _ in range(rng.randint(1, 30)):
            row = ["".join(rng.choice('ab \n";,\tö織') for _ in range(12)) + "a" for _ in range(2)]
            lines.append(out.getvalue().count("\n") + 1)
            writer.writerow(row)
            wanted.append(row)
        path = tmp_path / "data.csv"
        path.write_text(out.getvalue(), "utf-8", newline="")
        rows, report = load(path)
        assert [[row.prompt, row.answers[0]] for row in rows] == wanted
        assert [row.line for row in rows] == lines
        assert report.bad == 0


def test_raw_text_comes_in_pieces_that_join_to_the_file(tmp_path: Path, rng: random.Random) -> None:
    whole = "".join(rng.choice(["word ", "ö織🧵", "\n", "\n\n"]) for _ in range(300_000))
    path = tmp_path / "book.txt"
    path.write_text(whole, "utf-8", newline="")
    records = list(readers.read(path))
    assert len(records) > 2
    assert "".join(record.value["text"] for record in records if record.value) == whole
    assert [record.more for record in records] == [True] * (len(records) - 1) + [False]
    seen = 0
    for record in records:
        assert record.value is not None
        assert record.line == 1 + whole.count("\n", 0, seen)
        seen += len(record.value["text"])


def test_a_separator_makes_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo\nlines\n---\n\n---\nthree")
    rows, _ = load(tmp_path / "a.txt", separator="\\n---\\n")
    assert [(row.prompt, row.line, row.more) for row in rows] == [
        ("one", 1, False),
        ("two\nlines", 3, False),
        ("three", 8, False),
    ]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    rows, report = load(tmp_path)
    assert [row.prompt for row in rows] == ["first", "second", "p"]
    assert [file.format for file in report.files] == ["text", "text", "prompt_completion"]


# Formats ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("name", "record", "messages", "trained"),
    [
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER], (1,)),
        ("alpaca", {"instruction": "x", "input": "y", "output": "a"}, [{**USER, "content": "x\ny"}, ANSWER], (1,)),
        (
            "alpaca",
            {"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["h", "i"]]},
            [SYSTEM, {**USER, "content": "h"}, {**ANSWER, "content": "i"}, USER, ANSWER],
            (2, 4),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [USER, ANSWER],
            (1,),
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [SYSTEM, USER, ANSWER],
            (2,),
        ),
        ("messages", {"messages": [SYSTEM, USER, ANSWER, USER]}, [SYSTEM, USER, ANSWER], (2,)),
        ("messages", {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, [USER, ANSWER, USER, ANSWER], (3,)),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
            [USER, ANSWER],
            (1,),
        ),
        (
            "prompt_completion",
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            [USER, ANSWER, USER, ANSWER],
            (3,),
        ),
    ],
)
def test_conversations(
    tmp_path: Path, name: str, record: dict[str, Any], messages: list[Any], trained: tuple[int, ...]
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    rows, report = load(tmp_path / "x.jsonl")
    assert report.files[0].format == name
    assert (rows[0].kind, rows[0].prompt, rows[0].trained) == ("chat", messages, trained)


def test_other_kinds_of_rows(tmp_path: Path) -> None:
    records = {
        "pair": {"prompt": "p", "completion": "c"},
        "text": {"text": "t"},
        "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    }
    for kind, record in records.items():
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        rows, _ = load(tmp_path / "x.jsonl")
        assert rows[0].kind == kind
    chosen, rejected = [USER, ANSWER], [USER, {**ANSWER, "content": "b"}]
    for record in ({"chosen": chosen, "rejected": rejected}, {"prompt": "q", "chosen": chosen, "rejected": rejected}):
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        rows, _ = load(tmp_path / "x.jsonl")
        assert (rows[0].prompt, rows[0].answers) == ([USER], ([ANSWER], [{**ANSWER, "content": "b"}]))


def test_a_mapping_names_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("Frage,Antwort,Nummer\nq,a,1\n")
    rows, report = load(tmp_path / "x.csv")
    assert rows == [] and "not recognised" in report.files[0].problem and "Frage" in report.files[0].problem
    rows, report = load(tmp_path / "x.csv", mapping={"instruction": "Frage", "output": "Antwort"})
    assert rows[0].prompt == [USER, ANSWER]
    assert report.files[0].mapping == {"instruction": "Frage", "output": "Antwort"}
    rows, report = load(tmp_path / "x.csv", format="prompt_completion", mapping={"prompt": "Frage"})
    assert rows == [] and "completion" in report.files[0].problem
    with pytest.raises(WeftError, match="instruktion"):
        load(tmp_path / "x.csv", mapping={"instruktion": "Frage"})


def test_bad_rows_are_listed_with_line_and_reason_and_kept_out(tmp_path: Path) -> None:
    lines = [
        '{"instruction": "q", "output": "a"}',
        "",
        '{"instruction": "q"}',
        '{"instruction": "", "output": "a"}',
        '{"instruction": "q", "output": ["a"]}',
        "[1]",
        '{"instruction": "q", "output"',
        '{"instruction": "q", "output": "a\\u0000"}',
        '{"instruction": "q", "output": "b", "history": [["one"]]}',
        '{"instruction": "q", "output": "a"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows, report = load(tmp_path / "x.jsonl")
    assert [row.line for row in rows] == [1, 10]
    assert (report.rows, report.kept, report.bad, report.duplicates) == (9, 2, 7, 1)
    assert [(bad.line, bad.reason) for bad in report.bad_rows] == [
        (3, "output is missing."),
        (4, "instruction is empty."),
        (5, "output is not a text."),
        (6, "It is a list, not an object with fields."),
        (7, report.bad_rows[4].reason),
        (8, "output holds NUL characters."),
        (9, "history is not a list of questions and answers."),
    ]
    assert "not JSON" in report.bad_rows[4].reason
    rows, report = load(tmp_path / "x.jsonl", duplicates="drop")
    assert len(rows) == 1 and report.duplicates == 1


def test_the_format_is_recognised_behind_many_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{bad\n" * 150 + '{"question": "q", "answer": "a"}\n')
    rows, report = load(tmp_path / "x.jsonl")
    assert (rows[0].prompt, rows[0].answers, rows[0].line) == ("q", ("a",), 151)
    assert report.files[0].mapping == {"prompt": "question", "completion": "answer"} and report.bad == 150


def test_reading_can_end_early(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "t"}\n' * 10)
    rows = load_rows(DataConfig(files=(str(tmp_path),)), most=4)
    assert len(list(rows)) == 4 and rows.report.partial and len(rows.report.files) == 1
    rows = load_rows(DataConfig(files=(str(tmp_path),)), most=20)
    assert len(list(rows)) == 20 and not rows.report.partial


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    rows = load_rows(DataConfig(files=(str(tmp_path / "x.jsonl"),)))
    assert len(list(rows)) == len(list(rows)) == rows.report.rows == 2
    assert isinstance(rows, Rows)


# Hostile and broken files -----------------------------------------------------------------------------


def peak(action: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        result = action()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.attack
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "list.json"])
def test_a_line_of_a_gigabyte_takes_bounded_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        if name == "x.csv":
            file.write(b"prompt,completion\np,c\n")
        else:
            file.write(b"[" if name == "list.json" else b"")
            file.write(b'{"prompt": "p", "completion": "c"}' + (b"," if name == "list.json" else b"") + b"\n")
        file.write(b'{"prompt": "')
        file.truncate(file.tell() + 1_000_000_000)  # NULs; the file has holes and takes no disk
        file.seek(0, 2)
        file.write(b'"}\n{"prompt": "last", "completion": "c"}\n' if name != "x.csv" else b"\nlast,c\n")
    (rows, report), memory = peak(lambda: load(path))
    assert memory < 150_000_000
    assert rows[0].prompt == "p"
    if name == "x.jsonl":
        assert [row.line for row in rows] == [1, 3]
        assert report.bad_rows[0].line == 2 and "16 MB" in report.bad_rows[0].reason
    else:
        assert "larger than 16 MB" in report.files[0].problem and "not read" in report.files[0].problem


@pytest.mark.attack
def test_deep_json_is_a_bad_row(tmp_path: Path) -> None:
    deep = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
    for name, before, after in (("x.jsonl", "", "\n"), ("x.json", "[", "]")):
        (tmp_path / name).write_text(
            before + deep + ("\n" if name == "x.jsonl" else ",\n") + '{"text": "good"}' + after
        )
        rows, report = load(tmp_path / name)
        assert [row.prompt for row in rows] == ["good"]
        assert "deep" in report.bad_rows[0].reason


@pytest.mark.attack
@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', 2, "UTF-8"),
        ("x.csv", b"text\na\n\xff\xfe\n", 3, "UTF-8"),
        ("x.csv", b"text\na\nb\0c\n", 3, "NUL"),
        ("x.csv", b"text,more\nc\n", 2, "columns"),
        ("x.csv", b'text\na\n"b\n', 3, "CSV"),
        ("x.json", b'[{"text": "a"},\n 7]', 2, "a number"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_used(
    tmp_path: Path, name: str, content: bytes, where: int, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    rows, report = load(tmp_path / name)
    assert len(rows) == (0 if "columns" in what else 1)
    assert [(bad.line, what in bad.reason) for bad in report.bad_rows] == [(where, True)]


@pytest.mark.attack
@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.txt", b"good\n\xff\xfe bad", "Line 2: it is not UTF-8"),
        ("x.txt", b"good\nbad \0", "Line 2: it holds NUL"),
        ("x.txt", "text".encode("utf-16"), "UTF-16"),
        ("x.jsonl", b"PK\x03\x04rest", "ZIP"),
        ("x.json", b'[{"text": "a"}, {"text"', "ends in the middle"),
        ("x.json", b"hello there", "middle"),
        ("x.json", b'{"text": "a"} garbage {"text": "b"}', "not JSON"),
        ("x.json", b"[1] [2]", "after the list's end"),
        ("x.csv", b"a,a\n1,2\n", "another name"),
        ("x.json", b"", "empty"),
        ("x.parquet", b"PAR1 not really", "Parquet"),
    ],
)
def test_a_file_that_is_no_data_says_why(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow lives in the core environment")
    (tmp_path / name).write_bytes(content)
    _, report = load(tmp_path / name)
    assert what in report.files[0].problem


@pytest.mark.attack
def test_random_bytes_never_raise(tmp_path: Path, rng: random.Random) -> None:
    pieces = [b'{"text": "a"}', b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\\", b"\xff", b"\0", b"x", b'"text"', b":"]
    for _ in range(300):
        name = rng.choice(["x.json", "x.jsonl", "x.csv", "x.txt"])
        (tmp_path / name).write_bytes(b"".join(rng.choice(pieces) for _ in range(rng.randint(0, 30))))
        rows, report = load(tmp_path / name)
        assert len(rows) == report.kept and report.rows == report.kept + report.bad


@pytest.mark.fault
def test_files_that_are_not_there(tmp_path: Path) -> None:
    for files, kind in (
        ((), ErrorKind.BAD_INPUT),
        ((str(tmp_path / "no"),), ErrorKind.NOT_FOUND),
        ((str(tmp_path),), ErrorKind.BAD_INPUT),
    ):
        with pytest.raises(WeftError) as caught:
            load_rows(DataConfig(files=files))
        assert caught.value.kind == kind and caught.value.hint


# Splits and packs -------------------------------------------------------------------------------------


def encoded(groups: list[int]) -> Encoded:
    examples = [Example(array("i", [1, 2]), array("i", [-100, 2]), 0, n, bytes([g])) for n, g in enumerate(groups)]
    return Encoded(examples, [], DataReport())


def test_equal_rows_are_never_on_both_sides(rng: random.Random) -> None:
    for _ in range(200):
        groups = [rng.randrange(20) for _ in range(rng.randint(1, 60))]
        share = rng.choice([0.0, 0.05, 0.3])
        config = DataConfig(held_out=share, seed=rng.randrange(100))
        train, held = split(encoded(groups), config)
        assert sorted(train + held) == list(range(len(groups)))
        assert not {groups[n] for n in train} & {groups[n] for n in held}
        assert train
        assert bool(held) == (share > 0 and len(set(groups)) > 1)
        assert (train, held) == split(encoded(groups), config)


@pytest.mark.parametrize("packing", ["fit", "sequential", "off"])
def test_an_epoch_has_every_example_once_and_the_same_steps_packed_or_not(rng: random.Random, packing: Any) -> None:
    for _ in range(100):
        room = rng.randint(8, 200)
        lengths = [rng.randint(2, room) for _ in range(rng.randint(1, 150))]
        rows, accumulation = rng.randint(1, 4), rng.randint(1, 5)
        config = DataConfig(max_length=room, packing=packing, seed=rng.randrange(100))
        steps = plan_epoch(lengths, config, epoch=3, rows=rows, accumulation=accumulation, packing=True)
        packs = [pack for step in steps for batch in step for pack in batch]
        assert sorted(n for pack in packs for n in pack) == list(range(len(lengths)))
        assert all(sum(lengths[n] for n in pack) <= room for pack in packs)
        assert all(len(batch) <= rows for step in steps for batch in step)
        sizes = [sum(len(pack) for batch in step for pack in batch) for step in steps]
        assert len(steps) == -(-len(lengths) // (rows * accumulation))
        assert sum(sizes) == len(lengths) and max(sizes) <= rows * accumulation
        if packing == "off":
            assert all(len(pack) == 1 for pack in packs)
        assert tokens_of(longest_batch(steps, lengths), lengths) <= rows * room
        again = plan_epoch(lengths, config, epoch=3, rows=rows, accumulation=accumulation, packing=True)
        assert steps == again


def test_packs_are_tight(rng: random.Random) -> None:
    lengths = [rng.randint(10, 300) for _ in range(2000)]
    config = DataConfig(max_length=1024)
    steps = plan_epoch(lengths, config, epoch=0, rows=4, accumulation=64, packing=True)
    used = sum(tokens_of(batch, lengths) for step in steps for batch in step)
    print("padding", 1 - sum(lengths) / used)
    assert sum(lengths) / used > 0.93
