"""What the arithmetic has to know of a base model's modules: their weights, whatever they are packed in, and DoRA's gains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError

_BLOCK = 32  # rows that bitsandbytes' CPU kernel takes together
_ROWS = 4096  # of a weight that are held in float32 at a time


def kind_of(module: torch.nn.Module) -> str:
    """`linear`, `conv1d` (GPT-2's, with its weight transposed), `embedding`; "" for all that is stranger."""
    name = type(module).__name__
    if name == "Conv1D":
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Linear) or name.endswith(("QuantLinear", "HQQLinear", "TorchLinear")):
        return "linear"
    return ""


def sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """(out, in) of a module; an embedding takes its vocabulary for inputs. None when it does not tell."""
    kind = kind_of(module)
    if kind == "embedding":
        return module.embedding_dim, module.num_embeddings  # type: ignore[return-value]
    if kind == "conv1d":
        return module.weight.shape[1], module.weight.shape[0]  # type: ignore[return-value,union-attr]
    if kind == "linear" and hasattr(module, "out_features"):
        return module.out_features, module.in_features  # type: ignore[return-value]
    return None


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether its weight is packed, so that only its product with something can be had directly."""
    if hasattr(module, "packed_weights"):
        return True
    weight: Any = getattr(module, "weight", None)
    return not isinstance(weight, torch.Tensor) or not weight.dtype.is_floating_point


@contextmanager
def present(module: torch.nn.Module) -> Iterator[None]:
    """Have a module's weights in memory for the block, also where accelerate keeps them elsewhere."""
    weight: Any = None if hasattr(module, "packed_weights") else getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(module, "cpu"):
            yield
    else:
        with nullcontext():
            yield


def place_of_weight(module: torch.nn.Module) -> torch.device:
    """Where its inputs are when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    if hasattr(module, "packed_weights"):
        return module.device  # type: ignore[return-value]
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """The weight, (out, in), unpacked where it is quantized; a view where it is not. Call inside `present`."""
    if hasattr(module, "packed_weights"):
        return module.unpacked()  # type: ignore[operator]
    weight: Any = module.weight
    name = type(weight).__name__
    if name == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional as functional

        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return _from_cpu_packing(weight.data, weight.quant_state)
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if name == "Int8Params":
        import bitsandbytes.functional as functional

        scales = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        return functional.int8_vectorwise_dequant(weight.data, scales)
    if not isinstance(weight, torch.Tensor) or not weight.dtype.is_floating_point:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"DoRA needs the weights of {type(module).__name__}, which are packed in a way that is not known here.",
            "Use the adapter on the 16-bit model, or without its DoRA part.",
        )
    weight = weight.detach()
    return weight.T if kind_of(module) in ("conv1d", "embedding") else weight


def _from_cpu_packing(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """A 4-bit matrix out of the order that bitsandbytes gives it for its AVX512-BF16 kernel, at the first forward.

    From then on `dequantize_4bit` reads it as noise, without a word, and bitsandbytes' own way back changes the module under the
    running model. The kernel is 6 to 13 times as fast for one token as the plain way (2048 x 2048, two threads), so it stays
    switched on, and the weight is read from its order instead: blocks of 32 rows, in which the high and low halves of a byte are
    rows 16 apart in each pair of columns; absmax is (columns / blocksize, rows) in bfloat16, which is what the kernel multiplies by.

    Returns:
        (out, in), in the dtype of the model.
    """
    rows, columns = state.shape
    scales = state.absmax.T.float()
    code = state.code.float()
    out = torch.empty(rows, columns, dtype=state.original_dtype)
    packed = packed.view(torch.uint8).reshape(rows // _BLOCK, columns // 2 * _BLOCK)
    for block in range(rows // _BLOCK):  # one at a time: the indices take eight bytes a weight
        halves = packed[block].reshape(-1, _BLOCK)
        nibbles = torch.cat([halves & 15, halves >> 4], dim=1).reshape(columns // 2, _BLOCK, 2)
        part = slice(block * _BLOCK, (block + 1) * _BLOCK)
        values = code[nibbles.transpose(0, 1).reshape(_BLOCK, columns).long()]
        out[part] = (values * scales[part].repeat_interleave(state.blocksize, dim=1)).to(out.dtype)
    return out


def dora_gain(
    module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """g = m / ‖W + s·B·A‖, a norm for each output, from the base's own weight.

    Args:
        a, b: (rank, in) and (out, rank), float32. magnitude: (out,).

    Returns:
        float32, (out,), on the CPU.
    """
    with present(module):
        weight = weight_of(module)
        wide = kind_of(module) == "embedding"  # (dim, vocabulary): take it by columns, which lie together
        b = b.to(weight.device) * scale
        a = a.to(weight.device)
        total = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        for start in range(0, weight.shape[1 if wide else 0], _ROWS):
            part = slice(start, start + _ROWS)
            if wide:
                total += (weight[:, part].float() + b @ a[:, part]).square().sum(1)
            else:
                total[part] = (weight[part].float() + b[part] @ a).square().sum(1)
        norm = total.sqrt().cpu()
    # A row of zeros has no direction: it stays what it is.
    return torch.where(norm > 0, magnitude.reshape(-1) / norm.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
