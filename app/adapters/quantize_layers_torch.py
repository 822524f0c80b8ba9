"""The layers of a model quantized one after the other, by whichever method; those of an earlier run are gone on with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from app.adapters import calibrate_awq_torch, calibrate_gptq_torch
from app.adapters.layer_walk_torch import LayerPass
from app.adapters.pack_hqq_torch import pack
from app.adapters.quantize_model_torch import QuantizableModel
from app.adapters.quantized_folder import LayerFiles
from app.adapters.quantized_layer import LayerResult
from app.core.errors import ErrorKind, WeftError
from app.core.quantize_plan import QuantizePlan


class QuantizeLayers:
    """What is done with each layer.

    Args:
        written: the files that they go into. dtype: of the model in 16 bits.
        told: how many layers are done, in fractions of one too. check: called often; raises to stop.

    Attributes:
        done: how many an earlier run has completed.
    """

    def __init__(
        self,
        plan: QuantizePlan,
        model: QuantizableModel,
        written: LayerFiles,
        dtype: Any,
        told: Callable[[float], None],
        check: Callable[[], None],
    ) -> None:
        self._plan, self._model, self._written, self._dtype = plan, model, written, dtype
        self._told, self._check = told, check
        self.done = written.done()

    def pack(self) -> None:
        """Pack all layers by their weights alone."""
        plan, model = self._plan, self._model
        for number, (_, layer) in enumerate(model.layers):
            if not self._is_done(number):
                done = functools.partial(self._tell, number)
                made = pack(model.matrices(number), bits=plan.bits, group=plan.group_size, check=self._check, done=done)
                self._written.write(model, number, made)
            layer.to("meta")  # its memory goes
            self._told(number + 1)

    def each(self, layer: LayerPass) -> None:
        """Calibrate a layer, or go through it as an earlier run has left it."""
        number = layer.index
        kept = self._kept(number)
        if not self._is_done(number):
            self._written.write(self._model, number, self._calibrate(layer))
        elif kept is not None:
            calibrate_gptq_torch.resume(layer, self._model.matrices(number), kept, self._check)
        else:
            layer.advance(self._check)
        self._told(number + 1)

    def _kept(self, number: int) -> dict[str, Any] | None:
        """What GPTQ has made of a layer's matrices in an earlier run."""
        if self._plan.method != "gptq" or not self._is_done(number):
            return None
        try:
            return self._written.gptq_weights(self._model, number)
        except WeftError:
            self._forget(number)
            return None

    def _is_done(self, number: int) -> bool:
        if number < self.done and not self._written.is_whole(self._model, number):
            self._forget(number)
        return number < self.done

    def _forget(self, number: int) -> None:
        """A layer's file was damaged meanwhile: it is made anew, and all after it."""
        self._written.forget(number)
        self.done = 0

    def _tell(self, number: int, part: float) -> None:
        self._told(number + part)

    def _calibrate(self, layer: LayerPass) -> LayerResult:
        plan, matrices = self._plan, self._model.matrices(layer.index)
        done = functools.partial(self._tell, layer.index)
        if plan.method == "awq":
            made = calibrate_awq_torch.calibrate(
                layer, matrices, group=plan.group_size, dtype=self._dtype, check=self._check, done=done
            )
        else:
            made = calibrate_gptq_torch.calibrate(
                layer,
                matrices,
                bits=plan.bits,
                group=plan.group_size,
                by_importance=plan.desc_act,
                check=self._check,
                done=done,
            )
        for name, result in made.matrices.items():
            if not bool(result.parts["scales"].isfinite().all()) or not result.error < float("inf"):
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"{name} of layer {layer.index} came out with scales that are no numbers.",
                    "Check that the model itself answers sensibly, and calibrate on another or a longer text.",
                )
        return made
