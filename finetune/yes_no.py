"""Pointwise training: will this user like this item? The loss is on the label token alone.

    python finetune/yes_no.py --data data/mine --out runs/mine-yes-no
    python finetune/yes_no.py --config finetune/configs/yes_no.yaml --data data/mine --out runs/mine-yes-no \
        --negatives '[unexposed, hard]'
    python finetune/yes_no.py --examples train.json --valid-examples valid.json --max-rows 256 --out runs/tallrec

The last form takes examples in TALLRec's format in place of a dataset.
"""

from penchant.cli.recipe import program

if __name__ == "__main__":
    program("yes_no")
