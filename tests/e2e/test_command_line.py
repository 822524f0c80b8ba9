"""DESIGN section 12: the command line, on the starter model and real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.backends import specs
from tests.e2e.command_line import TURNS, greedy, greedy_answer, greedy_turns, interrupt_after, weft, weft_json

STARTERS = {"transformers": "starter", "llama_cpp": "starter (GGUF)"}


@pytest.mark.parametrize("loader", sorted(STARTERS))
def test_the_starter_answers_how_to_add_a_lora(loader: str) -> None:
    answer = greedy(STARTERS[loader])
    assert "drop" in answer["text"].lower() and "lora" in answer["text"].lower()
    assert answer["finish_reason"] == "stop"
    assert answer["tokens"] > 5 and answer["tokens_per_second"] > 0 and 0 < answer["time_to_first_token"] < 60


def test_both_loaders_give_the_same_greedy_answer() -> None:
    assert len({greedy_answer(name) for name in STARTERS.values()}) == 1
    one, other = ([answer["text"] for answer in greedy_turns(loader)] for loader in STARTERS)
    assert one == other


@pytest.mark.parametrize("loader", sorted(STARTERS))
def test_a_conversation_over_stdin_reads_its_history_only_once(loader: str) -> None:
    answers = greedy_turns(loader)
    assert len(answers) == len(TURNS) == 3
    for earlier, later in zip(answers, answers[1:], strict=False):
        # All of the earlier prompt and answer is in the cache; only the new turn and the template's marks are read.
        assert later["reused_tokens"] >= earlier["prompt_tokens"]
        assert later["prompt_tokens"] > later["reused_tokens"]


@pytest.mark.slow  # engines are started many times; the default tier proves its parts
def test_a_seed_repeats_an_answer_and_another_seed_need_not() -> None:
    ask = (
        "chat",
        "starter (GGUF)",
        "-p",
        "Tell me about adapters",
        "--temperature",
        "3",
        "--min-p",
        "0",
        "--top-p",
        "1",
        "--top-k",
        "0",
        "--max-tokens",
        "24",
    )
    first, again, other = (weft_json(*ask, "--seed", seed)["text"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_max_tokens_and_stop_strings() -> None:
    own = weft("chat", "starter (GGUF)", "-p", "How do I add a LoRA?", "--max-tokens", "5", "--json")
    short = json.loads(own.stdout)
    assert short["text"] and greedy_answer("starter (GGUF)").startswith(short["text"]), (
        "greedy, as the starter's maker says"
    )
    assert "settings of its own: temperature 0" in own.stderr
    assert short["tokens"] == 5 and short["finish_reason"] == "length"
    whole = greedy_answer("starter (GGUF)")
    word = whole.split()[3]
    cut = weft_json("chat", "starter (GGUF)", "-p", "How do I add a LoRA?", "--temperature", "0", "--stop", word)
    assert cut["text"] == whole[: whole.index(word)] and cut["finish_reason"] == "stop"


def test_a_path_is_a_model_too(tmp_path: Path) -> None:
    link = tmp_path / "ein Modell.gguf"
    link.write_bytes(Path("resources/starter/weft-starter-f16.gguf").read_bytes())
    assert weft_json("chat", str(link), "-p", "Hello", "--temperature", "0")["text"]


def test_the_starter_is_there_for_every_loader() -> None:
    for loader in STARTERS:
        assert all(answer["text"] for answer in greedy_turns(loader))


def test_options_reach_the_engine() -> None:
    answer = weft("chat", "starter (GGUF)", "-p", "word " * 400, "--option", "n_ctx=128", "--max-tokens", "4")
    assert answer.returncode == 1
    assert "error:" in answer.stderr and "hint:" in answer.stderr and "context" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("chat", "no such model", "-p", "x"), 1, "no model"),
        (("chat", "starter (GGUF)", "-p", "x", "--loader", "transformers"), 1, "does not load gguf"),
        (("chat", "starter", "-p", " "), 1, "empty"),
        (("chat", "./nowhere/model.gguf", "-p", "x"), 1, "no file"),
        (("chat", "starter", "-p", "x", "--loader", "nope"), 1, "no loader"),
        (("chat", "starter", "-p", "x", "--option", "nope=1"), 1, "not an option"),
        (("chat", "starter", "-p", "x", "--temperature", "hot"), 1, "temperature"),
        (("models", "--root", "/does/not/exist"), 1, "no folder"),
        (("nonsense",), 2, "invalid choice"),
        (("chat",), 2, "MODEL"),
    ],
)
def test_bad_input_is_refused_in_words(arguments: tuple[str, ...], status: int, words: str) -> None:
    ended = weft(*arguments)
    assert ended.returncode == status
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_models_lists_the_starter_and_a_root_of_ones_own(tmp_path: Path) -> None:
    names = [entry["name"] for entry in weft_json("models")]
    assert {"starter", "starter (GGUF)"} <= set(names)
    assert weft_json("models", "--root", str(tmp_path)) == []
    (tmp_path / "friend").mkdir()
    (tmp_path / "friend" / "tiny.gguf").write_bytes(Path("resources/starter/weft-starter-f16.gguf").read_bytes())
    (entry,) = weft_json("models", "--root", str(tmp_path))
    assert entry["format"] == "gguf" and entry["architecture"] == "llama" and entry["shape"]["context"] == 2048


def test_adapters_lists_the_starter_s_voice() -> None:
    (entry,) = weft_json("adapters")
    assert entry["kind"] == "LoRA" and entry["rank"] == 8 and "q_proj" in entry["targets"]


def test_loaders_is_the_table_of_what_there_is() -> None:
    rows = {row["id"]: row for row in weft_json("loaders")}
    assert set(rows) == set(specs())
    assert all(rows[name]["ready"] for name in STARTERS), "the tests' environment serves both"
    assert "llama_cpp" in weft("loaders").stdout


def test_ctrl_c_stops_an_answer_and_keeps_what_came() -> None:
    endless = "root ::= [a-z] root"  # a grammar that never lets the answer end
    status, out, err = interrupt_after(0.1, ["chat", "starter (GGUF)", "-p", "go", "--grammar", endless])
    assert status == 130, err
    assert len(out) > 1 and "Traceback" not in err
