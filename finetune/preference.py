"""Preference training: the item taken against retrieved items that weren't (softmax DPO, several negatives).

    python finetune/preference.py --data data/mine --out runs/mine-preference
    python finetune/preference.py --start-from runs/mine-lora --data data/mine --out runs/mine-preference --negatives 3

A history is run once; the rivals hang behind it as branches. The reference is the model with its adapter switched off.
"""

from penchant.cli.recipe import program

if __name__ == "__main__":
    program("preference")
