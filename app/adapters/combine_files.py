"""Adapters on disk combined into a new PEFT folder, module by module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.adapters.combine_base_torch import BaseMatrices
from app.adapters.combine_torch import Pair, Whole, combine, dora_difference
from app.adapters.peft_writer import refuse_existing, write_peft
from app.adapters.tensors_torch import OpenAdapter, open_adapter
from app.core.adapter_file import PREFIX, AdaptedModule, LoraTensors
from app.core.combine_plan import Combined, CombinePlan, uses_density, uses_rank, uses_sign
from app.core.errors import ErrorKind, WeftError
from app.core.module_names import Place, place_of
from app.core.stack import StackedAdapter

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A module's pairs, and which adapters they come from: (place, which of its parameters).
Key = tuple[Place, int]


class _Slot:
    """One low-rank pair of the new adapter, and what it is made of."""

    def __init__(self, name: str, embedding: bool) -> None:
        self.name, self.embedding = name, embedding
        self.parts: list[tuple[OpenAdapter, AdaptedModule, LoraTensors, float]] = []


def combine_adapters(
    plan: CombinePlan, progress: Callable[[int, int], None] = lambda *_: None, base: BaseMatrices | None = None
) -> Combined:
    """Combine adapters, or resize one, into the folder `plan.to`.

    Args:
        base: what `plan.base` names, opened: DoRA's differences are taken from it.

    Raises:
        WeftError: BAD_INPUT (ranks, names, a place that is taken), UNSUPPORTED (kinds that are no low-rank pairs),
            CORRUPT, HOSTILE, DISK_FULL, PERMISSION. Nothing is written then.
    """
    plan.check()
    target = Path(plan.to)
    refuse_existing(target)
    for each in plan.adapters.adapters:
        _refuse_gguf(Path(each.path))
    sources = [(open_adapter(Path(each.path)), each) for each in plan.adapters.adapters]
    for adapter, _ in sources:
        _refuse_others(adapter)
        if _is_dora(adapter):
            _require_base(adapter, plan)
    slots = _slots(sources)
    rank = plan.rank or max(lora.rank for slot in slots.values() for _, _, lora, _ in slot.parts)
    generator = torch.Generator().manual_seed(plan.seed)
    tensors: dict[str, tuple[str, Tensor, Tensor, Tensor | None]] = {}
    whole = lost = 0.0
    lowest, lowest_module = 1.0, ""
    for done, slot in enumerate(slots.values()):
        progress(done, len(slots))
        made = combine([_part(*part, base) for part in slot.parts], plan, rank, generator)
        tensors[slot.name] = ("embedding" if slot.embedding else "linear", made.a, made.b, _bias(slot))
        whole, lost = whole + made.whole, lost + made.lost
        if made.whole and 1 - made.lost / made.whole < lowest:
            lowest, lowest_module = 1 - made.lost / made.whole, slot.name
    out_rank = max(a.shape[0] for _, a, _, _ in tensors.values())
    notes = _notes(sources)
    energy = (1 - lost / whole if whole else 1.0) if uses_rank(plan.method) else 1.0 if plan.method == "cat" else None
    result = Combined(
        adapter=str(target),
        rank=out_rank,
        modules=len(tensors),
        energy=energy,
        lowest=lowest if uses_rank(plan.method) else None,
        lowest_module=lowest_module,
        notes=notes,
    )
    named = _named(tensors, out_rank, _DTYPES[plan.dtype])
    write_peft(target, _config(sources, tensors, out_rank), named, _card(plan, sources, result))
    return result


def _refuse_gguf(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} is a GGUF adapter, whose names depend on the model: it cannot be combined as it is.",
            "Convert it to PEFT first (LoRAs, Convert to PEFT; or `weft convert`), then combine that.",
        )


def _refuse_others(adapter: OpenAdapter) -> None:
    file = adapter.file
    what = ""
    if any(module.saved for module in file.modules.values()):
        what = "holds modules that were trained whole (modules_to_save)"
    elif any(module.tokens is not None for module in file.modules.values()):
        what = "holds trained tokens"
    elif file.config.target_parameters:
        what = "adapts experts as parameters, which PEFT cannot combine either"
    elif file.config.layer_replication:
        what = "repeats layers of its base"
    elif not any(module.loras for module in file.modules.values()):
        what = "holds no low-rank pairs"
    if what:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{file.path.name} {what}: it cannot be combined into a plain adapter.",
            "Use the adapters together as a stack, or merge them into their base.",
        )


def _is_dora(adapter: OpenAdapter) -> bool:
    return any(lora.magnitude is not None for module in adapter.file.modules.values() for lora in module.loras)


def _require_base(adapter: OpenAdapter, plan: CombinePlan) -> None:
    """A DoRA's difference depends on the base, and is of full rank: it can only be brought near, by its largest values."""
    if plan.base and uses_rank(plan.method):
        return
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"{adapter.file.path.name} is a DoRA, whose difference is no low-rank pair: {plan.method} cannot combine it.",
        "Say the base that it was trained on, and a method that cuts to a rank: `weft combine --method svd --base MODEL`. "
        "Exact is the stack itself, or a merge into the base.",
    )


def _slots(sources: list[tuple[OpenAdapter, StackedAdapter]]) -> dict[Key, _Slot]:
    slots: dict[Key, _Slot] = {}
    for adapter, stacked in sources:
        for module in adapter.file.modules.values():
            for lora in module.loras:
                key = (place_of(module.name), lora.depth)
                slot = slots.setdefault(key, _Slot(_depth_name(module, lora), lora.embedding))
                _refuse_shapes(slot, adapter, lora, module)
                slot.parts.append((adapter, module, lora, stacked.weight))
    return slots


