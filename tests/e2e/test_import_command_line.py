"""`weft import`, `weft check --deep` and saved names, as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command_line import ROOT, weft, weft_json

VOICE = ROOT / "resources" / "starter" / "voice-adapter"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_archive_is_brought_in_and_what_is_known_is_named(tmp_path: Path, home: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "gift"), "gztar", VOICE.parent, "voice-adapter")
    (known,) = weft_json("import", archive)
    assert (known["outcome"], known["path"]) == ("duplicate", str(VOICE))
    (added,) = weft_json("import", archive, "--duplicates")
    assert added["outcome"] == "added" and Path(added["path"]).parent == home / "loras"
    assert any(entry["path"] == added["path"] for entry in weft_json("adapters"))
    found = weft_json("check", added["path"], "starter")
    assert found["verdict"] == "fits"


def test_alpha_is_asked_for_and_remembered(tmp_path: Path) -> None:
    from tests.unit.test_adapter_import import random_tensors

    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(random_tensors(5))
    asked = weft("import", str(lone))
    assert asked.returncode == 1 and "does not say its alpha" in asked.stderr and "--alpha 4" in asked.stderr
    more = tmp_path / "more.safetensors"
    more.write_bytes(random_tensors(6))
    added, second = weft_json("import", str(lone), "--alpha", "10", str(more))  # options stand where they are typed
    assert (added["outcome"], second["outcome"]) == ("added", "added")
    assert json.loads((Path(added["path"]) / "adapter_config.json").read_text())["lora_alpha"] == 10
    bad = weft("import", str(tmp_path / "nowhere"), str(lone))
    assert bad.returncode == 1 and "There is no" in bad.stderr and "same tensors as lone" in bad.stdout


def test_a_deep_check_measures_every_module() -> None:
    found = weft_json("check", str(VOICE), "starter", "--deep")
    assert len(found["deep"]["modules"]) == 28 and all(m["norm"] > 0 for m in found["deep"]["modules"])
    shown = weft("check", str(VOICE), "starter", "--deep")
    assert shown.returncode == 0 and "norms of s·B·A by layer" in shown.stdout and "nothing odd" in shown.stdout
