"""A model's own generation settings: read from a folder, a GGUF file and Ollama, as the library keeps them."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import msgspec
import pytest

from app.cli_engine import add_sampling_arguments, sampling_for, sampling_given
from app.core.library import ModelEntry, ModelFormat
from app.core.own_sampling import OwnSampling, of_folder, of_ollama, write_for_converter
from app.core.recognise_gguf import gguf_model
from app.core.sampling import Sampling, stop_lines, worded
from app.store.library import starter
from tests.fakes.library_files import write_gguf_model


def own(folder: Path, **config: object) -> OwnSampling:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return of_folder(folder)


def test_a_folder_says_how_it_answers(tmp_path: Path) -> None:
    found = own(
        tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0, typical_p=0.9, max_new_tokens=20
    )
    assert found.values() == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "typical_p": 0.9}
    assert own(tmp_path, eos_token_id=2, pad_token_id=0, top_k=None) == OwnSampling(), "nothing is said"
    greedy = own(tmp_path, do_sample=False, temperature=0.7, top_p=0.8)
    assert greedy.values() == {"temperature": 0.0, "top_p": 0.8}, "the likeliest token, whatever stands beside it"
    assert own(tmp_path, repetition_penalty=1.05).values() == {"repetition_penalty": 1.05, "penalty_range": -1}
    assert own(tmp_path, repetition_penalty=1.0).values() == {"repetition_penalty": 1.0}
    assert own(tmp_path, top_k=50.0).values() == {"top_k": 50}
    (tmp_path / "generation_config.json").unlink()
    assert of_folder(tmp_path) == OwnSampling()


def test_stop_strings_are_kept_to_the_letter(tmp_path: Path) -> None:
    texts = ["\n\n", "User:\tx", "a\\nb", "\\", "é\0"]
    stop = own(tmp_path, stop_strings=texts).stop
    assert stop is not None and Sampling(stop=stop).stop_strings() == tuple(texts)
    assert "\x1b" not in worded(own(tmp_path, stop_strings=["\x1b[2J"]).values()), (
        "what a terminal would obey is not printed"
    )
    assert own(tmp_path, stop_strings="END").stop == "END"
    assert own(tmp_path, stop_strings=["ok", 7]).values() == {} and own(tmp_path, stop_strings=["x" * 201]).notes


BAD = ["hot", "0.7", True, [], {}, math.nan, math.inf, -math.inf, -1.5, 1e300, 10**400]


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"])
def test_what_cannot_be_is_left_out_and_said(tmp_path: Path, name: str) -> None:
    for value in BAD:
        found = own(tmp_path, **{name: value, "top_p" if name != "top_p" else "min_p": 0.5})
        assert name not in found.values() and 0.5 in found.values().values(), value
        [note] = found.notes
        assert (
            note.startswith(f"{name} in generation_config.json cannot be ") and "It takes a" in note and len(note) < 250
        )
    found = own(tmp_path, do_sample="no", top_k=2.5)
    assert found.values() == {} and len(found.notes) == 2


def test_a_damaged_file_is_said_and_nothing_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for data in (b"", b"{", b"[1]", b'{"temperature": ', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 2**21 + b"}"):
        path.write_bytes(data)
        found = of_folder(tmp_path)
        assert found.values() == {} and "generation_config.json" in found.notes[0], data[:10]


def test_a_gguf_and_ollama_say_it_by_their_names(tmp_path: Path) -> None:
    keys: dict[str, object] = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.min_p": math.nan,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.penalty_last_n": 128,
        "general.sampling.top_p": "much",
    }
    model = gguf_model(write_gguf_model(tmp_path / "model.gguf", template=True, **keys))
    assert model is not None
    found = model.own_sampling
    assert found.values() == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "penalty_range": 128}
    assert len(found.notes) == 2 and "min_p" in "".join(found.notes)
    layer = tmp_path / "layer"
    layer.write_text(
        json.dumps({"temperature": 1, "repeat_penalty": 1.2, "num_ctx": 4096, "stop": ["<|end|>", "\nUser"]})
    )
    assert of_ollama(layer).values() == {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "stop": stop_lines(["<|end|>", "\nUser"]),
    }


def test_the_starter_is_greedy_in_both_forms_and_entries_keep_it() -> None:
    for word in ("starter", "starter (gguf)"):
        entry = starter(word)
        assert entry.own_sampling == OwnSampling(temperature=0.0), word
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=ModelEntry) == entry


def test_the_command_line_takes_what_was_typed_then_the_models_own(capsys: pytest.CaptureFixture[str]) -> None:
    temperature = round(random.uniform(0.1, 2), 2)
    model = ModelEntry(
        id="m",
        name="Model",
        path="/m",
        format=ModelFormat.SAFETENSORS,
        own_sampling=OwnSampling(temperature=temperature, top_k=7, notes=("top_p is wrong.",)),
    )
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    plain = sampling_for(model, sampling_given(parser.parse_args([])))
    assert plain == Sampling(temperature=temperature, top_k=7)
    told = capsys.readouterr().err
    assert (
        f"Model brings settings of its own: temperature {temperature:g}, top-k 7" in told and "top_p is wrong." in told
    )
    typed = sampling_for(model, sampling_given(parser.parse_args(["--temperature", "0.8"])))
    assert typed == Sampling(temperature=0.8, top_k=7), "also where it is Weft's own default"
    assert "temperature" not in capsys.readouterr().err


def test_what_the_converter_reads_has_its_names_and_types(tmp_path: Path) -> None:
    config = {"do_sample": False, "top_k": 20.0, "top_p": "hot", "repetition_penalty": 1.1, "min_p": math.nan}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    write_for_converter(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"temperature": 0.0, "top_k": 20, "penalty_repeat": 1.1, "penalty_last_n": -1}
    assert isinstance(written["top_k"], int)
