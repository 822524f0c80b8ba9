"""Folders of GPTQ, AWQ and HQQ loaded through transformers, and 16-bit folders put onto HQQ's grid while they are loaded.

transformers' own way to these needs a library for each, fills what it does not find with random numbers, and takes for packed what the config
calls so. Here the files say which matrices are packed, and how, by their tensors' names and shapes; a quantizer of ours, registered as
transformers provides for, puts a `PackedLinear` in the place of each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from app.adapters import hqq_quantize
from app.adapters.merge_files import TORCH_NAMES
from app.adapters.packed_experts import PARTS, PackedExperts, standable
from app.adapters.packed_grid import LARGEST, Grid, awq, damaged, gptq, hqq
from app.adapters.packed_linear import PackedLinear, fits_int4
from app.adapters.packed_places import Places
from app.core.errors import ErrorKind, WeftError
from app.core.formats import JsonObject, SafetensorsTensor, read_safetensors_header

METHOD = "weft_packed"
_MARKS = {"qweight": ("qzeros", "scales", "g_idx"), "W_q": ("scale", "zero", "nbits", "axis")}
# What HQQ saves beside each matrix and the shapes tell as well.
_TOLD = r"\.(shape|group_size|packing|axis|nbits|view_as_float|unpack_view_dtype|compute_dtype|quant_scale|quant_zero|offload_meta|encoded_state_dict|stores_quant_config|channel_wise|optimize|round_zero)$"  # fmt: skip


class Stored:
    """What the weight files hold packed.

    Args:
        files: safetensors files. quantization: the config's table, or {} where nobody wrote one.

    Attributes:
        method: `gptq`, `awq` or `hqq`. parts: for each packed matrix's name its tensors, by their last name.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED.
    """

    def __init__(self, files: Iterable[Path], quantization: Mapping[str, Any]) -> None:
        tensors = {tensor.name: tensor for path in files for tensor in read_safetensors_header(path).tensors}
        self.parts: dict[str, dict[str, SafetensorsTensor]] = {}
        for name in tensors:
            stem, _, last = name.rpartition(".")
            if last in _MARKS and stem:
                found = {
                    key: tensors[f"{stem}.{key}"] for key in (last, *_MARKS[last], "bias") if f"{stem}.{key}" in tensors
                }
                self.parts[stem] = found
        method = str(quantization.get("quant_method") or "").lower()
        self.method = method if method in ("gptq", "awq", "hqq") else self._guess()
        layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "").lower()
        self.version = 2 if layout == "gptq_v2" else 1
        if layout in ("gptq_p", "marlin", "bitblas", "gemv", "gemv_fast", "llm-awq"):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The weights are saved in the layout {layout}, which only its own kernel reads.",
                "Get the model in the usual layout (GPTQ, or AWQ's gemm), or its 16-bit original.",
            )
        self._check_names(tensors)

    def _guess(self) -> str:
        for parts in self.parts.values():
            if "W_q" in parts:
                return "hqq"
            packed, scales = parts["qweight"].shape, parts["scales"].shape if "scales" in parts else ()
            return "awq" if len(packed) == 2 and len(scales) == 2 and packed[1] * 8 == scales[1] else "gptq"
        return ""

    def _check_names(self, tensors: Mapping[str, SafetensorsTensor]) -> None:
        if not self.parts:
            raise WeftError(
                ErrorKind.CORRUPT, "The config says that the weights are packed, and the files hold none that are.",
                "Download the model again.",
            )  # fmt: skip
        scaled = next((n for n in tensors if n.endswith(".scales") and n.removesuffix(".scales") not in self.parts), "")
        if scaled:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"AWQ has put scales into this model's activations ({scaled[-80:]}), which is not read here.",
                "Use the model's GPTQ or GGUF form, or its 16-bit original.",
            )
        for stem, parts in self.parts.items():
            for key, tensor in parts.items():
                if (
                    tensor.dtype not in TORCH_NAMES
                    or not 0 < math.prod(tensor.shape) < LARGEST
                    or len(tensor.shape) > 2
                ):
                    raise damaged(stem, f"its {key} is {tensor.dtype} {tensor.shape}")

    def grid(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Grid:
        """A matrix (out, in) from its tensors.

        Raises:
            WeftError: CORRUPT, UNSUPPORTED.
        """
        if "W_q" in parts:
            made = hqq(name, parts, shape)
        elif self.method == "awq":
            made = awq(name, parts, shape[1])
        else:
            made = gptq(name, parts, shape[1], version=self.version)
        if made.shape != shape:
            raise damaged(
                name, f"it is {made.shape[0]} x {made.shape[1]} in the files, {shape[0]} x {shape[1]} in the config"
            )
        return made


def table_of(config: JsonObject, folder: Path) -> dict[str, Any]:
    """The table that says how a folder is packed: in config.json, or in the file that GPTQ's or AWQ's first programs wrote beside it."""
    from app.core.formats import read_json

    text = config.get("text_config")
    for owner in (config, text if isinstance(text, dict) else {}):
        found = owner.get("quantization_config")
        if isinstance(found, dict):
            return dict(found)
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            found = read_json(folder / name)
            if method == "awq" and "version" in found:
                found = {"checkpoint_format": found["version"], **found}
            return {"quant_method": method, **found}
    return {}


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What transformers is given as `quantization_config`.

    Args:
        stored: what the files hold packed; or
        bits, group: HQQ's, to pack while loading.
        kernel: `exact`, `int4` where the processor's kernel takes a matrix, `auto` for int4 where it proves itself.
        skip: modules that stay as they are while packing.

    Attributes:
        layouts: how many matrices ended in each layout. notes: sentences worth showing.
        problem: what went wrong while packing: transformers keeps an error to itself until it has loaded the rest.
    """

    def __init__(
        self,
        stored: Stored | None = None,
        bits: int = 0,
        group: int = hqq_quantize.GROUP,
        kernel: str = "auto",
        skip: tuple[str, ...] = ("lm_head",),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.quant_method: Any = METHOD
        self.stored, self.bits, self.group, self.kernel, self.skip = stored, bits, group, kernel, skip
        self.cancelled = cancelled
        self.problem: WeftError | None = None
        self.layouts: dict[str, int] = {}
        self.notes: list[str] = []

    def __deepcopy__(self, _memory: Any) -> PackedConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}

    def layout_of(self, grid: Grid, dtype: torch.dtype) -> str:
        if self.kernel == "exact" or not fits_int4(grid, dtype):
            return "exact"
        if self.kernel == "auto" and not _kernel_is_right(grid.codes.device):
            return "exact"
        return "int4"

    def give(self, module: PackedLinear, grid: Grid) -> None:
        """Let a module keep a matrix, in the layout that suits."""
        layout = self.layout_of(grid, module.dtype)
        module.take(grid, layout)
        self.layouts[layout] = self.layouts.get(layout, 0) + 1


