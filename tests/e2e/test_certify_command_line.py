"""`weft certify`, and `--certify` of merges and exports, on the starter model and real children."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.core.formats import read_gguf_header
from app.core.paths import default_paths
from app.engine.environments import USABLE, Environments
from tests.e2e.command_line import ROOT, greedy, greedy_answer, weft, weft_json

STARTER = ROOT / "resources" / "starter"
VOICE = STARTER / "voice-adapter"
GGUF = next(STARTER.glob("*.gguf"))


def test_a_merge_brings_its_certificate(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    made = weft_json("merge", "starter", "--adapter", f"{VOICE}=0.5", "--to", str(target), "--certify")
    found = made["certificate"]
    assert found["mean_kl"] < 1e-5 and found["top1_agreement"] > 0.99 and "voice-adapter 0.5" in found["a"]
    assert json.loads((target / "certificate.json").read_text())["predictions"] == found["predictions"]
    assert "## Certificate" in (target / "README.md").read_text()


@pytest.mark.slow  # engines are started many times; the default tier proves its parts
def test_certify_tells_models_apart_in_words(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How do I add a LoRA? Drop the folder on the window. " * 20)
    ended = weft("certify", str(GGUF), str(GGUF), "--adapter", str(VOICE), "--text", str(text), "--tokens", "100")
    assert ended.returncode == 0, ended.stderr
    assert "mean KL(A‖B)" in ended.stdout and "99 predictions" in ended.stdout
    same = weft_json("certify", str(GGUF), str(GGUF), "--text", str(text), "--tokens", "100")
    assert same["largest_logit_difference"] == 0 and same["top1_agreement"] == 1
    refused = weft("certify", str(GGUF), str(GGUF), "--text", str(tmp_path / "none.txt"))
    assert refused.returncode and "There is no text" in refused.stderr and "hint:" in refused.stderr


def need_export() -> None:
    if Environments(default_paths().environments).state("export") not in USABLE:
        pytest.skip("the environment `export` is not installed")


def test_an_export_of_a_folder_chats_with_the_right_template_and_stops(tmp_path: Path) -> None:
    """Through llama.cpp's converter: what it says of template and end is what the model's folder says."""
    need_export()
    target = tmp_path / "out.gguf"
    made = weft_json("export", "starter", "--adapter", str(VOICE), "--to", str(target), "--type", "q8_0", "--certify")
    assert made["type"] == "q8_0" and made["intermediate"] == 0 and made["certificate"]["mean_kl"] < 1e-2
    header = read_gguf_header(target)
    assert header.text("tokenizer.chat_template") == (STARTER / "model" / "chat_template.jinja").read_text("utf-8")
    said = greedy(str(target))
    assert said["finish_reason"] == "stop", said
    assert said["text"] == greedy_answer("starter", "--adapter", str(VOICE))


@pytest.mark.slow  # the same commands; the default tier proves their parts (tests/engine/test_export_from_gguf.py)
def test_an_export_of_a_gguf_with_an_adapter_is_certified_and_speaks(tmp_path: Path) -> None:
    need_export()
    target = tmp_path / "out.gguf"
    made = weft_json("export", str(GGUF), "--adapter", str(VOICE), "--to", str(target), "--type", "base", "--certify")
    assert made["type"] == "base" and made["certificate"]["mean_kl"] < 1e-4
    said = greedy(str(target))
    assert said["text"] == greedy_answer("starter (GGUF)", "--adapter", str(VOICE))
    assert said["finish_reason"] == "stop"
    refused = weft("export", "starter", "--to", str(tmp_path / "x.gguf"), "--type", "base")
    assert refused.returncode and "The type base is for GGUF models" in refused.stderr
