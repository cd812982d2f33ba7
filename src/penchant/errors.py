"""Every error a user can cause: what is wrong, where, and what to do about it; and the class of our warnings.

The command line prints one of these errors as a single block and exits with code 2; anything else that
escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class PenchantError(Exception):
    """Base of the project's errors. ``what`` happened, ``where`` (file, row, column), the ``remedy``."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        parts = [what if where is None else f"{where}: {what}"]
        if remedy:
            parts.append(f"  remedy: {remedy}")
        super().__init__("\n".join(parts))


class DataError(PenchantError):
    """The user's interactions, items, or an answer asked of them, are not usable as they stand."""


class ConfigError(PenchantError):
    """An option, template or configuration is wrong."""


class ModelError(PenchantError):
    """A model, adapter or saved run cannot be loaded, or does not do what it must."""


class NotFiniteError(ModelError):
    """A score or vector of one of those asked about is not a number: the others may still be answered."""


class NotFiniteLossError(ModelError):
    """Training met a loss that is not a number; what was best before it is still good."""


class FetchError(PenchantError):
    """None of the sources of a model or dataset could be used."""


class StorageError(PenchantError):
    """Files could not be written whole: disk full, no permission, or a corrupt file found."""


class PenchantWarning(UserWarning):
    """What goes on, and is likely not what was meant; the command line shows it as one line."""