def _depth_name(module: AdaptedModule, lora: LoraTensors) -> str:
    return module.name + ".base_layer" * lora.depth


def _refuse_shapes(slot: _Slot, adapter: OpenAdapter, lora: LoraTensors, module: AdaptedModule) -> None:
    for other, _, there, _ in slot.parts:
        if (there.inputs, there.outputs) != (lora.inputs, lora.outputs) or there.embedding != lora.embedding:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{adapter.file.path.name} and {other.file.path.name} are made for different models: {module.name} is"
                f" {lora.outputs}×{lora.inputs} in the one and {there.outputs}×{there.inputs} in the other.",
                "Combine adapters of the same base.",
            )


def _part(
    adapter: OpenAdapter, module: AdaptedModule, lora: LoraTensors, weight: float, base: BaseMatrices | None
) -> Pair | Whole:
    a, b = adapter.read(lora.a), adapter.read(lora.b)
    if lora.transposed:
        a, b = a.T.contiguous(), b.T.contiguous()
    assert lora.scale is not None  # open_adapter has seen to it
    pair = Pair(a, b, lora.scale, weight)
    if lora.magnitude is None:
        return pair
    assert base is not None  # _require_base has seen to it
    return Whole(dora_difference(base.matrix(module, lora), pair, adapter.read(lora.magnitude)), weight)


def _bias(slot: _Slot) -> Tensor | None:
    """What `lora_bias` adds to the module's bias, at a scale of 1."""
    total: Tensor | None = None
    for adapter, _, lora, weight in slot.parts:
        if lora.bias is not None:
            assert lora.scale is not None
            part = adapter.read(lora.bias).reshape(-1) * (lora.scale * weight)
            total = part if total is None else total + part
    return total


def _named(
    tensors: dict[str, tuple[str, Tensor, Tensor, Tensor | None]], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """PEFT's names. All modules get the same rank, with zeros, so that every program can read it without rank patterns."""
    biased = any(bias is not None for *_, bias in tensors.values())
    named: dict[str, Tensor] = {}
    for name, (kind, a, b, bias) in tensors.items():
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(dtype)
        b = torch.nn.functional.pad(b, (0, missing)).to(dtype)
        if kind == "embedding":
            named[f"{PREFIX}{name}.lora_embedding_A"], named[f"{PREFIX}{name}.lora_embedding_B"] = a, b
            continue
        named[f"{PREFIX}{name}.lora_A.weight"], named[f"{PREFIX}{name}.lora_B.weight"] = a, b
        if biased:
            named[f"{PREFIX}{name}.lora_B.bias"] = (torch.zeros(b.shape[0]) if bias is None else bias).to(dtype)
    return named


def _config(
    sources: list[tuple[OpenAdapter, StackedAdapter]],
    tensors: dict[str, tuple[str, Tensor, Tensor, Tensor | None]],
    rank: int,
) -> dict[str, Any]:
    configs = [adapter.file.config for adapter, _ in sources]
    plain = all(config.targets and not any("." in t or "*" in t for t in config.targets) for config in configs)
    tails = {target for config in configs for target in config.targets}
    covered = plain and all(any(name == t or name.endswith("." + t) for t in tails) for name in tensors)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": next((config.base for config in configs if config.base), None),
        "revision": next((config.revision for config in configs if config.revision), None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(tails) if covered else sorted(tensors),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": any(bias is not None for *_, bias in tensors.values()),
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
        "ensure_weight_tying": any(config.tied for config in configs),
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _notes(sources: list[tuple[OpenAdapter, StackedAdapter]]) -> list[str]:
    notes: list[str] = []
    bases = {adapter.file.config.base for adapter, _ in sources if adapter.file.config.base}
    if len(bases) > 1:
        notes.append(f"The adapters record different bases: {', '.join(sorted(bases))}.")
    for adapter, _ in sources:
        if adapter.file.unknown:
            notes.append(
                f"{adapter.file.path.name}: {len(adapter.file.unknown)} tensors of an unknown kind were left out."
            )
    return notes


def _card(plan: CombinePlan, sources: list[tuple[OpenAdapter, StackedAdapter]], result: Combined) -> str:
    base = next((adapter.file.config.base for adapter, _ in sources if adapter.file.config.base), "")
    head = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "tags: [lora]", "---"]
    lines = [*head, "", f"# {Path(plan.to).name}", "", f"Combined by Weft with the method `{plan.method}`.", ""]
    lines += ["| adapter | weight |", "| --- | --- |"]
    lines += [f"| {stacked.name or adapter.file.path.name} | {stacked.weight:g} |" for adapter, stacked in sources]
    lines += ["", f"- rank: {result.rank}"]
    if plan.base:
        lines.append(f"- differences of DoRA taken from: {Path(plan.base).name}")
    if uses_density(plan.method):
        lines.append(f"- density: {plan.density:g}")
    if uses_sign(plan.method):
        lines.append(f"- sign: {plan.sign}")
    if plan.method.startswith("dare"):
        lines.append(f"- seed: {plan.seed}")
    if result.energy is not None:
        lines.append(f"- energy kept: {result.energy:.4%}")
    return "\n".join(lines) + "\n"
