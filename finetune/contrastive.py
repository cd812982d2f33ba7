"""Contrastive training: the vector of a rendered history near the next item's, far from other items' (InfoNCE).

    python finetune/contrastive.py --data data/mine --out runs/mine-vectors
    python finetune/contrastive.py --config finetune/configs/contrastive.yaml --data data/mine --out runs/mine-vectors \
        --packs-per-step 64 --temperature 0.1 --hard 8
    accelerate launch --num_processes 8 finetune/contrastive.py --data data/mine --out runs/mine-vectors

A step's packs are one batch, all its items negatives of all its pairs, over all processes too; gradient caching
keeps `packs_per_forward` packs in memory, however many there are. The vectors feed the same index as any model's:
`penchant fit data/mine --adapter runs/mine-vectors --out runs/mine`.
"""

from penchant.cli.recipe import program

if __name__ == "__main__":
    program("contrastive")
