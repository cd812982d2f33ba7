"""Listwise training: retrieved candidates behind letters, and the letter of the item taken as the answer.

    python finetune/choose.py --data data/mine --out runs/mine-choose
    python finetune/choose.py --config finetune/configs/choose.yaml --data data/mine --out runs/mine-choose --letters 20

Candidates come from encoders that were trained on other users than those they retrieve for.
"""

from penchant.cli.recipe import program

if __name__ == "__main__":
    program("choose")
