"""From [method] to a PEFT model ready to train. Imports torch and peft: only in an engine's child, inside functions.

Initialisations that change the base (PiSSA, OLoRA, CorDA, LoftQ) are done module by module: A₀ and B₀ come from PEFT (LoftQ:
from here), the base's residual is computed here from the original weight, A₀ and B₀, always the same way, so that a resumed
run which reads A₀ and B₀ from its folder rebuilds the same base bit for bit.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer

from app.adapters.repeat_torch import layer_lists, source_layers
from app.core.errors import ErrorKind, WeftError
from app.training import loftq_torch, run_file
from app.training.methods import changes_base
from app.training.run_config import MethodConfig, RunConfig
from app.training.run_model_torch import cards

ADAPTER = "default"
Batches = Callable[[], Iterator[dict[str, torch.Tensor]]]


def target_modules(method: MethodConfig) -> str | list[str]:
    """What PEFT calls target_modules: "all-linear", a regular expression, or names."""
    if method.target_regex:
        return method.target_regex
    listed = run_file.names(method.targets)
    return "all-linear" if listed == ["all-linear"] else listed


def lora_config(config: RunConfig, model: Any, token_ids: list[int]) -> peft.LoraConfig:
    """PEFT's config of the run; initialisations that need the base or data are left for `initialise`.

    Args:
        token_ids: rows of the embeddings to train.
    """
    method = config.method
    ranks = {key: int(value) for key, value in run_file.pattern(method.rank_pattern, "rank_pattern").items()}
    alphas = run_file.pattern(method.alpha_pattern, "alpha_pattern")
    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": method.r,
        "lora_alpha": whole(method.alpha),
        "lora_dropout": method.dropout,
        "target_modules": target_modules(method),
        "exclude_modules": run_file.names(method.exclude) or None,
        "rank_pattern": ranks,
        "alpha_pattern": {key: whole(value) for key, value in alphas.items()},
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "bias": method.bias,
        "lora_bias": method.lora_bias,
        "modules_to_save": run_file.names(method.modules_to_save) or None,
        "init_lora_weights": {
            "default": True,
            "gaussian": "gaussian",
            "orthogonal": "orthogonal",
            "off": False,
            "eva": "eva",
        }.get(method.init, True),
        "fan_in_fan_out": False,
    }
    if method.layers:
        # PEFT wants names here, no pattern and no "all-linear".
        if arguments["target_modules"] == "all-linear":
            arguments["target_modules"] = sorted(module_names(model))
        arguments["layers_to_transform"] = run_file.numbers(method.layers, "layers")
        arguments["layers_pattern"] = method.layers_pattern or None
    if method.target_parameters:
        arguments["target_parameters"] = run_file.names(method.target_parameters)
        if not run_file.names(method.targets) and not method.target_regex:
            arguments["target_modules"] = []
    if method.layer_replication:
        arguments["layer_replication"] = run_file.ranges(method.layer_replication, "layer_replication")
    if token_ids:
        arguments["trainable_token_indices"] = token_ids
    if method.init == "eva":
        arguments["eva_config"] = peft.EvaConfig(rho=method.eva_rho)
    return peft.LoraConfig(**arguments, **runtime(config))


def runtime(config: RunConfig) -> dict[str, Any]:
    """What PEFT's config says of this machine, and keeps in no file: `ephemeral_gpu_offload`, where there is a card to bring tensors to."""
    if not (config.method.dora and config.method.dora_offload and cards()):
        return {}
    return {"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)}


def whole(value: float) -> float | int:
    """16.0 as 16, as PEFT writes it."""
    return int(value) if value == int(value) else value


def inject(config: RunConfig, model: Any, settings: peft.LoraConfig, *, late: bool = False) -> Any:
    """The PEFT model, its adapter in float32.

    Args:
        late: create the adapter's weights without memory (EVA's low_cpu_mem_usage).

    Raises:
        WeftError: BAD_INPUT when the names match nothing; UNSUPPORTED for what PEFT cannot do on this model.
    """
    prepare_base(model, config)
    text = model.config.get_text_config(decoder=True)
    lists = layer_lists(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice; what matters is checked by `check_gradients`
            wrapped = peft.get_peft_model(model, settings, low_cpu_mem_usage=late)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        if "target module" in text.lower() or "No modules were targeted" in text:
            known = ", ".join(sorted(module_names(model)))
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"None of this model's modules is called so: {settings.target_modules}.",
                f"It has {known}.",
            ) from error
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"PEFT cannot set this adapter up on this model: {text}",
            "Choose other modules or variants.",
        ) from error
    if config.method.layer_replication:  # PEFT repeats the layers, and leaves these as they are
        order = source_layers(run_file.ranges(config.method.layer_replication, "layer_replication"))
        text.__dict__.update({key: [value[layer] for layer in order] for key, value in lists.items()})
    return wrapped


