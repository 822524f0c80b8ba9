"""The fallback: PEFT's own merge, for what streaming cannot take apart. It holds the whole model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.adapters.merge_shards import DEFAULT_SIZE
from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import MergePlan


def merge_with_peft(plan: MergePlan, stage: str, into: Path, check: Callable[[], None]) -> int:
    """Load, merge and save. Only for stacks that PEFT merges as a stack is meant: LoRA and rsLoRA, or one adapter at weight 1.

    Args:
        stage: the base as transformers may see it. into: where weight files go.
        check: raises when the merge is to stop.

    Returns:
        How many tensors the model has.

    Raises:
        WeftError: UNSUPPORTED for stacks that PEFT would merge into something else.
    """
    import peft
    import torch
    import transformers

    active = [a for a in plan.stack.adapters if a.weight]
    configs = [peft.PeftConfig.from_pretrained(a.path) for a in active]
    plain = all(
        not getattr(c, "use_dora", False) and not c.modules_to_save and not getattr(c, "trainable_token_indices", None)
        for c in configs
    )
    if not plain and not (len(active) == 1 and active[0].weight == 1):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "This model's weights lie on disk in a form that cannot be merged piece by piece, and PEFT, which would do it whole, "
            "merges such a mix of adapters into something else.",
            "Merge LoRA adapters alone, or one other adapter at weight 1.",
        )
    dtype: Any = getattr(torch, plan.dtype) if plan.dtype else "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.AutoConfig.from_pretrained(stage, local_files_only=True)
        kind = getattr(transformers, (settings.architectures or [""])[0], transformers.AutoModelForCausalLM)
        model = kind.from_pretrained(stage, dtype=dtype, local_files_only=True)
        check()
        wrapped: Any = peft.PeftModel.from_pretrained(model, active[0].path, adapter_name="a0")
        for i, adapter in enumerate(active[1:], 1):
            wrapped.load_adapter(adapter.path, adapter_name=f"a{i}")
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for i, adapter in enumerate(active):
                    module.set_scale(f"a{i}", adapter.weight)
        wrapped.base_model.set_adapter([f"a{i}" for i in range(len(active))])
        check()
        merged = wrapped.merge_and_unload()
        check()
        merged.save_pretrained(into, max_shard_size=plan.shard_size or DEFAULT_SIZE)
    return len(merged.state_dict())
