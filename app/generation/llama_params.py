"""Options as a llama_context_params."""

from __future__ import annotations

from typing import Any

from app.generation.llama_model import LlamaModel
from app.generation.llama_options import Options
from app.generation.llama_rules import rope_base, rope_scale

SCORE_ROWS = 128  # tokens whose logits are taken at a time when a text is scored
LARGEST_ROWS = 32 * 2**20  # bytes of logits that this may take, so that a vocabulary of 150,000 does not cost 80 MiB


def score_rows(vocabulary: int, batch: int) -> int:
    """Rows of logits to take at a time: 128, fewer for large vocabularies and small batches."""
    return max(1, min(SCORE_ROWS, batch, LARGEST_ROWS // (4 * max(1, vocabulary))))


def context_params(library: Any, model: LlamaModel, options: Options, *, context: int, cores: int) -> Any:
    """The parameters of a context with one sequence.

    Args:
        context: tokens, 0 for what the model was trained for. cores: threads where the options leave them open.
    """
    shape = model.shape
    params = library.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = options.n_batch
    params.n_ubatch = options.ubatch
    params.n_seq_max = 1
    # Room for logits is taken for as many tokens as ever have them at once. The default, a whole batch, would be
    # 300 MB for a vocabulary of 150,000.
    params.n_outputs_max = score_rows(shape.vocabulary, options.n_batch)
    params.n_threads = options.threads or cores
    params.n_threads_batch = options.threads_batch or options.threads or cores
    params.flash_attn_type = {
        "auto": library.LLAMA_FLASH_ATTN_TYPE_AUTO,
        "on": library.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": library.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[options.flash_attention]
    if options.flash_attention == "auto" and options.cache_type_v not in ("f32", "f16", "bf16"):
        params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = getattr(library, f"GGML_TYPE_{options.cache_type_k.upper()}", _BF16)
    params.type_v = getattr(library, f"GGML_TYPE_{options.cache_type_v.upper()}", _BF16)
    params.offload_kqv = options.offload_kqv and not options.cpu
    params.op_offload = options.op_offload and not options.cpu
    params.swa_full = options.swa_full
    _fill_rope(library, params, model, options)
    return params


_BF16 = 30  # GGML_TYPE_BF16, which llama-cpp-python forgets to name


def _fill_rope(library: Any, params: Any, model: LlamaModel, options: Options) -> None:
    params.rope_freq_base = rope_base(options, model.number("rope.freq_base"), model.shape)
    params.rope_freq_scale = rope_scale(options)
    if options.rope_scaling != "auto":
        params.rope_scaling_type = getattr(library, f"LLAMA_ROPE_SCALING_TYPE_{options.rope_scaling.upper()}")
    elif params.rope_freq_scale:
        params.rope_scaling_type = library.LLAMA_ROPE_SCALING_TYPE_LINEAR
    params.yarn_orig_ctx = options.yarn_orig_ctx or 0
    for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
        value = getattr(options, name)
        if value is not None:
            setattr(params, name, value)