@functools.cache
def _kernel_is_right(device: torch.device) -> bool:
    """Whether a device's 4-bit kernel multiplies as it should, and its order can be read: tried once on a small matrix."""
    codes = (torch.arange(80 * 256, device=device) * 7919 % 16).to(torch.uint8).reshape(-1, 64)
    scale = torch.full((320, 1), 0.5, device=device)
    grid = Grid(codes, scale, scale * 14, (80, 256), 4)
    x = (torch.arange(3 * 256, device=device) * 31 % 17).reshape(3, 256).to(torch.bfloat16) - 8
    try:
        module = PackedLinear(256, 80, bias=False, dtype=torch.bfloat16)
        module.take(grid, "int4")
        with torch.no_grad():
            found, wanted = module(x).float(), x.float() @ grid.weight().T
        close = bool((found - wanted).abs().max() <= 0.01 * wanted.abs().max())
        return close and torch.equal(module.unpacked(), grid.weight())
    except (RuntimeError, NotImplementedError):
        return False


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts `PackedLinear` modules into a model before its weights come, and has them take their matrices in afterwards."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        config = self.quantization_config
        wide = dtype if isinstance(dtype, torch.dtype) else model.dtype
        if config.stored is not None:
            _place_stored(model, config.stored, wide)
        else:
            _place_empty(model, config, wide)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.quantization_config.stored is not None:
            return False
        name, _, last = param_name.rpartition(".")
        return last == "weight" and isinstance(model.get_submodule(name), _Awaiting)

    def get_quantize_ops(self) -> Any:
        return _PackWhileLoading(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.problem is not None:
            raise self.quantization_config.problem
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                if self.quantization_config.cancelled():
                    raise WeftError(ErrorKind.CANCELLED, "Loading was stopped.")
                module.finish(self.quantization_config, name)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Stored(PackedLinear):
    """A packed module whose tensors transformers fills in under the names that they have in the files."""

    def __init__(self, stored: Stored, stem: str, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._parts = {key: tensor for key, tensor in stored.parts[stem].items() if key != "bias"}
        self._stored = stored
        for key, tensor in self._parts.items():
            dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
            self.register_buffer(key, torch.empty(tensor.shape, dtype=dtype))

    def finish(self, config: PackedConfig, name: str) -> None:
        parts = {key: self._buffers[key] for key in self._parts}
        missing = [key for key, tensor in parts.items() if tensor is None or tensor.is_meta]
        if missing:
            raise damaged(name, f"its {missing[0]} was not loaded")
        grid = self._stored.grid(name, parts, (self.out_features, self.in_features))
        for key in self._parts:
            del self._buffers[key]
        del self._stored, self._parts, parts
        self.__class__ = PackedLinear
        config.give(self, grid)


class _Awaiting(PackedLinear):
    """A packed module whose matrix comes whole and is packed at once."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        matrix = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        self._parameters["weight"] = torch.nn.Parameter(matrix, requires_grad=False)

    # The plain attribute again, until the matrix has come.
    weight = property(lambda self: self._parameters["weight"], lambda self, value: None)  # type: ignore[assignment]


class _PackWhileLoading(ConversionOps):
    def __init__(self, config: PackedConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            if value.dim() != 2:
                return {name: value}
            if tuple(value.shape) == (module.in_features, module.out_features) and module.transposed:
                value = value.T
            if tuple(value.shape) != (module.out_features, module.in_features):
                return {name: value}  # transformers says that the shapes differ
            if missing_keys is not None:
                missing_keys.discard(name)
            group = math.gcd(self.config.group, module.in_features)
            del module._parameters["weight"]
            module.__class__ = PackedLinear
            try:
                self.config.give(module, hqq_quantize.quantize(value, self.config.bits, group))
            except WeftError as error:
                self.config.problem = self.config.problem or error
        return {}


def _linear(module: Any) -> tuple[int, int, bool] | None:
    """(inputs, outputs, transposed) of what a packed matrix may stand for."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1], True
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features, False
    return None


def _place_stored(model: Any, stored: Stored, dtype: torch.dtype) -> None:
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), _TOLD}
    places = _places(model, stored)
    for name, stem in places.modules.items():
        size = _linear(model.get_submodule(name))
        if size is None:
            raise _no_place(stem)
        inputs, outputs, _ = size
        bias = model.get_submodule(name).bias is not None or "bias" in stored.parts[stem]
        _put(model, name, stored, stem, (outputs, inputs), bias, dtype)
    for owner, found in places.experts.items():
        _place_experts(model, owner, found, stored, dtype)


