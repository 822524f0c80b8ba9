"""Children of the merge benchmark: make a large random model, merge it our way or PEFT's. Prints one JSON line.

python merge_programs.py make FOLDER GIGABYTES | ours BASE ADAPTER TARGET | peft BASE ADAPTER TARGET
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

HIDDEN, INNER, VOCABULARY, RANK = 2048, 5632, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make(folder: Path, gigabytes: float) -> None:
    """A Llama of about so many bytes in bfloat16, and a LoRA of rank 16 on all its linear layers."""
    import torch
    from safetensors.torch import save_file

    layer_bytes = 2 * sum(o * i for o, i in LINEARS.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / layer_bytes))
    generator = torch.Generator().manual_seed(int(time.time()))

    def matrix(*shape: int) -> torch.Tensor:
        # Random bits of small numbers, made quickly: sign and mantissa random, exponent that of 0.03.
        bits = torch.randint(0, 256, shape, dtype=torch.int16, generator=generator)
        return ((bits & 0x7F) | (bits << 8 & -0x8000) | 0x3C80).view(torch.bfloat16)

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    weight_map: dict[str, str] = {}
    pairs: dict[str, torch.Tensor] = {}
    files = [f"model-{i:05d}-of-{layers + 1:05d}.safetensors" for i in range(1, layers + 2)]
    for layer in range(layers):
        start = f"model.layers.{layer}"
        tensors = {f"{start}.{name}.weight": matrix(*shape) for name, shape in LINEARS.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        save_file(tensors, base / files[layer], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, files[layer])
        for name, (out, inputs) in LINEARS.items():
            key = f"base_model.model.{start}.{name}"
            pairs[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.02
            pairs[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    outer = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    save_file(outer, base / files[-1], metadata={"format": "pt"})
    weight_map |= dict.fromkeys(outer, files[-1])
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    save_file(pairs, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": [n.rpartition(".")[2] for n in LINEARS],
        "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    print(json.dumps({"bytes": sum(p.stat().st_size for p in base.glob("*.safetensors"))}))


class Quiet:
    """A report that nobody reads."""

    cancelled = False

    def progress(self, *_: object) -> None: ...
    def tokens(self, *_: object) -> None: ...
    def loaded(self, *_: object) -> None: ...
    def metric(self, *_: object) -> None: ...
    def news(self, *_: object) -> None: ...
    def log(self, *_: object) -> None: ...
    def on_cancel(self, *_: object) -> None: ...
    def on_adjust(self, *_: object) -> None: ...


def resident(field: str) -> int:
    """Bytes of memory, now (`VmRSS`) or at most (`VmHWM`)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


def measured(work: object) -> None:
    """Run, and say how long it took and how much memory it added to what the imports had taken."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    work()  # type: ignore[operator]
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "memory": resident("VmHWM") - before, "imports": before}))


def ours(base: str, adapter: str, target: str) -> None:
    """Weft's merge, as its task runs it."""
    import app.adapters.merge_folder
    import app.adapters.merge_write_torch  # noqa: F401
    from app.core.merge_plan import MergePlan
    from app.core.stack import AdapterStack, StackedAdapter
    from app.tasks.merge import run

    plan = MergePlan(model=base, stack=AdapterStack(adapters=(StackedAdapter(path=adapter),)), target=target)
    measured(lambda: run(plan, Quiet()))


def peft(base: str, adapter: str, target: str) -> None:
    """PEFT's load, merge and save."""
    import peft
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    def work() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)

    measured(work)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "make":
        make(Path(rest[0]), float(rest[1]))
    else:
        {"ours": ours, "peft": peft}[command](*rest)
