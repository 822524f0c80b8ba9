"""GGUF files of models with adapters merged in, through llama.cpp's own converter and quantizer, in a real child."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch

from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import TYPES, ExportPlan, ExportResult
from app.core.formats import read_gguf_header
from app.core.merge_plan import MergePlan
from app.core.recognise_gguf import gguf_model
from app.core.stack import AdapterStack, StackedAdapter
from app.engine import protocol
from app.engine.client import EngineClient, EngineExit, error_of
from app.tasks.merge import check_plan
from tests import seeds
from tests.engine import tiny_models
from tests.engine.adapter_kit import FAMILIES, merged, random_adapter, random_model
from tests.engine.half_gelu import GELU, as_in_ggml
from tests.engine.llama_helpers import Bare

llama_cpp: Any = pytest.importorskip("llama_cpp")
if not (Path(sys.prefix) / "llama.cpp" / "conversion").is_dir() and not os.environ.get("WEFT_LLAMA_SOURCE"):
    pytest.skip("llama.cpp's converter is not in this environment", allow_module_level=True)

SEED = seeds.of(__name__, 1 << 30)
print(f"seed {SEED}")
TEXT = "The warp is strung, the weft goes over and under. How do I add a LoRA? Drop the folder there. 1, 2, 3.\n"


class Exporter:
    """A child that exports, again and again: what it imports it imports once."""

    def __init__(self, folder: Path) -> None:
        self.client = EngineClient(python=Path(sys.executable), backend="", log_path=folder / "export.log")
        self.client.start()
        self.progress: list[protocol.ProgressEvent] = []

    def start(self, plan: ExportPlan) -> int:
        return self.client.send(protocol.RunTask(task="export_gguf", parameters=msgspec.json.encode(plan).decode()))

    def __call__(self, plan: ExportPlan) -> ExportResult:
        command = self.start(plan)
        self.progress = []
        while True:
            event = self.client.next_event()
            if isinstance(event, EngineExit):
                raise event.error
            if isinstance(event, protocol.Failed) and event.id == command:
                raise error_of(event)
            if isinstance(event, protocol.ProgressEvent):
                self.progress.append(event)
            if isinstance(event, protocol.Done) and event.id == command:
                assert isinstance(event.result, protocol.TaskResult)
                return msgspec.json.decode(event.result.json, type=ExportResult)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    made = Exporter(tmp_path_factory.mktemp("exporter"))
    yield made
    made.client.shutdown()


pytestmark = pytest.mark.leaves_behind  # the child lives as long as this file


# Families that llama.cpp knows with a SentencePiece tokenizer only, or usually.
SENTENCEPIECE = ("gemma", "phi3", "mistral")
STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter" / "model"


def base(folder: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model with the byte tokenizer, or the starter's, saved."""
    if family in SENTENCEPIECE:
        model = random_model(family, seed, vocab_size=2048, **changes).to(dtype)
        model.save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(STARTER / name, folder)
        return model
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = tiny_models.CHATML
    # Some tokenizers add a token of their own when they are loaded again.
    model = random_model(family, seed, vocab_size=len(tokenizer) + 8, **changes).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def stack(*given: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(p), weight=w, name=p.name) for p, w in given))


