"""Is it the same adapter? By its tensors, whatever the files are called and whichever program's prefixes the names have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import msgspec

from app.core.adapter_file import AdapterFile
from app.core.errors import ErrorKind, WeftError
from app.core.tensor_info import TensorInfo, tensor_pieces

_CHUNK = 1 << 20
_FIT_RULES = 2  # raise it when `compatibility` answers differently: what was cached is then asked anew


class AdapterContent(msgspec.Struct, frozen=True, kw_only=True):
    """Hashes that tell adapters apart.

    Attributes:
        structure: of names, dtypes and shapes: from headers alone. Different structures are different adapters.
        tensors: of the data too.
        scales: of what each pair is multiplied by; "" when alpha is not known.
    """

    structure: str
    tensors: str
    scales: str

    def same(self, other: AdapterContent) -> bool:
        """Whether two adapters do the same: equal tensors, and scales that do not contradict each other."""
        return self.tensors == other.tensors and (not self.scales or not other.scales or self.scales == other.scales)


def structure_of(file: AdapterFile) -> str:
    """A hash of an adapter's layout; no data is read."""
    digest = hashlib.blake2b(b"gguf" if file.gguf else b"", digest_size=16)
    for key, tensor in _tensors(file):
        digest.update(f"{key}\0{tensor.type.upper()}\0{tensor.shape}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def fit_key(file: AdapterFile) -> str:
    """A hash of all that decides which models an adapter fits; for caches."""
    config = file.config
    more = (_FIT_RULES, config.layer_replication, config.tokens, file.architecture, bool(file.problems))
    return hashlib.blake2b(f"{structure_of(file)}{more}".encode(), digest_size=16).hexdigest()


def content_of(file: AdapterFile, cancelled: Callable[[], bool] = lambda: False) -> AdapterContent:
    """Hash an adapter's data; reads all of it once.

    Raises:
        WeftError: when a file cannot be read; CANCELLED.
    """
    structure = structure_of(file)
    digest = hashlib.sha256(structure.encode())
    for _, tensor in _tensors(file):
        for piece in tensor_pieces(tensor, _CHUNK):
            if cancelled():
                raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
            digest.update(piece)
    scales = [(name, lora.depth, lora.scale) for name, m in sorted(file.modules.items()) for lora in m.loras]
    told = "" if file.needs_alpha else hashlib.blake2b(repr(scales).encode(), digest_size=16).hexdigest()
    return AdapterContent(structure=structure, tensors=digest.hexdigest(), scales=told)


def _tensors(file: AdapterFile) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor under a name that says its module and its part, sorted."""
    found: dict[str, TensorInfo] = {}
    for name, module in file.modules.items():
        for lora in module.loras:
            kind = f"{name}\0{lora.depth}\0{'T' if lora.transposed else ''}{'E' if lora.embedding else ''}"
            parts = {"A": lora.a, "B": lora.b, "m": lora.magnitude, "bias": lora.bias}
            found |= {f"{kind}{part}": tensor for part, tensor in parts.items() if tensor is not None}
        found |= {f"{name}\0saved {part}": tensor for part, tensor in module.saved.items()}
        found |= {f"{name}\0{p}": t for p, t in (("base", module.base), ("tokens", module.tokens)) if t is not None}
    yield from sorted(found.items())
