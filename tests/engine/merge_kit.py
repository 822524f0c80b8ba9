"""What the merge's tests share: bases on disk, PEFT's own merge as the reference, and our stream read back."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tqdm
import transformers
from safetensors.torch import load_file

from app.adapters.merge_files import TORCH_NAMES
from app.adapters.merge_stream_torch import Merge
from app.core.merge_plan import MergePlan
from app.core.stack import AdapterStack, StackedAdapter
from tests.engine.adapter_kit import random_adapter, random_model

tqdm.tqdm.monitor_interval = 0  # its thread would outlive a slow test
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Report:
    """A report that remembers what it was told."""

    def __init__(self) -> None:
        self.cancelled = False
        self.phases: list[tuple[str, float, float, str]] = []
        self.logged: list[str] = []
        self.stop: Any = None
        self.adjust: Any = None

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        self.phases.append((phase, done, total, unit))

    def log(self, level: str, text: str) -> None:
        self.logged.append(f"{level}: {text}")

    def on_cancel(self, callback: Any) -> None:
        self.stop = callback

    def on_adjust(self, callback: Any) -> None:
        self.adjust = callback

    def tokens(self, text: str, count: int, row: int = 0) -> None: ...
    def loaded(self, event: Any) -> None: ...
    def metric(self, step: int, values: Any) -> None: ...
    def news(self, json: str) -> None: ...


def make_base(folder: Path, family: str, seed: int, dtype: str = "float32", shard: str = "5GB", **changes: Any) -> Any:
    """Write a random model; returns it as it was loaded again from there."""
    model = random_model(family, seed, **changes).to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.save_pretrained(folder, max_shard_size=shard)
    return load(folder, dtype)


def load(folder: Path, dtype: str = "float32") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def make_adapter(folder: Path, family: str, model: Any, seed: int, dtype: str = "float32", **settings: Any) -> Path:
    """An adapter that PEFT wrote, its tensors in `dtype`."""
    from safetensors.torch import save_file

    random_adapter(folder, family, copy.deepcopy(model).float(), seed, **settings)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.to(DTYPES[dtype]) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def peft_merge(base: Path, dtype: str, stack: Sequence[tuple[Path, float]], out: Path, shard: str = "5GB") -> Any:
    """PEFT's load, merge, save. Returns the merged model."""
    import peft

    model = load(base, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = None
        for i, (folder, _) in enumerate(stack):
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name="a0")
            else:
                wrapped.load_adapter(folder, adapter_name=f"a{i}")
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for i, (_, weight) in enumerate(stack):
                    module.set_scale(f"a{i}", weight)
        wrapped.base_model.set_adapter([f"a{i}" for i in range(len(stack))])
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(out, max_shard_size=shard)
    return merged


def plan(base: Path, stack: Sequence[tuple[Path, float]], target: Path, **more: Any) -> MergePlan:
    adapters = tuple(StackedAdapter(path=str(folder), weight=weight) for folder, weight in stack)
    return MergePlan(model=str(base), stack=AdapterStack(adapters=adapters), target=str(target), **more)


def open_stream(made: MergePlan, *, quick: bool = True) -> Merge:
    folder = Path(made.model)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return Merge(made, files, json.loads((folder / "config.json").read_text()), str(folder), quick=quick)


def streamed(made: MergePlan, *, quick: bool = True) -> dict[str, torch.Tensor]:
    """All tensors of the stream."""
    found: dict[str, torch.Tensor] = {}
    with open_stream(made, quick=quick) as merge:
        for tensor in merge.tensors:
            data = bytearray(b"".join(bytes(chunk) for chunk in tensor.chunks()))
            dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
            found[tensor.name] = torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)
    return found


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: object = "") -> None:
    assert set(ours) == set(theirs), (what, set(ours) ^ set(theirs))
    for name, tensor in theirs.items():
        mine = ours[name]
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape, (what, name)
        if not torch.equal(mine.view(torch.uint8) if mine.dim() else mine, tensor.view(torch.uint8) if tensor.dim() else tensor):  # fmt: skip
            worst = (mine.float() - tensor.float()).abs().max()
            raise AssertionError(f"{what}: {name} differs by {worst}")
