"""The adapter that training goes on from: its settings are what they are, and what is asked for must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from penchant.adapter_card import read_card
from penchant.engine.folders import resolve_adapter
from penchant.errors import ConfigError, ModelError
from penchant.files import read_json
from penchant.training.config import LoraSettings, TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def started(config: Config) -> Config:
    """The settings with ``lora`` as the adapter of ``start_from`` has it; ConfigError where another was asked for."""
    if config.start_from is None:
        return config
    has = _lora_of(resolve_adapter(config.start_from))
    asked = config.lora.model_fields_set if "lora" in config.model_fields_set else set()
    differ = [f"{name} {getattr(config.lora, name)} (it has {has[name]})" for name in sorted(asked & has.keys())
              if getattr(config.lora, name) != has[name]]  # fmt: skip
    if differ:
        raise ConfigError(
            f"asks for another adapter than start_from's: {', '.join(differ)}",
            where="lora",
            remedy="leave these settings out, or begin a new adapter",
        )
    known = {**config.lora.model_dump(), **has}
    return config.model_copy(update={"lora": LoraSettings.model_validate(known)})


def _lora_of(adapter: Path) -> dict[str, Any]:
    """What is known of an adapter's settings: by our card all of them, by peft's what it says."""
    config = (read_card(adapter) or {}).get("config")
    if isinstance(config, dict) and isinstance(config.get("lora"), dict):
        return config["lora"]
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError("has no adapter_config.json", where=str(adapter), remedy="give a peft adapter's folder")
    saved = read_json(adapter / "adapter_config.json")
    if saved.get("peft_type") != "LORA":
        raise ModelError(
            f"is no LoRA adapter but {saved.get('peft_type')!r}",
            where=str(adapter),
            remedy="start_from goes on with LoRA alone",
        )
    targets = saved.get("target_modules")
    return {
        "r": saved.get("r"),
        "alpha": saved.get("lora_alpha"),
        "dropout": saved.get("lora_dropout"),
        "rslora": saved.get("use_rslora", False),
        **({"targets": sorted(targets)} if isinstance(targets, list) else {}),
    }
