"""How each model was last loaded: the loader and, for each loader, its options."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app.core.options import OptionValue
from app.store.database import Database

Options = dict[str, OptionValue]


class ModelSettings:
    """Loader and options per model. Every method may be called from any thread; errors are `Database.execute`'s."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, model: str, loader: str | None = None) -> tuple[str | None, Options]:
        """What is remembered of a model.

        Args:
            model: a library id.
            loader: ask for this loader's options; None asks for those of the loader last chosen.

        Returns:
            The loader (None: none was chosen, take the one that suits) and its options (empty: the defaults).
            Options are as they were saved; check them with `core.options.build`, because a newer Weft may
            know others.
        """
        if loader is None:
            row = self._database.row("SELECT loader FROM model_choices WHERE model = ?", (model,))
            loader = row[0] if row else None
        if loader is None:
            return None, {}
        row = self._database.row("SELECT options FROM model_options WHERE model = ? AND loader = ?", (model, loader))
        return loader, msgspec.json.decode(row[0], type=Options) if row else {}

    def set(self, model: str, loader: str | None, options: Mapping[str, OptionValue] | None = None) -> None:
        """Remember the loader of a model, and that loader's options where they are given.

        `loader` None goes back to the loader that suits; options of the loaders tried are kept.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO model_choices (model, loader) VALUES (?, ?)"
                " ON CONFLICT (model) DO UPDATE SET loader = excluded.loader",
                (model, loader),
            )
            if loader is not None and options is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO model_options (model, loader, options) VALUES (?, ?, ?)",
                    (model, loader, msgspec.json.encode(dict(options)).decode()),
                )

    def forget(self, model: str) -> None:
        """Back to the defaults, for every loader. The permission for custom code goes too."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM model_options WHERE model = ?", (model,))
            connection.execute("DELETE FROM model_choices WHERE model = ?", (model,))

    def trusts_code(self, model: str, digest: str) -> bool:
        """Whether the user allowed exactly this custom code (a digest over its files) to run."""
        row = self._database.row("SELECT trusted_code FROM model_choices WHERE model = ?", (model,))
        return bool(digest) and row is not None and row[0] == digest

    def trust_code(self, model: str, digest: str) -> None:
        """Allow the custom code with this digest to run; "" takes the permission back."""
        self._database.execute(
            "INSERT INTO model_choices (model, trusted_code) VALUES (?, ?)"
            " ON CONFLICT (model) DO UPDATE SET trusted_code = excluded.trusted_code",
            (model, digest),
        )
