"""Tiny real models and tokenizers, made here: what the tests run instead of a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Kind = Literal["byte", "sentencepiece"]

TITLES = [
    "Heat (1995)",
    "Heat (1986)",
    "Heathers (1989)",
    "Toy Story (1995)",
    "Toy Story 2 (1999)",
    "Toy Soldiers (1991)",
    "Amélie (2001)",
    "七人の侍 (1954)",
    "Alien (1979)",
    "Aliens (1986)",
    "M (1931)",
    "Se7en (1995)",
    "Up (2009)",
    "🎬 Emoji Movie (2017)",
    "12 Angry Men (1957)",
    "2001: A Space Odyssey (1968)",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama-2's habit: the template writes the BOS itself.
BOS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _corpus() -> list[str]:
    prose = ["One user's history, in the order of time, one title a line:\n", "Answer Yes or No.\n", "a b c d e f g"]
    return ["".join(f"{title}\n" for title in TITLES) * 3, *TITLES, *prose, "-\n " * 5]


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges ')' with the newline, as Llama 3's and Qwen's do; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[\p{L}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def sentencepiece_kind() -> PreTrainedTokenizerFast:
    """A BPE of the SentencePiece kind: dummy prefix, byte fallback, and a BOS before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=70
    )
    tokenizer.train_from_iterator([line for text in _corpus() for line in text.split("\n") if line], trainer)
    # The trainer registers the byte pieces as special; in a real SentencePiece model they are ordinary pieces.
    state = tokenizer.to_str()
    import json

    data = json.loads(state)
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    wrapped.chat_template = BOS_TEMPLATE
    return wrapped


def tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    return byte_level() if kind == "byte" else sentencepiece_kind()


def save_model(
    folder: Path, kind: Kind, *, seed: int = 0, max_positions: int = 512, head: int = 8, spread: float = 0.4
) -> Path:
    """A random two-layer Llama whose distributions are far from uniform, with its tokenizer, as safetensors.

    vLLM's attention on CPU wants a ``head`` of at least 32 dimensions.
    """
    made = tokenizer(kind)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=4 * head,
        intermediate_size=8 * head,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=spread,
        tie_word_embeddings=kind == "byte",
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_adapter(base: Path, out: Path, *, seed: int = 0, spread: float = 0.5, **config: Any) -> Path:
    """A random LoRA adapter of ``base`` that changes what it says, as peft saves it; ``config`` is LoraConfig's."""
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=spread)
    model.save_pretrained(out)
    return out
