"""Where a model has what weight files name: by transformers' own table of how names are changed while loading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Places:
    """The names of a model's own, for those of files.

    Args:
        model: of transformers. stems: names in the files: of matrices, without what follows the module's name; or whole, of tensors.
        mark: what follows, for one tensor that each has (`qweight`); "" for whole names.

    Attributes:
        modules: a stem for each module (or parameter, for whole names) of the model that is kept as the files have it.
        experts: for each module that keeps a mixture's experts together: the stem of each, by the name that it would have there.
        nowhere: stems that the model has no such place for.
    """

    def __init__(self, model: Any, stems: Iterable[str], mark: str) -> None:
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        names = model.state_dict()
        self.modules: dict[str, str] = {}
        self.experts: dict[str, dict[str, str]] = {}
        self.nowhere: list[str] = []
        for stem in stems:
            wanted = f"{stem}.weight" if mark else stem
            key, converted = rename_source_key(wanted, renamings, converters, model.base_model_prefix, names)
            if key not in names:
                self.nowhere.append(stem)
            elif converted is None:
                if mark and not key.endswith(".weight"):
                    self.nowhere.append(stem)
                else:
                    self.modules[key.removesuffix(".weight") if mark else key] = stem
            else:
                owner = key.rpartition(".")[0]
                own, _ = rename_source_key(
                    f"{stem}.{mark}" if mark else stem, renamings, [], model.base_model_prefix, names
                )
                if mark and own.startswith(f"{owner}."):
                    self.experts.setdefault(owner, {})[own.removesuffix(f".{mark}")] = stem
                else:
                    self.nowhere.append(stem)
