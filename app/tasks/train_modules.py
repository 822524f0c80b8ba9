"""Which modules of a model can be trained, read from the model itself, without its weights. Needs the core environment."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from app.core.library import ModelFormat
from app.core.quantization import PACKED
from app.engine.reporting import Report
from app.training.module_names import Modules, ModulesParameters

Parameters = ModulesParameters


def run(parameters: ModulesParameters, report: Report) -> Modules:
    """Build the model on the meta device and look at its names.

    Raises:
        WeftError: what reading its config raises.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    report.progress("Reading the model")
    import torch
    import transformers

    from app.generation import hf_files, hf_load
    from app.training.methods_torch import module_names
    from app.training.speed_torch import products

    entry = parameters.model
    if entry.format is ModelFormat.GGUF:
        path = Path(entry.path)
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        stage = None
    else:
        lone = Path(entry.files[0]) if entry.format in PACKED and len(entry.files) == 1 else None
        form = "bin" if entry.format is ModelFormat.TORCH_BIN else "safetensors"
        stage = hf_files.Stage(Path(entry.path), form, lone)
        config = hf_load.read_config(stage.path, False)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    finally:
        if stage is not None:
            stage.close()
    lists = [(name, len(m)) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    name, count = max(lists, key=lambda each: each[1], default=("", 0))
    embeddings = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
    head = next((n.rpartition(".")[2] for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    experts = {
        n.split(".", n.count(".") - 2)[-1] for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n
    }
    return Modules(
        linear=module_names(model),
        embeddings=tuple(dict.fromkeys([*embeddings, *([head] if head else [])])),
        experts=tuple(sorted(experts)),
        layers=count,
        pattern=name.rpartition(".")[2],
        flops=products(),
    )
