"""Epochs of RecBole's SASRec, timed in its own environment: the other side of encoder_training.py.

python eval/speed/recbole_epoch.py FOLDER    # FOLDER/sample/sample.inter; prints one JSON line
"""

from __future__ import annotations

import json
import sys
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed


def main() -> None:
    """Two epochs, of which the second is the warmed one."""
    settings = json.loads(sys.argv[2])
    config = Config(
        model="SASRec",
        dataset="sample",
        config_dict={
            "data_path": sys.argv[1],
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": "timestamp",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": settings["length"],
            "n_layers": settings["blocks"],
            "n_heads": settings["heads"],
            "hidden_size": settings["dim"],
            "inner_size": 4 * settings["dim"],
            "hidden_dropout_prob": settings["dropout"],
            "attn_dropout_prob": settings["dropout"],
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "train_batch_size": 2048,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
            "seed": 0,
            "reproducibility": False,
        },
    )
    init_seed(0, False)
    torch.set_num_threads(settings["threads"])
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    trainer = Trainer(config, model)
    seconds, losses = [], []
    for epoch in range(2):
        begun = time.perf_counter()
        losses.append(float(trainer._train_epoch(train, epoch)))
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"seconds": seconds, "targets": len(train.dataset), "losses": losses, "items": dataset.item_num}))


if __name__ == "__main__":
    main()
