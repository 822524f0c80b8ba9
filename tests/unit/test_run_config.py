"""RUN.toml: the smallest file, every option, errors that name the key, and back again."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat, ModelShape
from app.core.options import describe
from app.store.toml_text import dump
from app.training import methods, run_file
from app.training.distribution import check_configuration, check_distribution, check_sharded
from app.training.estimate import check_room, estimate, words
from app.training.run_config import MethodConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig

SMALLEST = """
[model]
path = "starter"            # or a folder, or a library name
[data]
files = ["examples.jsonl"]
[method]
kind = "lora"
[train]
epochs = 3
[output]
dir = "my-adapter"
"""


def test_the_smallest_file_has_the_documented_defaults(tmp_path: Path) -> None:
    place = tmp_path / "RUN.toml"
    place.write_text(SMALLEST)
    config = run_file.read(place)
    assert (config.model.path, config.output.dir) == ("starter", str(tmp_path / "my-adapter"))
    assert config.data.files == (str(tmp_path / "examples.jsonl"),)
    method, train = config.method, config.train
    assert (method.r, method.alpha, method.targets, method.init, method.rslora, method.dora) == (
        16,
        16,
        "all-linear",
        "default",
        False,
        False,
    )
    assert (
        train.batch_size,
        train.gradient_accumulation,
        train.learning_rate,
        train.max_length,
        train.packing,
        train.seed,
    ) == (2, 8, 2e-4, 1024, "fit", 0)
    assert config.data.held_out == 0.05
    assert methods.check(config) == []
    made = config.data_config()
    assert (made.max_length, made.packing, made.seed) == (1024, "fit", 0)


def test_every_option_goes_to_toml_and_back() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    texts = {
        "targets": "q_proj, v_proj", "exclude": "lm_head", "modules_to_save": "embed_tokens, lm_head", "layers": "0-3, 7", "rank_pattern": "q_proj = 8\n^model.x = 4",
        "alpha_pattern": "v_proj = 2.5", "layer_replication": "0-4, 2-5", "samples": "One?\nTwo?", "new_tokens": "<a> <b>", "trainable_tokens": "5 <x>",
        "target_parameters": "mlp.experts.gate_up_proj",
    }  # fmt: skip
    for _ in range(30):
        table: dict[str, dict[str, Any]] = {}
        for section, kind in (
            ("model", ModelConfig),
            ("method", MethodConfig),
            ("train", TrainConfig),
            ("output", OutputConfig),
        ):
            values: dict[str, Any] = {}
            for field in describe(kind):
                if rng.random() < 0.5:
                    continue
                low, high = field.minimum or 0, min(field.maximum or 100, 100)
                values[field.name] = {
                    "bool": lambda: rng.random() < 0.5,
                    "int": lambda low=low, high=high: rng.randint(int(low), int(high)),
                    "float": lambda low=low, high=high: rng.uniform(low, high),
                    "choice": lambda field=field: rng.choice(field.choices),
                    "text": lambda field=field: texts.get(field.name, "some text"),
                }[field.kind]()
            table[section] = values
        config = run_file.from_table(table)
        assert run_file.parse(dump(run_file.to_table(config))) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[modle]", "model"),
        ("[method]\nrnak = 8", "rank"),
        ("[method]\nr = 0", "from 1 to 4096"),
        ('[train]\noptimizer = "adamm"', "adamw"),
        ("[train]\nlearning_rat = 1", "learning_rate"),
        ("[data]\nmax_length = 8", r"\[train\]"),
        ("[data]\nfiles = 3", "files"),
        ("[train", "TOML"),
        ("model = 3", "table"),
        ("[method]\ntargets = [['a']]", "targets"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(text: str, says: str) -> None:
    with pytest.raises(WeftError, match=says) as caught:
        run_file.parse(text)
    assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint


def test_names_of_peft_and_transformers_are_understood() -> None:
    config = run_file.parse(
        '[method]\nlora_alpha = 32\ntarget_modules = ["q_proj"]\nuse_dora = true\nlayer_replication = [[0, 4], [2, 5]]\nrank_pattern = {q_proj = 8}\n'
        '[train]\nlr = 1e-4\npacking = true\nper_device_train_batch_size = 4\n[data]\nfiles = "a.jsonl"'
    )
    assert (config.method.alpha, config.method.targets, config.method.dora) == (32, "q_proj", True)
    assert run_file.ranges(config.method.layer_replication, "") == [(0, 4), (2, 5)]
    assert run_file.pattern(config.method.rank_pattern, "") == {"q_proj": 8}
    assert (config.train.learning_rate, config.train.packing, config.train.batch_size) == (1e-4, "fit", 4)
    assert config.data.files == ("a.jsonl",)


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("method", {"init": "orthogonal", "r": 7}, "even"),
        ("method", {"init": "loftq_replace"}, "4 bits"),
        ("method", {"target_regex": "("}, "regular expression"),
        ("method", {"targets": " "}, "No modules"),
        ("method", {"rank_pattern": "q_proj: 3"}, "q_proj: 3"),
        ("method", {"layers": "a-b"}, "range"),
        ("method", {"layer_replication": "5-2"}, "range"),
        ("method", {"lora_bias": True, "dora": True}, "lora_bias"),
        ("output", {"dir": " "}, "folder"),
        ("model", {"path": ""}, "model"),
    ],
)
def test_what_excludes_each_other_is_refused_before_anything_starts(
    section: str, changes: dict[str, Any], says: str
) -> None:
    config = run_file.parse(SMALLEST)
    part = msgspec.structs.replace(getattr(config, section), **changes)
    with pytest.raises(WeftError, match=says) as caught:
        methods.check(msgspec.structs.replace(config, **{section: part}))
    assert caught.value.hint


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_a_quantized_base_is_not_changed(init: str) -> None:
    config = run_file.from_table(
        {"model": {"path": "x", "quantization": "nf4"}, "method": {"init": init}, "output": {"dir": "y"}}
    )
    with pytest.raises(WeftError, match=init):
        methods.check(config)


def test_the_form_can_show_every_section() -> None:
    for kind in (ModelConfig, MethodConfig, TrainConfig, OutputConfig):
        fields = describe(kind)
        assert all(field.title and field.help and field.group for field in fields)
    assert RunConfig().train.packing == "fit"


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model").mkdir()
    place = tmp_path / "runs" / "RUN.toml"
    place.write_text(
        '[model]\npath = "model"\n[data]\nfiles = ["../a.jsonl"]\nheld_out_files = ["b"]\n[method]\ncalibration = "c.txt"\n[output]\ndir = "out"'
    )
    config = run_file.read(place)
    assert config.model.path == str(tmp_path / "runs" / "model")
    assert Path(config.data.files[0]).resolve() == tmp_path / "a.jsonl"
    assert config.data.held_out_files == (str(tmp_path / "runs" / "b"),)
    assert config.method.calibration == str(tmp_path / "runs" / "c.txt")
    with pytest.raises(WeftError) as caught:
        run_file.read(tmp_path / "none.toml")
    assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("model", {"device": "cuda"}, "device = auto"),
        ("model", {"attention": "flash_attention_2"}, "attention = auto"),
    ],
)
def test_what_needs_a_graphics_card_is_refused_without_one(section: str, changes: dict[str, Any], says: str) -> None:
    config = run_file.parse(SMALLEST)
    config = msgspec.structs.replace(config, **{section: msgspec.structs.replace(getattr(config, section), **changes)})
    with pytest.raises(WeftError, match="no graphics card") as caught:
        methods.check_machine(config, 0)
    assert says in caught.value.hint
    assert methods.check_machine(config, 1) == []


def test_options_without_effect_are_told() -> None:
    table: dict[str, Any] = {
        "model": {"path": "x"},
        "data": {"held_out": 0},
        "method": {"dora": True, "dora_offload": True},
        "train": {"early_stopping": 2},
        "output": {"dir": "y"},
    }
    config = run_file.from_table(table)
    assert any("Nothing is held out" in note for note in methods.check(config))
    assert any("dora_offload has no effect" in note for note in methods.check_machine(config, 0))
    assert any("nothing to bring to the card" in note for note in methods.check_machine(config, 2))
    assert methods.check_machine(config, 2, sharded=True) == []
    beside = run_file.from_table({**table, "model": {"path": "x", "device": "cpu"}})
    (note,) = methods.check_machine(beside, 1)
    assert "a card computes DoRA's first magnitudes" in note


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_what_becomes_of_a_paged_state_is_told_and_counted(optimizer: str) -> None:
    """On a card bitsandbytes pages; on the processor the state lies in a file, which is no memory."""
    config = run_file.from_table({"model": {"path": "x"}, "train": {"optimizer": optimizer}, "output": {"dir": "y"}})
    plain = msgspec.structs.replace(
        config, train=msgspec.structs.replace(config.train, optimizer=optimizer.removeprefix("paged_"))
    )
    (note,) = methods.check_machine(config, 0)
    assert "keeps its state in a file" in note and methods.check_machine(config, 1) == []
    assert methods.check_machine(plain, 0) == []
    shape = ModelShape(layers=10, hidden=512, vocabulary=1000, heads=8)
    model = ModelEntry(
        id="x", path="x", name="x", format=ModelFormat.SAFETENSORS, parameters=10**8, weight_bytes=10**8, shape=shape
    )
    told, usual, card = estimate(config, model), estimate(plain, model), estimate(config, model, card=True)
    assert told.file + told.optimizer == usual.optimizer == card.optimizer and usual.file == card.file == 0
    assert told.optimizer < told.file / 20  # scales and step counts stay in memory
    assert usual.total - usual.optimizer <= told.total < usual.total - 0.9 * usual.optimizer
    assert "of the optimizer in a file" in words(told) and "in a file" not in words(usual)


def test_a_paged_state_without_room_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "model": {"path": "x"},
        "train": {"optimizer": "paged_adamw"},
        "output": {"dir": str(tmp_path / "new" / "y")},
    }
    config = run_file.from_table(table)
    model = ModelEntry(
        id="x",
        path="x",
        name="x",
        format=ModelFormat.SAFETENSORS,
        parameters=10**8,
        weight_bytes=10**8,
        shape=ModelShape(layers=10, hidden=512, vocabulary=1000, heads=8),
    )
    need = estimate(config, model).file
    free = {str(tmp_path): need, tempfile.gettempdir(): need}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[str(place)]))
    check_room(config, model, card=False)
    free[tempfile.gettempdir()] = 0
    check_room(config, model, card=False)
    free[str(tmp_path)] = need - 1
    with pytest.raises(WeftError, match="no room in") as caught:
        check_room(config, model, card=False)
    assert caught.value.kind is ErrorKind.DISK_FULL and str(tmp_path) in caught.value.message
    check_room(config, model, card=True)  # bitsandbytes pages into main memory


def test_the_time_of_a_run_follows_tokens_steps_and_speed() -> None:
    config = run_file.parse(SMALLEST)
    shape = ModelShape(layers=10, hidden=512, vocabulary=1000, heads=8)
    model = ModelEntry(
        id="x",
        path="x",
        name="x",
        format=ModelFormat.SAFETENSORS,
        parameters=10**8,
        weight_bytes=2 * 10**8,
        shape=shape,
    )
    given: dict[str, Any] = {"tokens": 100_000, "examples": 1600, "flops": 1e11}
    whole = estimate(config, model, **given).seconds
    assert whole > 4 * 1e8 * 3e5 / 1e11, "slower than the products alone"
    assert estimate(config, model, **{**given, "flops": 1e12}).seconds < whole / 2
    few = msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, max_steps=30))
    assert estimate(few, model, **given).seconds == pytest.approx(whole / 10)
    assert estimate(config, model, tokens=0, flops=1e11).seconds == 0
    packed = msgspec.structs.replace(model, format=ModelFormat.GPTQ, weight_bytes=model.parameters // 2)
    assert estimate(config, packed, **given).seconds > whole
    assert estimate(config, packed).weights < estimate(config, model).weights / 4
    assert estimate(config, model, card=True).weights == estimate(config, model).weights / 2


def test_ways_to_share_a_run_out() -> None:
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        check_distribution(kind)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kind": "DEEPSPEED"}, "FSDP"),
        ({"kind": "FSDP", "version": 1}, "fsdp_version: 2"),
        ({"kind": "FSDP", "wraps_checkpoints": True}, "gradient_checkpointing"),
        ({"kind": "NO", "alone": True}, "use_cpu: true"),
    )
    for asked, way_out in refused:
        with pytest.raises(WeftError) as caught:
            check_distribution(**asked)
        assert way_out in caught.value.hint


@pytest.mark.parametrize(
    ("text", "served"),
    [
        ("distributed_type: MULTI_GPU\n", True),
        ("distributed_type: 'NO'\n", True),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_activation_checkpointing: false\n", True),
        ('{"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}', True),
        ('{"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}', False),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n", False),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_activation_checkpointing: true\n", False),
        ("distributed_type: DEEPSPEED\n", False),
    ],
)
def test_accelerates_file_is_read_before_it_is_launched(text: str, served: bool) -> None:
    if served:
        check_configuration(text)
        return
    with pytest.raises(WeftError) as caught:
        check_configuration(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": "nf4"}},
        {"train": {"optimizer": "adamw_8bit"}},
        {"train": {"optimizer": "lora_fa"}},
        {"train": {"objective": "dpo"}, "method": {"init": "off"}},
        {"method": {"modules_to_save": ["lm_head"]}},
        {"method": {"new_tokens": "<|think|>"}},
        {"method": {"layer_replication": [[0, 2], [1, 3]]}},
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_is_said(sections: dict[str, dict[str, Any]]) -> None:
    check_sharded(
        run_file.from_table({"train": {"objective": "dpo"}, "method": {"init": "pissa", "dora": True}}), half=False
    )
    with pytest.raises(WeftError, match="not with FSDP") as caught:
        check_sharded(run_file.from_table(sections), half=False)
    assert "MULTI_GPU" in caught.value.hint
    with pytest.raises(WeftError, match="fp16"):
        check_sharded(run_file.from_table({}), half=True)