def prepare_base(model: Any, config: RunConfig) -> None:
    """Freeze the base; for checkpointing, have gradients reach the first layer."""
    model.requires_grad_(False)
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()


def module_names(model: Any) -> dict[str, int]:
    """The last names of the model's linear modules, without its output layer, and how many bear each."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            last = name.rpartition(".")[2]
            if not last.isdigit():
                found[last] = found.get(last, 0) + 1
    return found


def is_linear(module: Any) -> bool:
    """Whether PEFT can put LoRA on it as a linear module (quantized ones are subclasses or bear the name)."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ in (
        "Conv1D",
        "Linear4bit",
        "Linear8bitLt",
        "HQQLinear",
    )


def layers(model: Any) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted modules by name, in order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in getattr(module, "lora_A", {}):
            yield name, module


def initialise(
    config: RunConfig, model: Any, batches: Batches, base_files: list[Path], say: Callable[[str, float, float], None]
) -> None:
    """Give A and B their first values where PEFT needs the base or data for it. The base is left as it was.

    Args:
        model: from `inject`. batches: calibration batches, as often as asked. base_files: the base's safetensors files.
        say: phase, done, total.
    """
    init = config.method.init
    if init == "eva":
        _eva(config, model, batches)
    if init == "corda":
        _corda(config, model, batches)
    found = list(layers(model))
    for index, (name, module) in enumerate(found):
        if not decomposable(module):
            continue
        if init in ("pissa", "olora"):
            say(f"Preparing {init}", index, len(found))
            _from_base(config, module)
        elif init == "loftq":
            say("Preparing LoftQ", index, len(found))
            weight = weight_of(module)
            _, a, b = loftq_torch.decompose(
                weight, int(config.method.loftq_bits), module.r[ADAPTER], config.method.loftq_iterations
            )
            _set(module, *_shared(module, a, b))
        elif init == "loftq_replace":
            say("Preparing LoftQ", index, len(found))
            original = loftq_torch.original_weight(base_files, plain_name(name))
            a, b = loftq_torch.replace(module.get_base_layer(), original, module.r[ADAPTER])
            _set(module, *_shared(module, a, b))


def decomposable(module: LoraLayer) -> bool:
    """Whether its weight can be taken apart. Experts in one tensor cannot, nor a router smaller than the rank: these begin plain."""
    weight = getattr(module.get_base_layer(), "weight", None)
    if weight is None or experts(module) > 1:
        return False
    return weight.dim() == 2 and (is_quantized(weight) or module.r[ADAPTER] <= min(weight.shape))


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether bitsandbytes holds it packed."""
    return not weight.is_floating_point()


def experts(module: LoraLayer) -> int:
    """How many experts a module's parameter holds; 1 for everything else."""
    return int(getattr(module, "num_experts", None) or 1)


def plain_name(name: str) -> str:
    """A module's name in the base model, from its name under PEFT."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _shared(module: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with the adapter's scale taken out of both alike."""
    root = math.sqrt(module.scaling[ADAPTER])
    return a / root, b / root


