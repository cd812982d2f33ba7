"""An epoch of our encoder with IDs alone against RecBole's SASRec: the same users, targets, size, loss and threads.

    python -m venv recbole && recbole/bin/pip install "recbole==1.2.1" "numpy<2" "pandas<2.3" "torch>=2.11,<2.14"
    python eval/speed/encoder_training.py --data-dir data --recbole recbole/bin/python

RecBole needs an environment of its own (it breaks on NumPy 2); files go between. Both take two epochs, the second
counts. Ours runs a history once for all its targets, RecBole every prefix of it as a row of its own. Both give the mean
cross entropy over the whole catalogue.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from penchant.cli.script import script
from penchant.environment import made_by
from penchant.evaluation.tasks import load_task, read_data, split_of
from penchant.files import write_json
from penchant.interest.config import EncoderConfig
from penchant.interest.fit import training_sequences
from penchant.interest.train import train_encoder


def main(
    recbole: Annotated[Path, typer.Option(help="The python of an environment that has RecBole.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data sets' folders.")] = None,
    task: Annotated[str, typer.Option(help="One of eval/tasks.")] = "games",
    users: Annotated[int, typer.Option(help="The first so many users; 0: all.")] = 0,
    threads: Annotated[int, typer.Option(help="Of both sides.")] = 2,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("eval/results/encoder-training.json"),
) -> None:
    """Times one after the other, never at once."""
    loaded = load_task(task)
    split = split_of(loaded, read_data(loaded, data_dir))
    log = split.log
    sequences = [s for s in training_sequences(split) if len(s) > 1]
    if users:
        sequences = sequences[:users]
    settings = {"length": 50, "blocks": 2, "heads": 2, "dim": 64, "dropout": 0.5, "threads": threads}
    targets = sum(len(s) - 1 for s in sequences)
    config = EncoderConfig(
        use_text=False,
        neighbours=0,
        max_length=50,
        blocks=2,
        heads=2,
        dim=64,
        dropout=0.5,
        epochs=2,
        patience=2,
        learning_rate=1e-3,
    )
    torch.set_num_threads(threads)
    _, epochs = train_encoder(sequences, log.n_items, None, config, lambda encoder: 0.0)
    ours = [epochs[0]["seconds"], epochs[1]["seconds"] - epochs[0]["seconds"]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sample").mkdir()
        with (Path(folder) / "sample" / "sample.inter").open("w", encoding="utf-8") as handle:
            handle.write("user_id:token\titem_id:token\ttimestamp:float\n")
            for user, sequence in enumerate(sequences):
                # RecBole holds the last two of a user out: two more stand behind what is trained on.
                held = np.append(sequence, sequence[[0, 0]])
                handle.writelines(f"{user}\t{item}\t{at}\n" for at, item in enumerate(held.tolist()))
        command = [str(recbole), str(Path(__file__).with_name("recbole_epoch.py")), folder, json.dumps(settings)]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(ended.stderr, file=sys.stderr)
        raise SystemExit(1)
    theirs = json.loads(ended.stdout.splitlines()[-1])
    found = {
        **made_by(__file__),
        **settings,
        "users": len(sequences),
        "items": log.n_items,
        "targets": targets,
        "recbole_targets": theirs["targets"],
        "recbole_items": theirs["items"] - 1,
        "seconds": {"ours": round(ours[1], 2), "recbole": round(theirs["seconds"][1], 2)},
        "first_epoch_seconds": {"ours": round(ours[0], 2), "recbole": round(theirs["seconds"][0], 2)},
        "times_as_fast_as_recbole": round(theirs["seconds"][1] / ours[1], 2),
        "recbole_version": "1.2.1",
    }
    print(found["seconds"], found["times_as_fast_as_recbole"])
    write_json(out, found)


if __name__ == "__main__":
    script(main)
