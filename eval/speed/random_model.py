"""A Llama of random weights, for speed: python eval/speed/random_model.py 0.4b|1b OUT

With SmolLM2's tokenizer and 48k tokens, in bfloat16. What it says means nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from penchant.fetch import fetch

# hidden size, intermediate size, layers, heads, key-value heads; SmolLM2-360M's and Llama-3.2-1B's.
SIZES = {"0.4b": (960, 2560, 32, 15, 5), "1b": (2048, 8192, 16, 32, 8)}


def main(size: str, out: Path) -> None:
    hidden, inner, layers, heads, pairs = SIZES[size]
    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SIZES:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
