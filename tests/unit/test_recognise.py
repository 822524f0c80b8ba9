"""What a folder or file is, by its headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.core.library import AdapterFormat, ModelFormat
from app.core.paths import resources
from app.core.recognise import recognise_adapter, recognise_model
from tests.fakes.library_files import (
    LLAMA_CONFIG,
    LLAMA_TENSORS,
    gguf_bytes,
    lora_tensors,
    safetensors_bytes,
    write_folder,
    write_gguf_adapter,
    write_gguf_model,
    write_json,
    write_peft,
    write_sharded,
)


def model(path: Path):
    entry = recognise_model(path)
    assert entry is not None
    return entry


def adapter(path: Path):
    entry = recognise_adapter(path)
    assert entry is not None
    return entry


# Folders ----------------------------------------------------------------------------------------


def test_a_safetensors_folder_tells_everything(tmp_path: Path) -> None:
    entry = model(write_folder(tmp_path / "m"))
    assert entry.format is ModelFormat.SAFETENSORS and entry.quantization == "BF16"
    assert (entry.id, entry.name, entry.path) == (str(tmp_path / "m"), "m", str(tmp_path / "m"))
    assert entry.architecture == "LlamaForCausalLM" and entry.model_type == "llama"
    assert entry.parameters == 32 * 16 + 16 * 16 + 16
    assert entry.weight_bytes == 2 * (32 * 16 + 16 * 16) + 4 * 16
    assert entry.bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert entry.files == (str(tmp_path / "m" / "model.safetensors"),)
    shape = entry.shape
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads) == (1, 16, 48, 4, 2)
    assert (shape.head_dim, shape.value_dim, shape.vocabulary, shape.context) == (4, 4, 32, 2048)
    assert entry.has_chat_template and not entry.vision and not entry.problem and not entry.custom_code
    assert entry.modified == (tmp_path / "m" / "model.safetensors").stat().st_mtime
    assert recognise_model(tmp_path / "m" / "model.safetensors") == entry
    assert recognise_model(tmp_path) is None and recognise_model(tmp_path / "nowhere") is None


def test_shards_follow_the_index(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", 3)
    entry = model(folder)
    assert [Path(f).name for f in entry.files] == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert entry.parameters == 3 * 256 and not entry.problem
    (folder / "model-00002-of-00003.safetensors").unlink()
    entry = model(folder)
    assert "1 of its 3 parts are missing" in entry.problem and "model-00002" in entry.problem
    (folder / "model.safetensors.index.json").unlink()
    assert "1 of its 3 parts" in model(folder).problem


@pytest.mark.attack
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..\\x", "C:x", "sub/x.safetensors", "", ".hidden", "a\0b"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b" / "m"
    write_json(folder / "config.json", LLAMA_CONFIG)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": name}})
    (tmp_path / "a" / "x").write_bytes(safetensors_bytes(LLAMA_TENSORS))
    entry = model(folder)
    assert "not a file of this folder" in entry.problem and entry.files == ()


@pytest.mark.attack
@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": 5}', b"\xff", b'{"weight_map":' + b"[" * 9999])
def test_a_broken_index_is_said(tmp_path: Path, content: bytes) -> None:
    write_json(tmp_path / "config.json", LLAMA_CONFIG)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    assert "cannot be read" in model(tmp_path).problem


@pytest.mark.fault
def test_damaged_folders_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    assert "10 bytes are missing" in model(folder).problem
    (folder / "model.safetensors").write_bytes(b"")
    assert "0 bytes" in model(folder).problem
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{")
    assert "config.json" in model(folder).problem
    assert model(folder).parameters == 784  # the header still counts


def test_bin_folders(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**LLAMA_CONFIG, "torch_dtype": "float32"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK" + b"\0" * 3998)
    (tmp_path / "training_args.bin").write_bytes(b"\0" * 9000)
    entry = model(tmp_path)
    assert (entry.format, entry.quantization, entry.parameters) == (ModelFormat.TORCH_BIN, "F32", 1000)
    assert [Path(f).name for f in entry.files] == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(LLAMA_TENSORS))
    assert model(tmp_path).format is ModelFormat.SAFETENSORS  # where both are, the safe one


PACKED = "model.layers.0.self_attn.q_proj"
GPTQ = {
    f"{PACKED}.qweight": ("I32", (32, 512)),  # 4-bit: 256 rows
    f"{PACKED}.qzeros": ("I32", (2, 64)),
    f"{PACKED}.scales": ("F16", (2, 512)),
    f"{PACKED}.g_idx": ("I32", (256,)),
    "model.norm.weight": ("F16", (512,)),
}
AWQ = {
    f"{PACKED}.qweight": ("I32", (256, 64)),
    f"{PACKED}.qzeros": ("I32", (2, 64)),
    f"{PACKED}.scales": ("F16", (2, 512)),
    "model.norm.weight": ("F16", (512,)),
}
EXL2 = {
    f"{PACKED}.q_weight": ("I32", (32, 512)),
    f"{PACKED}.q_scale": ("I32", (2, 64)),
    f"{PACKED}.q_scale_max": ("F16", (2,)),
    f"{PACKED}.q_groups": ("I16", (4,)),
    f"{PACKED}.q_invperm": ("I16", (256,)),
    "model.norm.weight": ("F16", (512,)),
}
EXL3 = {
    f"{PACKED}.trellis": ("I16", (16, 32, 64)),
    f"{PACKED}.suh": ("F16", (256,)),
    f"{PACKED}.svh": ("F16", (512,)),
    "model.norm.weight": ("F16", (512,)),
}
HQQ = {
    f"{PACKED}.W_q": ("U8", (128, 512)),
    f"{PACKED}.scale": ("F16", (2048, 1)),
    f"{PACKED}.zero": ("F16", (2048, 1)),
    "model.norm.weight": ("F16", (512,)),
}
BNB4 = {
    f"{PACKED}.weight": ("U8", (65536, 1)),
    f"{PACKED}.weight.absmax": ("U8", (2048,)),
    f"{PACKED}.weight.quant_map": ("F32", (16,)),
    f"{PACKED}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    "model.norm.weight": ("F16", (512,)),
}
BNB8 = {f"{PACKED}.weight": ("I8", (512, 256)), f"{PACKED}.SCB": ("F32", (512,)), "model.norm.weight": ("F16", (512,))}
PARAMETERS = 256 * 512 + 512


@pytest.mark.parametrize(
    ("tensors", "quantization", "format_", "label"),
    [
        (GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": 128}, ModelFormat.GPTQ, "4-bit, group 128"),
        (GPTQ, None, ModelFormat.GPTQ, "4-bit, group 128"),
        (AWQ, {"quant_method": "awq", "bits": 4, "group_size": 128}, ModelFormat.AWQ, "4-bit, group 128"),
        (AWQ, None, ModelFormat.AWQ, "4-bit, group 128"),
        (EXL2, {"quant_method": "exl2", "bits": 4.25}, ModelFormat.EXL2, "4.25 bpw"),
        (EXL2, None, ModelFormat.EXL2, "4 bpw"),
        (EXL3, {"quant_method": "exl3", "bits": 4.0}, ModelFormat.EXL3, "4 bpw"),
        (EXL3, None, ModelFormat.EXL3, "4 bpw"),
        (
            HQQ,
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
            ModelFormat.HQQ,
            "4-bit, group 64",
        ),
        (
            BNB4,
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            ModelFormat.BITSANDBYTES,
            "nf4",
        ),
        (BNB4, None, ModelFormat.BITSANDBYTES, "nf4"),
        (BNB8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, ModelFormat.BITSANDBYTES, "int8"),
        (BNB8, None, ModelFormat.BITSANDBYTES, "int8"),
    ],
)
def test_quantized_folders_with_and_without_metadata(
    tmp_path: Path, tensors: dict, quantization: dict | None, format_: ModelFormat, label: str
) -> None:
    config = {"quantization_config": quantization} if quantization else {}
    entry = model(write_folder(tmp_path / "m", tensors, config=config))
    assert (entry.format, entry.quantization, entry.parameters) == (format_, label, PARAMETERS)
    assert not entry.problem


def test_old_gptq_and_awq_metadata_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "g", GPTQ, file="gptq_model-4bit-128g.safetensors")
    write_json(folder / "quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False})
    assert (model(folder).format, model(folder).quantization) == (ModelFormat.GPTQ, "4-bit, group 128")
    folder = write_folder(tmp_path / "a", AWQ)
    write_json(folder / "quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
    assert (model(folder).format, model(folder).quantization) == (ModelFormat.AWQ, "4-bit, group 128")


def test_other_quantizations_are_named(tmp_path: Path) -> None:
    tensors = {f"{PACKED}.weight": ("F8_E4M3", (512, 256)), f"{PACKED}.weight_scale_inv": ("F32", (4, 2))}
    entry = model(write_folder(tmp_path / "m", tensors, config={"quantization_config": {"quant_method": "fp8"}}))
    assert (entry.format, entry.quantization, entry.parameters) == (ModelFormat.OTHER, "fp8", 512 * 256)


def test_models_that_see_and_models_in_parts(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"hidden_size": 99},
        "text_config": {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 7},
    }
    entry = model(write_folder(tmp_path / "m", config=config))
    assert entry.vision and not entry.problem
    assert (entry.model_type, entry.shape.hidden, entry.shape.layers) == ("qwen2", 64, 7)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "does not write text"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_models_of_another_kind_say_so(tmp_path: Path, config: dict, words: str) -> None:
    assert words in model(write_folder(tmp_path / "m", config=config)).problem


@pytest.mark.attack
def test_custom_code_is_listed_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "user/repo--configuration_evil.Config"}
    folder = write_folder(tmp_path / "m", config={"auto_map": auto_map})
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Tok"]}})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    assert model(folder).custom_code == ("modeling_evil.py", "user/repo--configuration_evil.py", "tokenization_evil.py")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": '{"chat_template": null}'}, False),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}'}, True),
        ({"chat_template.jinja": "x"}, True),
        ({"chat_template.json": "{}"}, True),
        ({}, False),
    ],
)
def test_chat_templates_in_all_their_places(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    folder = write_folder(tmp_path / "m", template=False)
    for name, text in files.items():
        (folder / name).write_text(text)
    assert model(folder).has_chat_template is expected


@pytest.mark.attack
@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": -5, "num_hidden_layers": "many", "vocab_size": 2**200, "num_attention_heads": 0},
        {"hidden_size": [1, {"a": []}], "architectures": 5, "quantization_config": [1]},
        {"quantization_config": {"bits": "x", "quant_method": 5}, "text_config": [], "auto_map": "x"},
        {
            "quantization_config": {"bits": 1e308, "group_size": -1, "quant_method": "gptq"},
            "expansion_ratio": float("nan"),
        },
    ],
)
def test_nonsense_configs_do_no_harm(tmp_path: Path, config: dict) -> None:
    entry = model(write_folder(tmp_path / "m", config=config))
    assert entry.parameters > 0 and all(0 <= value < 2**45 for value in _numbers(entry.shape))


def _numbers(shape: object) -> list[int]:
    return [getattr(shape, name) for name in shape.__struct_fields__]  # type: ignore[attr-defined]


# GGUF -------------------------------------------------------------------------------------------


def test_a_gguf_tells_everything(tmp_path: Path) -> None:
    entry = model(write_gguf_model(tmp_path / "Tiny-Q4_K_M.gguf"))
    assert (entry.name, entry.format, entry.quantization) == ("Tiny-Q4_K_M", ModelFormat.GGUF, "Q4_K_M")
    assert (entry.architecture, entry.parameters) == ("llama", 256 * 768 + 256)
    assert entry.weight_bytes == 768 * 144 + 1024
    assert (entry.shape.layers, entry.shape.kv_heads, entry.shape.head_dim, entry.shape.context) == (2, 2, 32, 4096)
    assert entry.shape.vocabulary == 3 and entry.has_chat_template and not entry.problem


def test_quantization_from_tensors_when_the_file_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    metadata = {"general.architecture": "llama"}
    path.write_bytes(gguf_bytes(metadata, [("a", (256, 100), 14), ("b", (256,), 0)]))
    assert model(path).quantization == "Q6_K"
    path.write_bytes(gguf_bytes({**metadata, "general.file_type": 1024 + 7}, [("a", (256, 100), 12)]))
    assert model(path).quantization == "Q4_K"


def test_a_split_set_is_one_entry(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        write_gguf_model(tmp_path / f"Big-{part:05}-of-00003.gguf")
    entry = model(tmp_path / "Big-00002-of-00003.gguf")
    assert (entry.name, len(entry.files), entry.path) == ("Big", 3, str(tmp_path / "Big-00001-of-00003.gguf"))
    assert entry.parameters == 3 * (256 * 768 + 256) and not entry.problem
    assert model(tmp_path).name == "Big"
    (tmp_path / "Big-00003-of-00003.gguf").unlink()
    assert "Part 3 of 3 is missing" in model(tmp_path / "Big-00001-of-00003.gguf").problem
    write_gguf_model(tmp_path / "Huge-00001-of-99999.gguf")
    assert model(tmp_path / "Huge-00001-of-99999.gguf").name  # a count that nobody believes costs nothing
    for odd in ("odd-00007-of-00002.gguf", "odd-00000-of-00000.gguf"):
        assert model(write_gguf_model(tmp_path / odd[:-5] / odd).parent).files


def projector(path: Path, width: int) -> Path:
    metadata = {"general.architecture": "clip", "general.type": "mmproj", "clip.vision.projection_dim": 768}
    path.write_bytes(gguf_bytes(metadata, [("mm.2.weight", (1024, width), 1)]))
    return path


def test_a_projector_beside_a_model_gives_it_eyes(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "llava-7b-Q4_K_M.gguf")
    assert not model(path).vision
    assert recognise_model(projector(tmp_path / "mmproj-f32.gguf", 256)) is None
    projector(tmp_path / "mmproj-f16.gguf", 256)
    assert model(path).vision and model(path).mmproj == str(tmp_path / "mmproj-f16.gguf")


def test_a_projector_of_another_model_is_left_alone(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "llava-7b-Q4_K_M.gguf")
    projector(tmp_path / "mmproj-f16.gguf", 4096)  # too wide
    projector(tmp_path / "qwen-vl-mmproj-f16.gguf", 256)  # named after another
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    assert not model(path).vision
    projector(tmp_path / "llava-mmproj-bf16.gguf", 256)
    assert model(path).mmproj.endswith("llava-mmproj-bf16.gguf")


@pytest.mark.fault
def test_damaged_ggufs_are_listed_with_the_reason(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "x.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:-500])
    entry = model(path)
    assert "truncated" in entry.problem and entry.architecture == "llama" and entry.shape.layers == 2
    path.write_bytes(data[:300])
    assert "truncated" in model(path).problem
    path.write_bytes(b"<html>not found</html>")
    assert "does not begin with GGUF" in model(path).problem
    path.write_bytes(
        gguf_bytes({"general.architecture": "llama"}, [("a", (256,), 0)]).replace(
            b"a\1\0\0\0\0\1\0\0\0\0\0\0\0\0\0\0", b"a\1\0\0\0\0\1\0\0\0\0\0\0\x63\0\0\0"
        )
    )
    assert "tensor type 99" in model(path).problem


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "kind"),
    [({}, "LoRA"), ({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "rsLoRA"), ({"peft_type": "LOHA"}, "LoHa")],
)
def test_peft_folders(tmp_path: Path, more: dict, kind: str) -> None:
    entry = adapter(write_peft(tmp_path / "a", rank=8, rank_pattern={"q_proj": 32}, **more))
    assert (entry.format, entry.kind, entry.base) == (AdapterFormat.PEFT, kind, "user/base")
    assert (entry.rank, entry.alpha, entry.targets) == (32, 16.0, ("q_proj", "v_proj"))
    assert not entry.problem and entry.bytes > 0
    assert recognise_adapter(tmp_path / "a" / "adapter_model.safetensors") == entry


def test_targets_given_as_a_pattern_come_from_the_tensors(tmp_path: Path) -> None:
    assert adapter(write_peft(tmp_path / "a", target_modules=".*proj")).targets == ("q_proj", "v_proj")


@pytest.mark.fault
def test_damaged_adapters_say_so(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "3 bytes are missing" in adapter(folder).problem
    weights.unlink()
    assert "missing" in adapter(folder).problem
    (folder / "adapter_config.json").write_text("[")
    assert "adapter_config.json" in adapter(folder).problem


def test_lone_files(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(safetensors_bytes(lora_tensors(8), {"lora_alpha": "32", "base_model": "user/base"}))
    entry = adapter(path)
    assert (entry.format, entry.name, entry.kind) == (AdapterFormat.SAFETENSORS, "style", "LoRA")
    assert (entry.rank, entry.alpha, entry.base, entry.targets) == (8, 32.0, "user/base", ("q_proj", "v_proj"))
    magnitudes = {"base_model.model.x.q_proj.lora_magnitude_vector": ("F32", (16,)), **lora_tensors(4)}
    path.write_bytes(safetensors_bytes(magnitudes))
    assert adapter(path).kind == "DoRA"
    for tensors in (LLAMA_TENSORS, {"lora_unet_down_blocks_0.lora_down.weight": ("F16", (4, 16))}):
        path.write_bytes(safetensors_bytes(tensors))
        assert recognise_adapter(path) is None


def test_a_lone_pickled_adapter_is_known_by_its_names(tmp_path: Path) -> None:
    import pickle
    import zipfile

    path = tmp_path / "adapter.bin"
    names = dict.fromkeys(lora_tensors(4), 0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter/data.pkl", pickle.dumps(names, 2))
    entry = adapter(path)
    assert (entry.format, entry.targets) == (AdapterFormat.TORCH_BIN, ("q_proj", "v_proj"))
    path.write_bytes(pickle.dumps({"model.layers.0.weight": 0}, 2))
    assert recognise_adapter(path) is None


def test_gguf_adapters(tmp_path: Path) -> None:
    entry = adapter(write_gguf_adapter(tmp_path / "a.gguf", rank=4))
    assert (entry.format, entry.rank, entry.alpha, entry.base) == (AdapterFormat.GGUF, 4, 8.0, "user/base")
    assert entry.targets == ("attn_q",) and not entry.problem
    assert recognise_model(tmp_path / "a.gguf") is None
    assert recognise_adapter(write_gguf_model(tmp_path / "m.gguf")) is None


@pytest.mark.attack
@pytest.mark.parametrize(
    ("tensors", "alpha", "words"),
    [
        ([("blk.0.attn_q.weight.lora_a", (256, 4), 0), ("blk.0.attn_q.weight.lora_b", (4, 256), 0)], 8, "alpha"),
        ([("blk.0.attn_q.weight.lora_a", (256, 4), 0), ("blk.0.attn_q.weight.lora_b", (8, 256), 0)], 8.0, "ranks"),
        (
            [("blk.0.attn_q.weight.lora_a", (256, 4, 2), 0), ("blk.0.attn_q.weight.lora_b", (4, 256), 0)],
            8.0,
            "3 dimensions",
        ),
        ([("blk.0.attn_q.weight.lora_a", (256, 4), 24), ("blk.0.attn_q.weight.lora_b", (4, 256), 24)], 8.0, "I8"),
        ([("blk.0.attn_q.weight.lora_a", (256, 4), 28), ("blk.0.attn_q.weight.lora_b", (4, 256), 28)], 8.0, "F64"),
        ([("token_embd.weight.lora_a", (4, 256), 0), ("token_embd.weight.lora_b", (8, 256), 0)], 8.0, "ranks"),
        ([("blk.0.attn_q.weight.lora_a", (256, 4), 0)], 8.0, "only one"),
        ([("blk.0.attn_q.weight", (256, 4), 0)], 8.0, "no LoRA tensors"),
    ],
)
def test_adapters_that_would_crash_llama_cpp_are_refused(
    tmp_path: Path, tensors: list, alpha: object, words: str
) -> None:
    path = tmp_path / "a.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    path.write_bytes(gguf_bytes(metadata, tensors))
    assert words in adapter(path).problem


# What ships -------------------------------------------------------------------------------------


def test_the_starter_is_recognised() -> None:
    folder = resources() / "starter"
    if not (folder / "model" / "config.json").exists():
        pytest.skip("resources/starter/model has not been made yet")
    entry = model(folder / "model")
    assert entry.format is ModelFormat.SAFETENSORS and entry.has_chat_template and not entry.problem
    config = json.loads((folder / "model" / "config.json").read_text())
    assert entry.shape.vocabulary == config["vocab_size"]
    for path in folder.glob("*.gguf"):
        found = recognise_model(path) or recognise_adapter(path)
        assert found is not None and not found.problem


def test_names_with_every_kind_of_letter(tmp_path: Path) -> None:
    for name in ("模型 ünïcode", "x" * 250, "a'b\"c;d", "with\nbreak", "CON", "-dash"):
        folder = write_folder(tmp_path / name)
        assert model(folder).name == name
        shutil.rmtree(folder)


def test_an_adapter_of_a_changed_base_says_so_in_the_list(tmp_path: Path) -> None:
    entry = adapter(write_peft(tmp_path / "p", init_lora_weights="pissa_niter_4"))
    assert "pissa_niter_4" in entry.problem and "converted" in entry.problem
    assert not adapter(write_peft(tmp_path / "q", init_lora_weights=True)).problem


def test_mlx_adapters_are_recognised_with_their_rank_and_scale(tmp_path: Path) -> None:
    names = {
        "model.layers.0.mlp.up_proj.lora_a": ("F32", (16, 6)),
        "model.layers.0.mlp.up_proj.lora_b": ("F32", (6, 48)),
    }
    (tmp_path / "adapters.safetensors").write_bytes(safetensors_bytes(names))
    parameters = {"rank": 6, "scale": 20.0, "dropout": 0.0}
    write_json(
        tmp_path / "adapter_config.json", {"fine_tune_type": "dora", "model": "mlx/base", "lora_parameters": parameters}
    )
    entry = adapter(tmp_path)
    assert (entry.rank, entry.alpha, entry.base, entry.kind) == (6, 120.0, "mlx/base", "DoRA")
    assert entry.targets == ("up_proj",) and not entry.problem and not entry.needs_alpha
    assert [Path(f).name for f in entry.files] == ["adapters.safetensors"]


def test_what_does_not_say_alpha_is_marked(tmp_path: Path) -> None:
    assert not adapter(write_peft(tmp_path / "said")).needs_alpha
    assert adapter(write_peft(tmp_path / "unsaid", lora_alpha=None)).needs_alpha
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(safetensors_bytes(lora_tensors()))
    assert adapter(lone).needs_alpha
    lone.write_bytes(safetensors_bytes(lora_tensors(), {"lora_alpha": "8"}))
    assert not adapter(lone).needs_alpha