def _set(module: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    # Copies: what is trained must not be the very tensor that somebody keeps as A₀.
    module.lora_A[ADAPTER].weight.data = a.to(module.lora_A[ADAPTER].weight, copy=True).contiguous()
    module.lora_B[ADAPTER].weight.data = b.to(module.lora_B[ADAPTER].weight, copy=True).contiguous()


def _from_base(config: RunConfig, module: LoraLayer) -> None:
    """PiSSA or OLoRA by PEFT's own methods, the base put back afterwards."""
    base = module.get_base_layer()
    original = base.weight.data
    base.weight.data = original.clone()
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    method = config.method
    try:
        with torch.no_grad():
            if method.init == "pissa":
                module.pissa_init(
                    ADAPTER, "pissa" if method.pissa_niter is None else f"pissa_niter_{method.pissa_niter}"
                )
            else:
                _olora(module)
    finally:
        base.weight.data = original
    first_a, first_b = module.lora_A[ADAPTER].weight.data, module.lora_B[ADAPTER].weight.data
    # One Parameter for good, in its own dtype, so that everybody who holds it sees the same.
    module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight = a, b
    _set(module, first_a, first_b)


def _olora(module: LoraLayer) -> None:
    """OLoRA; PEFT's own method takes a Conv1D's transposed weight as it lies, so that is turned for it."""
    if not getattr(module, "fan_in_fan_out", False):
        module.olora_init(ADAPTER)
        return
    rank = module.r[ADAPTER]
    q, r = torch.linalg.qr(module.get_base_layer().weight.data.float().T)
    module.lora_A[ADAPTER].weight.data = r[:rank].contiguous()
    module.lora_B[ADAPTER].weight.data = q[:, :rank].contiguous()


def _eva(config: RunConfig, model: Any, batches: Batches) -> None:
    before = len(list(layers(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # In a run of several processes the first one does this alone.
        peft.initialize_lora_eva_weights(
            model, list(batches()), show_progress_bar=False, gather_distributed_inputs=False
        )
    # EVA gives ranks of its own per module; from now on they stand in rank_pattern, and a resumed run takes them from there.
    left = [name for name, _ in layers(model)]
    if not left:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "EVA left no module with a rank above zero.",
            "Take a larger r or more calibration text.",
        )
    # PEFT shortens the names of those that are left, so that they mean those that are gone, too; and keeps some as a list.
    settings = model.peft_config[ADAPTER]
    settings.target_modules = {plain_name(name) for name in left} if len(left) < before else set(settings.target_modules)


def _corda(config: RunConfig, model: Any, batches: Batches) -> None:
    """CorDA's first A and B: W weighted by the covariance of its inputs, decomposed (Yang and others, 2024).

    PEFT's `preprocess_corda` does the same; it wants the attrs package and batches of one row, keeps all decompositions at once,
    and its base is changed on the spot.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        seen = inputs[0].detach().float()
        for row in seen.reshape(-1, *seen.shape[-2:]):
            row = row / row.max().abs().clamp_min(1e-12)
            sums[id(module)] = sums.get(id(module), 0) + row.T @ row
            counts[id(module)] = counts.get(id(module), 0) + 1

    found = [module for _, module in layers(model) if decomposable(module)]
    hooks = [module.get_base_layer().register_forward_hook(hook) for module in found]
    try:
        with torch.no_grad(), model.disable_adapter():
            model.eval()
            for batch in batches():
                model(**batch, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    for module in found:
        key = id(module.get_base_layer())
        if key not in sums:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "CorDA's calibration text did not reach every trained module.",
                "Take more calibration samples, or leave experts out.",
            )
        a, b = corda_factors(
            weight_of(module).float(), sums.pop(key) / counts[key], module.r[ADAPTER], config.method.corda_mode
        )
        _set(module, *_shared(module, a, b))


def corda_factors(
    weight: torch.Tensor, covariance: torch.Tensor, rank: int, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with B·A the part of `weight` (out, in) that matters most (ipm) or least (kpm) to inputs of that covariance."""
    damp = 0.01
    eye = torch.eye(len(covariance), device=covariance.device)
    while True:
        fixed = covariance + eye * covariance.diag().mean() * damp
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, eye) < 0.05 or damp > 1e6:
            break
        damp *= 2
    left, values, right = torch.linalg.svd(weight @ fixed, full_matrices=False)
    part = slice(0, rank) if mode == "ipm" else slice(-rank, None)
    roots = values[part].sqrt()
    return roots[:, None] * (right @ inverse)[part], left[:, part] * roots


# The base of this run --------------------------------------------------------------------------------


def first_state(model: Any) -> dict[str, torch.Tensor]:
    """A₀ and B₀ of every module, float32 on the processor, by `<module>.lora_A` and `.lora_B`."""
    found: dict[str, torch.Tensor] = {}
    for name, module in layers(model):
        found[f"{name}.lora_A"] = module.lora_A[ADAPTER].weight.detach().float().cpu().clone()
        found[f"{name}.lora_B"] = module.lora_B[ADAPTER].weight.detach().float().cpu().clone()
    return found


def set_first(model: Any, first: dict[str, torch.Tensor]) -> None:
    """Give A and B the values that `first_state` told."""
    for name, module in layers(model):
        _set(module, first[f"{name}.lora_A"], first[f"{name}.lora_B"])


def change_base(config: RunConfig, model: Any, first: dict[str, torch.Tensor]) -> None:
    """W becomes W - s·B₀A₀ (LoftQ: its quantization). The same from the same A₀, B₀ and W, bit for bit."""
    if not changes_base(config):
        return
    with torch.no_grad():
        for name, module in layers(model):
            if not decomposable(module):
                continue
            base = module.get_base_layer()
            a = first[f"{name}.lora_A"].to(base.weight.device)
            b = first[f"{name}.lora_B"].to(base.weight.device)
            if config.method.init == "loftq":
                bits, turns = int(config.method.loftq_bits), config.method.loftq_iterations
                changed, _, _ = loftq_torch.decompose(weight_of(module), bits, module.r[ADAPTER], turns)
            else:
                changed = weight_of(module).float() - module.scaling[ADAPTER] * (b @ a)
            base.weight.data = _turned(module, changed).to(base.weight.dtype).contiguous()


def weight_of(module: LoraLayer) -> torch.Tensor:
    """The base's weight as (out, in)."""
    return _turned(module, module.get_base_layer().weight.data)


def _turned(module: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if getattr(module, "fan_in_fan_out", False) else weight


def ranks_now(model: Any) -> dict[str, int]:
    """Each module's rank, by PEFT's name of it, for a rank_pattern that pins them all."""
    return {f"^{re.escape(plain_name(name))}": module.r[ADAPTER] for name, module in layers(model)}
