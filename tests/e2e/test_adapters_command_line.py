"""`weft check` and `weft chat --adapter` on the starter model, its voice, and real engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command_line import ROOT, greedy_answer, weft, weft_json

VOICE = ROOT / "resources" / "starter" / "voice-adapter"
STARTERS = ["starter", "starter (GGUF)"]


def at(*weights: str) -> list[str]:
    """Arguments that load the voice at each of these weights."""
    return [argument for weight in weights for argument in ("--adapter", f"{VOICE}={weight}")]


@pytest.mark.parametrize("model", STARTERS)
def test_an_adapter_changes_the_voice_and_weight_zero_is_the_base(model: str) -> None:
    base = greedy_answer(model)
    on = greedy_answer(model, "--adapter", str(VOICE))
    assert on != base
    assert greedy_answer(model, *at("0", "0.5", "0.5")) == on
    assert greedy_answer(model, *at("0", "1", "-1")) == base
    if model == "starter (GGUF)":  # PyTorch takes long to start; tests of `weft compare` have this alone on both
        assert greedy_answer(model, *at("0")) == base


@pytest.mark.slow  # engines are started many times; the default tier proves its parts
def test_both_loaders_speak_with_the_same_voice() -> None:
    answers = {greedy_answer(model, "--adapter", f"{VOICE}=0.8") for model in STARTERS}
    assert len(answers) == 1


@pytest.mark.parametrize("model", STARTERS)
def test_check_says_that_the_voice_fits(model: str) -> None:
    found = weft_json("check", str(VOICE), model)
    assert found["verdict"] == "fits" and not found["problems"]
    assert found["compatibility"]["matched"] == found["compatibility"]["total"] == 28
    assert "It fits: 28 of 28" in weft("check", "voice-adapter", model).stdout, "found by its name in the library"


def test_check_tells_partly_and_not_at_all_by_its_exit_status(tmp_path: Path) -> None:
    from tests.fakes.library_files import safetensors_bytes

    def adapter(name: str, layer: int, width: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(VOICE / "adapter_config.json", folder)
        start = "base_model.model.model.layers"
        tensors = {
            f"{start}.0.self_attn.q_proj.lora_A.weight": ("F32", (8, width)),
            f"{start}.0.self_attn.q_proj.lora_B.weight": ("F32", (hidden, 8)),
        }
        tensors |= {
            f"{start}.{layer}.self_attn.q_proj.lora_A.weight": ("F32", (8, width)),
            f"{start}.{layer}.self_attn.q_proj.lora_B.weight": ("F32", (hidden, 8)),
        }
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
        return str(folder)

    hidden = json.loads((ROOT / "resources" / "starter" / "model" / "config.json").read_text())["hidden_size"]
    partly = weft("check", adapter("partly", 99, hidden), "starter")
    assert partly.returncode == 3 and "in part: 1 of 2" in partly.stdout and "layers" in partly.stdout
    assert "zero" in partly.stdout, "its B matrices hold nothing"
    never = weft("check", adapter("never", 1, 64), "starter")
    assert never.returncode == 4 and "does not fit: 0 of 2" in never.stdout
    chat = weft("chat", "starter", "-p", "x", "--adapter", str(tmp_path / "never"))
    assert chat.returncode == 1 and "0 of its 2 modules match" in chat.stderr and "hint:" in chat.stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [("nowhere", "no adapter"), (f"{VOICE}=loud", "no number"), (f"{VOICE}=nan", "no number")],
)
def test_bad_adapters_are_refused_before_anything_starts(value: str, words: str) -> None:
    ended = weft("chat", "starter", "-p", "x", "--adapter", value)
    assert ended.returncode == 1 and words in ended.stderr and "hint:" in ended.stderr and not ended.stdout


@pytest.mark.slow  # engines are started many times; the default tier proves its parts
def test_combined_halves_speak_with_the_whole_voice_and_a_smaller_rank_says_what_it_keeps(tmp_path: Path) -> None:
    both, small = str(tmp_path / "both"), str(tmp_path / "small")
    made = weft_json("combine", "--adapter", f"{VOICE}=0.5", "--adapter", f"{VOICE}=0.5", "--to", both)
    assert made["rank"] == 16 and made["modules"] == 28 and made["energy"] == 1.0
    assert greedy_answer("starter", "--adapter", both) == greedy_answer("starter", "--adapter", str(VOICE))
    resized = weft_json("combine", "--adapter", both, "--rank", "4", "--to", small)
    assert resized["rank"] == 4 and 0.2 < resized["energy"] < 1.0
    assert weft_json("check", small, "starter")["verdict"] == "fits"
    again = weft("combine", "--adapter", both, "--to", small)
    assert again.returncode == 1 and "exists already" in again.stderr