def plan(tmp_path: Path, kind: str, *adapters: tuple[Path, float], name: str = "out", **more: Any) -> ExportPlan:
    return ExportPlan(
        model=str(tmp_path / "base"),
        stack=stack(*adapters),
        target=str(tmp_path / f"{name}.gguf"),
        type=kind,
        **{"pre_tokenizer": "gpt-2", **more},
    )


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits of every place, flash attention off, float32 cache."""
    found = []
    with Bare(
        path,
        context=64,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    ) as bare:
        for token in ids:
            bare.decode([token])
            found.append(np.array(bare.logits(), copy=True))
    return np.stack(found)


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    """Type and bytes by name, read by our own header reader."""
    header = read_gguf_header(path)
    data = path.read_bytes()
    return {t.name: (t.type, data[t.offset : t.offset + t.bytes]) for t in header.tensors}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_f32_export_has_the_merged_models_logits(family: str, tmp_path: Path, export: Exporter) -> None:
    tied = family in ("gemma", "cohere")
    # llama.cpp's converter writes four times the width for Phi-2, whatever its config says.
    shape = {"intermediate_size": 128} if family == "phi" else {}
    model = base(tmp_path / "base", family, SEED, tie_word_embeddings=tied, **shape)
    kinds: list[dict[str, Any]] = [{"r": 5}, {"r": 3, "use_rslora": True}]
    given = [
        (random_adapter(tmp_path / f"a{n}", family, model, SEED + n, **kind), weight)
        for (n, kind), weight in zip(enumerate(kinds), (0.8, -0.5), strict=True)
    ]
    made = export(plan(tmp_path, "f32", *given))
    ids = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        # llama.cpp looks GELU up in a table of half precision, which alone would be worth about 5e-4 of the largest logit.
        wanted = as_in_ggml(merged(model, given).double(), family)(input_ids=ids).logits[0].numpy()
    worst = np.abs(llama_logits(Path(made.file), ids[0].tolist()) - wanted).max()
    print(f"largest difference {worst:.1e} of logits up to {np.abs(wanted).max():.1f}")
    # Where an argument is rounded to the other side, the table's step shows in logits as large as adapters make them.
    assert worst < 1e-3 * (max(1.0, np.abs(wanted).max()) if family in GELU else 1.0)
    assert made.bytes == Path(made.file).stat().st_size and made.intermediate == 0
    assert not list(tmp_path.glob(".weft-*"))


def test_what_llama_cpp_cannot_load_never_gets_its_name(tmp_path: Path, export: Exporter) -> None:
    base(tmp_path / "base", "phi", SEED, intermediate_size=48)
    with pytest.raises(WeftError, match="cannot load what its converter made") as refused:
        export(plan(tmp_path, "f32"))
    assert "ffn_down" in refused.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("special", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["dora", "saved"])
def test_what_llama_cpp_has_no_adapters_for_is_merged_exactly(
    special: dict[str, Any], tmp_path: Path, export: Exporter
) -> None:
    model = base(tmp_path / "base", "llama", SEED, tie_word_embeddings=True)
    given = [(random_adapter(tmp_path / "a", "llama", model, SEED + 1, **special), 0.7)]
    made = export(plan(tmp_path, "f32", *given))
    ids = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        wanted = merged(model, given)(input_ids=ids).logits[0].double().numpy()
    assert np.abs(llama_logits(Path(made.file), ids[0].tolist()) - wanted).max() < 1e-3


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q4_0", "iq4_xs"])
def test_quantized_tensors_are_llama_cpps_own_on_the_same_file(kind: str, tmp_path: Path, export: Exporter) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512}
    base(tmp_path / "base", "llama", SEED, torch.float16, **wide)
    made = export(plan(tmp_path, kind))
    if TYPES[kind].direct and kind != "q8_0":
        assert {t for t, _ in tensors(Path(made.file)).values()} <= {0, {"f16": 1, "bf16": 30}[kind]}
        return
    source = export(plan(tmp_path, "f16", name="f16"))
    theirs = tmp_path / "theirs.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind].ftype
    assert llama_cpp.llama_model_quantize(source.file.encode(), str(theirs).encode(), ctypes.byref(parameters)) == 0
    ours, wanted = tensors(Path(made.file)), tensors(theirs)
    assert set(ours) == set(wanted)
    for name, (number, data) in wanted.items():
        assert ours[name][0] == number, name
        assert ours[name][1] == data, name
    if kind != "q8_0":
        assert made.intermediate > 0, "the 16-bit file on the way is told"


def test_an_importance_matrix_is_the_mean_of_squares_and_low_types_need_it(
    tmp_path: Path, export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.adapters.imatrix import CHUNK, measure

    wide = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
    model = base(tmp_path / "base", "llama", SEED, **wide)
    text = TEXT * 60
    (tmp_path / "text.txt").write_text(text)
    f32 = export(plan(tmp_path, "f32", name="f32"))
    found = measure(Path(f32.file), text, 2, threads=1)
    with Bare(Path(f32.file)) as bare:
        ids = bare.tokenize(text, special=False)[: 2 * CHUNK]
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def take(_module: Any, given: Any) -> None:
            x = given[0].double()
            sums[name] = sums.get(name, 0) + (x**2).reshape(-1, x.shape[-1]).sum(0)

        return take

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        for start in (0, CHUNK):
            model(input_ids=torch.tensor([ids[start : start + CHUNK]]))
    for layer in range(2):
        for ours, theirs in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            wanted = (sums[f"model.layers.{layer}.{theirs}"] / (2 * CHUNK)).numpy()
            got = found[f"blk.{layer}.{ours}.weight"]
            assert np.abs(got - wanted).max() < 2e-2 * wanted.max(), (layer, ours)

    with pytest.raises(WeftError, match="needs an importance matrix") as refused:
        export(plan(tmp_path, "iq2_xs"))
    assert refused.value.kind is ErrorKind.BAD_INPUT and "--imatrix" in refused.value.hint
    made = export(plan(tmp_path, "iq2_xs", imatrix=str(tmp_path / "text.txt"), imatrix_chunks=2))
    assert made.bytes < f32.bytes / 4
    short = tmp_path / "short.txt"
    monkeypatch.setattr("app.tasks.export_gguf._Export._convert", lambda *_: 1 / 0)  # refused before that
    for words, said in ((b"too short", "at least 512"), (TEXT.encode() * 5, "at least 512"), (b"\0" * 999, "no text")):
        short.write_bytes(words)
        for model in (str(tmp_path / "base"), f32.file):
            with pytest.raises(WeftError, match=said):
                export(msgspec.structs.replace(plan(tmp_path, "iq2_xs", name="other", imatrix=str(short)), model=model))
    assert not (tmp_path / "other.gguf").exists() and not list(tmp_path.glob(".weft-*"))


def test_template_ends_and_metadata_come_along(tmp_path: Path, export: Exporter) -> None:
    base(tmp_path / "base", "llama", SEED)
    config = tmp_path / "base" / "generation_config.json"
    own = {"do_sample": False, "top_k": 7.0, "temperature": "hot", "repetition_penalty": 1.25}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    made = export(plan(tmp_path, "f16", modelfile=True))
    entry = gguf_model(Path(made.file))
    assert entry is not None
    told = {"temperature": 0.0, "top_k": 7, "repetition_penalty": 1.25, "penalty_range": -1}
    assert entry.own_sampling.values() == told, (
        "how the model answers comes along, but for what the converter would stumble over"
    )
    header = read_gguf_header(Path(made.file))
    assert header.text("tokenizer.chat_template") == tiny_models.CHATML
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 1 and header.metadata["tokenizer.ggml.bos_token_id"] == 0
    assert header.text("general.architecture") == "llama" and header.text("general.name")
    assert Path(made.modelfile).read_text().startswith("FROM ./out.gguf\n")


def test_what_peft_merges_can_be_exported_beside_its_base(tmp_path: Path, export: Exporter) -> None:
    """The merged model is then a folder on the way, inside the base's own: nothing that a merge could be refused for."""
    model = base(tmp_path / "base", "llama", SEED)
    wrapped = peft.get_peft_model(model, peft.LoHaConfig(r=3, alpha=5, target_modules=["v_proj"], init_weights=False))
    wrapped.save_pretrained(tmp_path / "loha")
    wanted = plan(tmp_path, "f32", (tmp_path / "loha", 1.0), name="base/out")
    before = model.model.layers[0].self_attn.v_proj.base_layer.weight.detach().clone()
    made = export(wanted)
    assert any("PEFT" in note for note in made.notes)
    written = np.frombuffer(tensors(Path(made.file))["blk.0.attn_v.weight"][1], np.float32)
    merged_one = wrapped.merge_and_unload().model.layers[0].self_attn.v_proj.weight.detach()
    assert np.abs(written - merged_one.flatten().numpy()).max() < 1e-5 and (merged_one - before).abs().max() > 1e-3
    assert not [path.name for path in (tmp_path / "base").iterdir() if path.name.startswith(".")]
    with pytest.raises(WeftError, match="in the base's own folder"):
        check_plan(MergePlan(model=wanted.model, stack=wanted.stack, target=str(tmp_path / "base" / "merged")))


