"""Encoders of a scoring worker: a function that is named, and imported where it works."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from data.config import ScoreConfig
from gigagan.common.settings import SettingsError


class EncoderFactory:
    """`MODULE:FUNCTION` with a config: makes the encoders of a worker, also in another process."""

    def __init__(self, place: str, config: ScoreConfig) -> None:
        self.place, self.config = place, config

    def __call__(self, worker: int) -> Any:
        """The encoders of the worker with this number."""
        return self.function()(self.config, worker)

    def function(self) -> Callable[[ScoreConfig, int], Any]:
        """What `place` names.

        Raises:
            SettingsError: there is no such module or function.
        """
        module_name, sign, name = self.place.partition(":")
        if not sign or not module_name or not name:
            raise SettingsError(f"--encoders {self.place}: write MODULE:FUNCTION")
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise SettingsError(
                f"--encoders {self.place} cannot be imported ({error}): name a function "
                "f(config: ScoreConfig, worker: int) that returns encoders, in a module on the "
                "Python path"
            ) from error
        if not callable(found):
            raise SettingsError(f"--encoders {self.place} is {found!r}, not a function")
        return found
