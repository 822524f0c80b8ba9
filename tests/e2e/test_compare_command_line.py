"""`weft compare`, `weft perplexity` and `weft chat --bake` on the starter model, its voice, and real engines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.core.paths import default_paths
from app.core.stack import AdapterStack, StackedAdapter
from app.store.database import Database
from app.store.stacks import StackStore
from tests.e2e.command_line import QUESTION, ROOT, greedy_answer, interrupt_after, weft, weft_json

VOICE = ROOT / "resources" / "starter" / "voice-adapter"
STARTERS = ["starter", "starter (GGUF)"]
TEXT = "Weft is one window for running language models at home. Drop the LoRA anywhere on the window.\n" * 3


@pytest.mark.parametrize("model", STARTERS)
def test_each_column_is_what_chat_says_under_that_stack(model: str) -> None:
    with_voice = f"{VOICE}=0.5,{VOICE}=0.5"
    found = weft_json(
        "compare", model, "-p", QUESTION, "--temperature", "0", "--stack", "base", "--stack", with_voice, "--stack", f"{VOICE}=0"
    )  # fmt: skip
    base, on = greedy_answer(model), greedy_answer(model, "--adapter", str(VOICE))
    assert [row["text"] for row in found["rows"]] == [base, on, base]
    assert base != on
    assert [row["stack"] for row in found["rows"]] == ["base", "voice-adapter 0.5 + voice-adapter 0.5", "base"]
    assert found["together"] == (model == "starter"), "rows of one batch where the loader can"
    assert bool(found["note"]) != found["together"]
    assert len({row["seed"] for row in found["rows"]}) == 1


def test_the_same_seed_for_all_columns_also_by_chance() -> None:
    found = weft_json(
        "compare", "starter (GGUF)", "-p", "Hello", "--max-tokens", "12", "--stack", "base", "--stack", "base"
    )
    first, second = found["rows"]
    assert first["text"] == second["text"] and first["seed"] == second["seed"]
    assert first["tokens"] <= 12


def test_sections_and_saved_stacks(home: Path) -> None:
    database = Database(default_paths().database)
    StackStore(database).save("Old voice", AdapterStack(adapters=(StackedAdapter(path=str(VOICE), name="voice"),)))
    database.close()
    ended = weft(
        "compare", "starter (GGUF)", "-p", QUESTION, "--temperature", "0", "--stack", "base", "--stack", "old voice"
    )
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.split("── voice 1 ──")
    assert first.startswith("── base ──\nDrop the LoRA") and "tokens/s, stop)" in first
    assert "Aye" in second
    assert "note: This loader answers rows one after the other." in ended.stderr


@pytest.mark.parametrize("model", STARTERS)
def test_ctrl_c_stops_all_columns_and_keeps_what_came(model: str) -> None:
    endless = ("--grammar", "root ::= [a-z] root", "--max-tokens", "5000")
    status, out, err = interrupt_after(
        0.1, ("compare", model, "-p", "go", *endless, "--stack", "base", "--stack", str(VOICE))
    )
    assert status == 130, err
    assert out.count("cancelled)") == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stack", "base"), "nothing to be compared with"),
        (("--stack", "base", "--stack", "nowhere"), "no adapter"),
        (("--stack", "base", "--stack", " "), "stack is empty"),
        (("--stack", "base", "--stack", f"{VOICE}=loud"), "no number"),
        (("--stack", "base", "--stack", f"{VOICE}=1,{VOICE}=nan"), "no number"),
        (("--stack", "base", "--stack", "base", "--top-p", "7"), "top_p"),
    ],
)
def test_bad_stacks_are_refused_before_anything_starts(arguments: tuple[str, ...], words: str) -> None:
    ended = weft("compare", "starter", "-p", "x", *arguments)
    assert ended.returncode == 1 and words in ended.stderr and "hint:" in ended.stderr and not ended.stdout


def _perplexity(model: str, text: Path, *more: str) -> dict[str, Any]:
    return weft_json("perplexity", model, "--text", str(text), *more)


def test_perplexity_on_both_loaders(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = {model: _perplexity(model, text) for model in STARTERS}
    for model, score in found.items():
        assert score["perplexity"] == pytest.approx(math.exp(score["nll"]), rel=1e-6)
        assert score["tokens"] > 30 and score["stack"] == "base"
        voiced = _perplexity(model, text, "--adapter", str(VOICE))
        assert voiced["nll"] != score["nll"] and voiced["stack"] == "voice-adapter 1"
    base = found[STARTERS[1]]
    assert _perplexity(STARTERS[1], text, "--adapter", f"{VOICE}=0")["nll"] == base["nll"], "weight 0 is the base"
    narrow = _perplexity(STARTERS[1], text, "--window", "16", "--stride", "8")
    assert narrow["tokens"] == base["tokens"] and narrow["nll"] > base["nll"], "less is seen, less is foreseen"
    # The two files hold the same model: the same tokens, and numbers that differ in their last bits alone.
    assert found[STARTERS[0]]["nll"] == pytest.approx(base["nll"], rel=0.02)
    assert base["tokens"] == found[STARTERS[0]]["tokens"]


def test_perplexity_reads_standard_input_and_refuses_what_is_no_text(tmp_path: Path) -> None:
    ended = weft("perplexity", "starter (GGUF)", "--text", "-", stdin=TEXT)
    assert ended.returncode == 0 and ended.stdout.startswith("perplexity ") and "tokens; base)" in ended.stdout
    (tmp_path / "raw").write_bytes(b"abc\xff\xfe")
    (tmp_path / "empty").write_bytes(b"")
    for name, more, words in (
        ("none", (), "no file"),
        ("raw", (), "no text in UTF-8"),
        ("empty", (), "two tokens"),
        (".", (), "cannot be read"),
        ("raw", ("--window", "-3"), "window"),
        ("raw", ("--window", "1"), "window"),
    ):
        refused = weft("perplexity", "starter (GGUF)", "--text", str(tmp_path / name), *more)
        assert refused.returncode == 1 and words in refused.stderr and "hint:" in refused.stderr, (name, refused.stderr)


def test_baked_adapters_say_the_same_and_llama_cpp_says_that_it_cannot() -> None:
    on = greedy_answer("starter", "--adapter", str(VOICE))
    assert greedy_answer("starter", "--adapter", str(VOICE), "--bake") == on
    ended = weft(
        "chat", "starter (GGUF)", "-p", QUESTION, "--temperature", "0", "--adapter", str(VOICE), "--bake", "--json"
    )
    assert ended.returncode == 0 and "stay live" in ended.stderr
    assert json.loads(ended.stdout)["text"] == on
