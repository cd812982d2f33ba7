"""Dense next-item training: every title of a rendered history is a target, packed to length.

    python finetune/next_item.py --data data/mine --out runs/mine-lora
    python finetune/next_item.py --config finetune/configs/next_item.yaml --data data/mine --out runs/mine-lora \
        --learning-rate 1e-3 --lora.r 32
    accelerate launch --num_processes 8 finetune/next_item.py --config finetune/configs/next_item-gpu.yaml \
        --data data/mine --out runs/mine-lora

`--dry-run` says what it would train on and cost; `--settings` lists every setting; `--resume` goes on after a stop.
What it leaves in --out is a plain peft adapter: `penchant fit data/mine --ranker runs/mine-lora --out runs/mine`. Each
of many processes needs a pack of a step (`packs_per_step`).
"""

from penchant.cli.recipe import program

if __name__ == "__main__":
    program("next_item")
