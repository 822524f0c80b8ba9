"""`weft certify`, and `--certify` of merges and exports, on the starter model and real children."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.core.paths import default_paths
from app.engine.environments import USABLE, Environments
from tests.e2e.command_line import QUESTION, ROOT, greedy_answer, weft, weft_json

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


def test_an_export_of_a_gguf_with_an_adapter_is_certified_and_speaks(tmp_path: Path) -> None:
    if Environments(default_paths().environments).state("export") not in USABLE:
        pytest.skip("the environment `export` is not installed")
    target = tmp_path / "out.gguf"
    made = weft_json("export", str(GGUF), "--adapter", str(VOICE), "--to", str(target), "--type", "base", "--certify")
    assert made["type"] == "base" and made["certificate"]["mean_kl"] < 1e-4
    question = ("-p", QUESTION, "--temperature", "0")
    live = greedy_answer("starter (GGUF)", "--adapter", str(VOICE))
    assert weft_json("chat", str(target), *question)["text"] == live
    refused = weft("export", "starter", "--to", str(tmp_path / "x.gguf"), "--type", "base")
    assert refused.returncode and "The type base is for GGUF models" in refused.stderr