def test_bad_plans_are_refused_before_anything_is_written(tmp_path: Path, export: Exporter) -> None:
    base(tmp_path / "base", "llama", SEED)
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    wrong: list[tuple[ExportPlan, str]] = [
        (plan(tmp_path, "q9_z"), "no GGUF type"),
        (plan(tmp_path, "f16", name="taken"), "exists already"),
        (msgspec.structs.replace(plan(tmp_path, "f16"), target=str(tmp_path / "out.bin")), "does not end in .gguf"),
        (msgspec.structs.replace(plan(tmp_path, "f16"), model=str(tmp_path / "nowhere")), "no model"),
        (plan(tmp_path, "q4_k_m", imatrix=str(tmp_path / "nothing.txt")), "no text"),
        (plan(tmp_path, "f16", pre_tokenizer=""), "does not recognise"),
    ]
    for each, words in wrong:
        with pytest.raises(WeftError, match=words) as refused:
            export(each)
        assert refused.value.hint, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "taken.gguf"]
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"


def test_an_architecture_that_llama_cpp_does_not_know_is_refused(tmp_path: Path, export: Exporter) -> None:
    base(tmp_path / "base", "llama", SEED)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["WeavingForCausalLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeftError, match="WeavingForCausalLM") as refused:
        export(plan(tmp_path, "f16"))
    assert refused.value.kind is ErrorKind.UNSUPPORTED
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def _killed_while_writing(child: Exporter, wanted: ExportPlan, limit: float) -> bool:
    """Export, and kill the child once more than `limit` bytes are written. False when it was done before."""
    command, folder = child.start(wanted), Path(wanted.target).parent
    while True:
        event = child.client.next_event(timeout=0.0005)
        assert not isinstance(event, EngineExit | protocol.Failed), event
        if isinstance(event, protocol.Done) and event.id == command:
            return False
        # (It has the final name before the child has said so: too late to kill.)
        if any(_size(part) > limit for part in folder.glob(".weft-*/model/model.gguf")):
            os.kill(child.client.pid, signal.SIGKILL)
            return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # renamed meanwhile
        return 0


@pytest.mark.fault
def test_killed_at_random_points_it_leaves_nothing_half_and_goes_on(tmp_path: Path, export: Exporter) -> None:
    model = base(tmp_path / "base", "llama", SEED, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    given = (random_adapter(tmp_path / "a", "llama", model, SEED + 1), 1.0)
    whole = Path(export(plan(tmp_path, "f16", given, name="whole")).file).read_bytes()
    chance = random.Random(SEED)
    killed, child = 0, Exporter(tmp_path)
    for attempt in range(12):
        # On a busy machine a child may be done before anybody looks: then again, and sooner.
        limit = chance.uniform(0, 0.9 if attempt < 4 else 0.1) * len(whole)
        if _killed_while_writing(child, plan(tmp_path, "f16", given), limit):
            killed += 1
            child.client.shutdown()
            if killed == 2:
                break
            child = Exporter(tmp_path)
        else:
            assert (tmp_path / "out.gguf").read_bytes() == whole
            (tmp_path / "out.gguf").unlink()
    child.client.shutdown()
    resumed = export(plan(tmp_path, "f16", given)).resumed
    print(f"killed {killed} times, {resumed:,} of {len(whole):,} bytes were there already")
    assert killed, "no child was killed: the test proved nothing"
    assert (tmp_path / "out.gguf").read_bytes() == whole
    assert not list(tmp_path.glob(".weft-*")), "temporary files are left"


@pytest.mark.fault
@pytest.mark.slow
def test_killed_at_fifty_points_of_all_phases(tmp_path: Path) -> None:
    """Reading, converting, measuring, quantizing, naming: whenever it dies, what has the final name is whole."""
    model = base(tmp_path / "base", "llama", SEED, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    given = (random_adapter(tmp_path / "a", "llama", model, SEED + 1), 1.0)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    more = {"imatrix": str(tmp_path / "text.txt"), "imatrix_chunks": 1}
    child = Exporter(tmp_path)
    started = time.monotonic()
    whole = tensors(Path(child(plan(tmp_path, "q4_k_m", given, name="whole", **more)).file))
    lasted = time.monotonic() - started
    chance = random.Random(SEED)
    killed, tries = 0, 0
    while killed < 50 and tries < 300:  # what goes on from a kill may be done before the next one
        tries += 1
        command = child.start(plan(tmp_path, "q4_k_m", given, **more))
        deadline = time.monotonic() + chance.uniform(0, lasted)
        while time.monotonic() < deadline:
            event = child.client.next_event(timeout=0.01)
            assert not isinstance(event, EngineExit | protocol.Failed), event
            if isinstance(event, protocol.Done) and event.id == command:
                break
        else:
            os.kill(child.client.pid, signal.SIGKILL)
            killed += 1
            child.client.shutdown()
            child = Exporter(tmp_path)
        if (tmp_path / "out.gguf").exists():
            assert tensors(tmp_path / "out.gguf") == whole, f"kill {killed}"
            (tmp_path / "out.gguf").unlink()
    made = child(plan(tmp_path, "q4_k_m", given, name="last", **more))
    child.client.shutdown()
    print(f"killed {killed} times in {tries} tries")
    assert killed == 50 and tensors(Path(made.file)) == whole
    left = {p.name for p in tmp_path.glob(".weft-*")}
    assert len(left) <= 1, "one staging folder of the target that was killed last may stand, for its retry"


@pytest.mark.fault
def test_a_cancelled_export_gives_its_space_back(tmp_path: Path, export: Exporter) -> None:
    base(tmp_path / "base", "llama", SEED, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    command = export.start(plan(tmp_path, "f32"))
    while True:
        event = export.client.next_event()
        if isinstance(event, protocol.ProgressEvent) and event.phase == "Converting":
            export.client.cancel(command)
        if isinstance(event, protocol.Failed | protocol.Done) and event.id == command:
            break
    assert isinstance(event, protocol.Failed) and event.kind == "cancelled", event
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
