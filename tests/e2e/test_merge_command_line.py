"""`weft merge` on the starter model and its voice: the merged model speaks as the adapter on the base does."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.command_line import QUESTION, ROOT, greedy_answer, weft, weft_json

VOICE = ROOT / "resources" / "starter" / "voice-adapter"
ASKED = ("-p", QUESTION, "--temperature", "0", "--loader", "transformers")


def test_the_merged_starter_speaks_with_the_voice(tmp_path: Path) -> None:
    target = tmp_path / "starter with voice"
    made = weft_json("merge", "starter", "--adapter", f"{VOICE}=0.8", "--to", str(target), "--dtype", "float32")
    assert Path(made["folder"]) == target and made["method"] == "streaming" and made["changed"] == 28
    live = weft_json("chat", "starter", *ASKED, "--adapter", f"{VOICE}=0.8")["text"]
    assert weft_json("chat", str(target), *ASKED)["text"] == live
    assert live != greedy_answer("starter")
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    ended = weft("merge", "starter", "--adapter", str(VOICE), "--to", str(target))
    assert ended.returncode == 1
    assert "exists already" in ended.stderr and "hint: " in ended.stderr


def test_what_weft_merge_refuses_in_words(tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    for arguments, word in (
        (("starter", "--adapter", f"{VOICE}=0"), "nothing to merge"),
        (("starter",), "nothing to merge"),
        (("starter", "--adapter", str(VOICE), "--shard-size", "much"), "no size"),
        (("starter (gguf)", "--adapter", str(VOICE)), "GGUF"),
    ):
        ended = weft("merge", *arguments, "--to", target)
        assert ended.returncode == 1 and word in ended.stderr, ended.stderr
        assert not Path(target).exists()
    assert weft("merge", "starter").returncode == 2, "it is not said where to"