def _places(model: Any, stored: Stored) -> Places:
    """Where what is packed belongs. All of a folder's matrices are packed by one method."""
    mark = next(key for key in _MARKS if key in next(iter(stored.parts.values())))
    places = Places(model, stored.parts, mark)
    together = [
        stem for owner, f in places.experts.items() if not standable(model.get_submodule(owner)) for stem in f.values()
    ]
    if nowhere := [*places.nowhere, *together]:
        raise _no_place(nowhere[0])
    return places


def _put(
    model: Any, name: str, stored: Stored, stem: str, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        module = _Stored(stored, stem, shape[1], shape[0], bias=bias, dtype=dtype)
    model.set_submodule(name, module)


def _place_experts(model: Any, owner: str, found: Mapping[str, str], stored: Stored, dtype: torch.dtype) -> None:
    """Experts one by one, in the place of those that transformers keeps together. Found: name to stem."""
    old = model.get_submodule(owner)
    parts = {name.rpartition(".")[2] for name in found}
    wanted = {f"{owner}.{number}.{part}" for number in range(old.num_experts) for part in parts}
    if len(parts) != 3 or not parts <= PARTS.keys():
        raise _no_place(next(iter(found.values())))
    if lacking := sorted(wanted - set(found)):
        raise damaged(lacking[0], "the files lack it")
    _, width, hidden = old.gate_up_proj.shape
    model.set_submodule(owner, PackedExperts(old, parts))
    for name, stem in found.items():
        shape = (hidden, width // 2) if PARTS[name.rpartition(".")[2]] == "down" else (width // 2, hidden)
        _put(model, name, stored, stem, shape, "bias" in stored.parts[stem], dtype)


def _no_place(stem: str) -> WeftError:
    return WeftError(
        ErrorKind.UNSUPPORTED,
        f"{stem[-100:]} is packed, and this architecture keeps it in a way that takes no packed weights"
        + (" (experts are kept together)." if "experts" in stem else "."),
        "Use the model's GGUF form, or its 16-bit original with load_in_4bit.",
    )


def _place_empty(model: Any, config: PackedConfig, dtype: torch.dtype) -> None:
    tied = {name.removesuffix(".weight") for name in getattr(model, "all_tied_weights_keys", None) or {}}
    head = model.get_output_embeddings()
    count = 0
    for name, module in list(model.named_modules()):
        size = _linear(module)
        if size is None or module is head or name in tied or name.rpartition(".")[2] in config.skip:
            continue
        inputs, outputs, transposed = size
        with torch.device("meta"):
            made = _Awaiting(inputs, outputs, bias=module.bias is not None, dtype=dtype)
            if transposed:  # as the files have it
                made._parameters["weight"] = torch.nn.Parameter(
                    torch.empty(inputs, outputs, dtype=dtype), requires_grad=False
                )
        made.transposed = transposed  # type: ignore[assignment]
        model.set_submodule(name, made)
        count += 1
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        config.notes.append("The experts of this mixture stay as they are: HQQ packs single matrices only.")
    if not count:
        config.notes.append("HQQ found no layer of this model that it can pack; it is loaded as it is.")


def is_registered() -> bool:
    """Whether transformers knows the quantizer: importing this module is what does it."""
    return METHOD in AUTO_QUANTIZER_MAPPING
