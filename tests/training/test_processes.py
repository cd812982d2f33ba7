"""Two processes with gloo take the steps of one: the loss is normalised by the targets of both; resumed or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.helpers import losses_of, settings, steps_of

from penchant.data.dataset import Dataset
from penchant.training.config import ContrastiveConfig, PreferenceConfig
from penchant.training.packing import Plan
from penchant.training.processes import make_accelerator
from penchant.training.recipe import Recipe
from penchant.training.recipes import cut, finetune

# One start of two processes for all: the first three on an accelerator of their caller's, the last as the program. The
# one with a quantised base is broken off behind a checkpoint and resumed.
ALL = """
import gc
import sys
from pathlib import Path
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from penchant.cli.recipe import program
from penchant.data.dataset import Dataset
from penchant.training.config import ContrastiveConfig, NextItemConfig, PreferenceConfig
from penchant.training.loop import Loop
from penchant.training.processes import make_accelerator
from penchant.training.recipes import finetune

end = Accelerator.end_training

def checked(accelerator):
    # A wrapper that outlives its group hangs now and then when it is freed.
    assert not [x for x in gc.get_objects() if isinstance(x, DistributedDataParallel)]
    end(accelerator)

Accelerator.end_training = checked
root = Path(sys.argv.pop(1))
config = PreferenceConfig.model_validate_json((root / "preference.json").read_text())
data = Dataset.load(root / "data")
accelerator = make_accelerator(config, root / "preference-2")
assert accelerator.num_processes == 2
finetune("preference", config, data, root / "preference-2", accelerator=accelerator)
config = ContrastiveConfig.model_validate_json((root / "contrastive.json").read_text())
finetune("contrastive", config, data, root / "contrastive-2", accelerator=accelerator)
config = NextItemConfig.model_validate_json((root / "quantised.json").read_text())
keep = Loop._checkpoint

def keep_and_break(loop, step, **more):
    keep(loop, step, **more)
    if step == 2:
        raise KeyboardInterrupt

Loop._checkpoint = keep_and_break
try:
    finetune("next_item", config, data, root / "quantised-2", accelerator=accelerator)
except KeyboardInterrupt:
    Loop._checkpoint = keep
else:
    raise AssertionError("it was not broken off")
finetune("next_item", config, data, root / "quantised-2", accelerator=accelerator, resume=True)
program("next_item")
"""


@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")  # a few steps need not help
def test_two_processes_take_the_steps_of_one(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """Three packs a step: one process has two of them, the other one; and rows of unequal weight and number."""
    shared = {"packs_per_step": 3, "pack_tokens": 200, "epochs": 2, "eval_users": 4, "eval_every": 3, "patience": 9}
    preference = settings(
        byte_folder, PreferenceConfig, **shared, learning_rate=2e-3, negatives=2, likelihood_weight=0.3
    )
    contrastive = settings(byte_folder, ContrastiveConfig, **shared, hard=2, targets_per_user=2)
    plain = settings(byte_folder, **shared, popularity_power=0.7)
    quantised = settings(byte_folder, **shared, quantization="nf4", checkpoint_every=2)
    toy.save(tmp_path / "data")
    (tmp_path / "quantised.json").write_text(quantised.model_dump_json())
    (tmp_path / "preference.json").write_text(preference.model_dump_json())
    (tmp_path / "contrastive.json").write_text(contrastive.model_dump_json())
    (tmp_path / "next_item.yaml").write_text(plain.model_dump_json())
    (tmp_path / "all.py").write_text(ALL)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "all.py")]
    options = ["--config", "next_item.yaml", "--data", "data", "--out", "next_item-2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PENCHANT_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line == "next_item-2"] == ["next_item-2"], "said once"
    assert done.stdout.count("best at step") == 1
    all_of_them = (
        ("preference", "preference", preference),
        ("contrastive", "contrastive", contrastive),
        ("quantised", "next_item", quantised),
        ("next_item", "next_item", plain),
    )
    for name, recipe, config in all_of_them:
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        rows = Recipe(recipe, config, cut(toy, config)).rows()
        plan = Plan(rows.lengths, pack_tokens=200, packs_per_step=3, seed=config.seed)
        assert any(len(plan.step(s)) % 2 for s in range(plan.steps_per_epoch)), "the share is uneven"
        finetune(recipe, config, toy, one, accelerator=make_accelerator(config, one))
        assert len(losses_of(one)) >= 6
        assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5), name
        for key in ("examples", "targets", "tokens"):
            assert [r[key] for r in steps_of(two)] == [r[key] for r in steps_of(one)], (name, key)
        norms = [[r["gradient_norm"] for r in steps_of(o)] for o in (one, two)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        for got, wanted in zip(steps_of(two, "validation"), steps_of(one, "validation"), strict=True):
            assert got["valid_loss"] == pytest.approx(wanted["valid_loss"], rel=1e-5)
            assert got["score"] == pytest.approx(wanted["score"], abs=1e-6)
        mine, other = (load_file(o / "adapter_model.safetensors") for o in (two, one))
        for key, value in other.items():
            # As a whole: AdamW makes a full step of the rounding where a gradient is nearly nothing.
            assert float(torch.linalg.norm(mine[key] - value)) < 1e-2 * float(torch.linalg.norm(value)), key
