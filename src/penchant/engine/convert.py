"""GGUF weights as an ordinary Hugging Face folder, so that every tool opens them the same way.

Run as a program, because the part that fetches models may not import torch:

    python -m penchant.engine.convert MODEL.gguf OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from penchant.errors import ModelError, PenchantError
from penchant.files import read_json, staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Text on which tokenizers that differ only in how they split digits and spaces give themselves away.
_PROBE = "Toy Story (1995)\n  42 films,  é<|im_end|>"


def gguf_to_safetensors(gguf: Path, out: Path) -> None:
    """Write the GGUF file's weights, tokenizer and chat template to the folder ``out``.

    The weights are unpacked to dense bfloat16 (what 4 bits lost stays lost). ``out`` appears whole or
    not at all. Raises ModelError where the file is missing or not of a kind this conversion knows,
    StorageError where it cannot be written.
    """
    if not gguf.is_file():
        raise ModelError("no such GGUF file", where=str(gguf), remedy="check the path")
    _check_splitter(gguf)
    tokenizer = _tokenizer(gguf)
    model = _dense_model(gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with staged_folder(out) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        _make_portable(stage)
        _check_tokenizer(stage, tokenizer)


def _dense_model(gguf: Path) -> PreTrainedModel:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    # Newer releases keep the GGUF blocks packed unless told; older ones know no other way than dense.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it, save_pretrained refuses: «not serializable»
    # The loaded object still carries its quantizer; a fresh one of the same shape does not. A strict
    # load also proves that every weight was unpacked: packed blocks have other names and shapes.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    return model


def _check_splitter(gguf: Path) -> None:
    """Refuse what ``_tokenizer`` could not do right. First of all, because it needs no torch."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
        splitter = None if field is None else field.contents()
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"not a GGUF file that can be read ({error})", where=str(gguf), remedy="fetch it again"
        ) from error
    if splitter != "smollm":
        raise ModelError(
            f"its tokenizer splits text by {splitter!r} rules, and this conversion knows those of 'smollm' alone",
            where=str(gguf),
            remedy="use the model's safetensors release",
        )


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers ignores the file's tokenizer.ggml.pre: without the digit rule, two spaces before a digit tokenise in
    # another way than in the released tokenizer and in llama.cpp.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    return tokenizer


def _make_portable(folder: Path) -> None:
    """Say in the saved files what readers other than this transformers release look for."""
    config = read_json(folder / "config.json")
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config["rope_theta"] = theta  # readers that do not know rope_parameters would assume 10,000
    config.pop("_model_name_or_path", None)
    write_json(folder / "config.json", config)
    settings = read_json(folder / "tokenizer_config.json")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every release knows
    for leftover in ("is_local", "local_files_only"):  # how it was loaded here, of no concern to the next reader
        settings.pop(leftover, None)
    write_json(folder / "tokenizer_config.json", settings)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes its file for the owner alone


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import AutoTokenizer

    reopened = AutoTokenizer.from_pretrained(folder)
    same_ids = reopened.encode(_PROBE) == tokenizer.encode(_PROBE)
    if not same_ids or reopened.chat_template != tokenizer.chat_template:
        raise ModelError(
            "the saved tokenizer does not do what the GGUF file's does",
            where=str(folder),
            remedy="report this with your versions of transformers and tokenizers",
        )


def main(arguments: list[str]) -> int:
    """``GGUF OUT``: convert; 0 on success, 2 with the reason on stderr where it cannot be done."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m penchant.engine.convert GGUF OUT\n")
        return 2
    try:
        gguf_to_safetensors(Path(arguments[0]), Path(arguments[1]))
    except PenchantError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
