"""The programs of eval/ that fine-tune: each from a tiny model to its JSON."""

from __future__ import annotations

import gzip
import importlib.util
import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from tests.conftest import toy_frames
from tests.training.helpers import QUICK, patched_clock
from tests.training.test_yes_no import entry, written

from penchant.data.dataset import Dataset
from penchant.evaluation.tasks import load_task

# A few steps on a random model need not help.
pytestmark = pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")
EVAL = Path(__file__).resolve().parents[2] / "eval"


def program(name: str) -> Any:
    """A program of eval/ as a module: the folder is no package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_program", EVAL / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**QUICK, **changes}))
    return path


def test_finetuning_measures_before_during_and_after(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    toy.save(tmp_path / "data")
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    config = config_file(tmp_path, model=str(byte_folder), epochs=100, eval_every=None)
    out = tmp_path / "out.json"
    program("finetuning.py").main(
        SimpleNamespace(args=[]),
        "next_item",
        tmp_path / "data",
        tmp_path / "work",
        out,
        [0.5, 2.0],
        config=config,
        candidates=5,
        test_users=6,
        validation_users=6,
    )
    found = json.loads(out.read_text())
    assert [(p["minutes"], p["minutes_trained"]) for p in found["points"]] == [(0, 0), (0.5, 0.5), (2, 2)]
    assert found["points"][0]["fused minus untuned fused, NDCG@10"]["mean"] == 0
    assert found["points"][2]["held_out_loss"] < found["points"][0]["held_out_loss"]
    program("curves.py").main([out], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in program("tables.py").curves({"next_item": found}) if line.startswith("| next_item")]
    assert len(rows) == 3
    for row, point in zip(rows, found["points"], strict=True):
        assert f"{point['held_out_loss']:.3f}" in row
        gain = point["fused minus encoder, NDCG@10"]
        assert f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in row
    # Points that were kept are taken as they are, and neither into nor beside a curve of other candidates.
    again, asked = program("finetuning.py"), []
    true_scores = again.Bench.scores
    again.Bench.scores = lambda self: asked.append(self) or true_scores(self)

    def measure(candidates: int, untuned: Path | None = None) -> None:
        again.main(
            SimpleNamespace(args=[]),
            "next_item",
            tmp_path / "data",
            tmp_path / "work",
            tmp_path / "again.json",
            [0.5, 2.0],
            untuned=untuned,
            config=config,
            candidates=candidates,
            test_users=6,
            validation_users=6,
        )

    measure(5, tmp_path / "work/next_item-step-0000000.npz")
    assert not asked
    assert json.loads((tmp_path / "again.json").read_text())["points"] == found["points"]
    with pytest.raises(typer.BadParameter, match="of other candidates"):
        measure(4, tmp_path / "work/next_item-step-0000000.npz")
    measure(4)
    assert len(asked) == 3
    for point in found["points"]:
        assert set(point["systems"]) >= {"encoder", "llm", "llm calibrated", "fused"}
        assert all(0 <= s["NDCG@10"]["mean"] <= 1 and s["NDCG@10"]["n"] == 6 for s in point["systems"].values())


def test_a_recipe_without_an_order_is_refused_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="contrastive has no order"):
        program("finetuning.py").main(
            SimpleNamespace(args=[]), "contrastive", tmp_path, tmp_path / "work", tmp_path / "out", [1.0]
        )
    assert not (tmp_path / "work").exists()


def test_the_last_minutes_take_the_newest_checkpoint_however_fast_it_went(tmp_path: Path) -> None:
    """The steps were fixed for 30 minutes and took 25: no point of the curve may be missing."""
    log = [{"kind": "validation", "step": s, "minutes": m} for s, m in ((0, 0.0), (40, 10.2), (100, 25.0))]
    for record in log:
        at = tmp_path / "checkpoints" / f"step-{record['step']:07d}"
        at.mkdir(parents=True)
        for name in ("trainable.safetensors", "optimiser.safetensors", "state.json"):
            (at / name).touch()
    stops = program("finetuning.py")._stops(tmp_path, log, [10.0, 30.0])
    assert [(wanted, trained, path.name) for wanted, trained, path in stops] == [
        (0.0, 0.0, "step-0000000"),
        (10.0, 10.2, "step-0000040"),
        (30.0, 25.0, "step-0000100"),
    ]


def test_tallrec_scores_its_test_examples(byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    titles = ["Heat (1995)", "Alien (1979)", "Up (2009)", "M (1931)", "Aliens (1986)"]
    rows = [entry(f'"{a}"', "", b, ("No.", "Yes.")[i % 2]) for i, (a, b) in enumerate(permutations(titles, 2))]
    films = tmp_path / "data" / "movie"
    films.mkdir(parents=True)
    for name, users in (("train", "train.csv.gz"), ("valid", "valid.csv"), ("test", "test.csv")):
        written(films / f"{name}.json.gz", rows)
        of_row = "\n".join(["user_id", *(str(i % 4) for i in range(len(rows)))])
        (films / users).write_bytes(gzip.compress(of_row.encode()) if users.endswith(".gz") else of_row.encode())
    more = {
        "model": str(byte_folder),
        "prompts": str(prompts),
        "pack_tokens": 512,
        "max_steps": 3,
        "epochs": 3,
        "eval_users": 20,
    }
    config = config_file(tmp_path, **more)
    out = tmp_path / "out.json"
    main = program("tallrec.py").main
    for _ in range(2):  # the second time from what was kept
        main(SimpleNamespace(args=[]), tmp_path / "data", tmp_path / "work", out, [8, 0], 1, config)
        found = json.loads(out.read_text())
        assert set(found["auc"]) == {"untuned", "8", "all"}
        for run in found["runs"]:
            assert list(run["systems"]) == list(found["auc"][run["examples"]])
            assert {"llm yes_no", "llm yes_no and shares of likes of user and item"} < set(run["systems"])
            # The other way of asking is no part of what was trained.
            assert ("llm likelihood, likes minus dislikes" in run["systems"]) == (run["examples"] == "untuned")
            for system in run["systems"].values():
                assert 0 <= system["AUC"]["low"] <= system["AUC"]["mean"] <= system["AUC"]["high"] <= 1
            assert run["n_test"] == 20
    assert [run.get("steps") for run in found["runs"]] == [None, 3, 3]
    shown = "\n".join(program("tables.py").tallrec(found))
    for system, of in ((name, found["auc"]["all"][name]) for name in found["auc"]["all"]):
        (row,) = [line for line in shown.splitlines() if line.startswith(f"| {system} |")]
        assert f"{of['mean']:.4f}".removeprefix("0") in row


def test_what_the_llm_adds_is_a_mean_over_seeds_between_their_widest_bounds() -> None:
    def row(group: str, system: str, mean: float, low: float, high: float) -> dict[str, Any]:
        return {"group": group, "system": system, "metrics": {"NDCG@10": {"mean": mean, "low": low, "high": high}}}

    def run(shift: float, text: float) -> dict[str, Any]:
        added = "encoder: ids + text minus encoder: ids"
        return {
            "rows": [
                row("paired differences on all 9 targets", added, text, text - 0.01, text + 0.02),
                row("paired differences on the 2 targets that are cold items", added, 9, 9, 9),
                row("what the LLM adds", "llm+interest minus encoder: ids + text", shift, shift - 0.1, shift + 0.1),
            ],
            "costs": [
                {"system": "encoder: ids + text", "seconds_per_1000_users": 0.25},
                {"system": "llm+interest (weight 0.1, calibration 1)", "seconds_per_1000_users": 500.4},
            ],
        }

    whole, sample = "all 9 targets, whole catalogue of 4", "the same 3 of them (seed 0)"
    spread = [
        row(whole, "encoder: ids", 0.5, 0, 1),
        row(whole, "encoder: ids + text", 0.625, 0, 1),
        row(sample, "encoder: ids", 0.9, 0, 1),
    ]
    tables = program("tables.py")
    asked = {"task": "tiny", "runs": [run(0.2, 0.03), run(-0.1, 0.05)], "spread": spread}
    unasked = {"task": "no LLM", "runs": [{"rows": [], "costs": []}], "spread": spread}
    (line,) = [line for line in tables.added([asked, unasked]) if line.startswith("| ") and "IDs" not in line]
    wanted = ".5000 |  | .6250 | +0.0400 [+0.0200, +0.0700] | +0.0500 [-0.2000, +0.3000] | 0.2 | 500 |"
    assert line == f"| tiny | {wanted}"
    assert tables.added([unasked]) == []
    # Where systems were compared on average over the seeds, that difference stands there, and in a table of its own.
    name = "encoder: ids + text minus encoder: ids"
    rows = [
        row("all 9 test targets", name, 0.041, 0.03, 0.05) | {"p": 0.0123},
        row("the 4 test targets at a time of their own", name, 0.02, -0.01, 0.05) | {"p": 1.0},
    ]
    compared = asked | {"differences": {"rows": rows, "notes": ["p: a test", "SASRec is left out of the differences"]}}
    (line,) = [line for line in tables.added([compared]) if line.startswith("| tiny")]
    assert "| +0.0410 [+0.0300, +0.0500] | +0.0500 [-0.2000, +0.3000] |" in line
    assert tables._differences(asked) == []
    assert tables._differences(compared)[0].count("|") == 4
    wanted = "| encoder: ids | +0.0410 [+0.0300, +0.0500], p 0.012 | +0.0200 [-0.0100, +0.0500], p 1 |"
    assert tables._differences(compared)[2:] == [wanted, "", "- SASRec is left out of the differences", ""]
    # Where a seed was cut off there are none: then those of each seed stand, as in older results.
    cut = asked | {"differences": {"rows": [], "notes": []}}
    assert tables.added([cut]) == tables.added([asked])
    assert tables._differences(cut) == []


def test_the_readmes_first_table_has_a_row_a_task_with_what_ours_is_ahead_by() -> None:
    def row(
        system: str, mean: float, low: float = 0.0, high: float = 1.0, group: str = "all 1,234 test targets"
    ) -> Any:
        return {"group": group, "system": system, "metrics": {"NDCG@10": {"mean": mean, "low": low, "high": high}}}

    sample = "the same 3 of them (seed 0)"
    result = {
        "task": "beauty",
        "version": load_task("beauty").version,
        "spread": [row("EASE", 0.25), row("encoder: ids + text", 0.5), row("EASE", 0.75, group=sample)],
        "runs": [{"rows": [row("encoder: ids + text minus EASE", 0.2, 0.1, 0.3)]}] * 2,
    }
    tables = program("tables.py")
    (line,) = [line for line in tables.overview([result]) if line.startswith("| beauty")]
    wanted = "|  |  |  | .2500 |  |  | .5000 |  | +0.2000 [+0.1000, +0.3000] |"
    assert line == f"| beauty (1,234 targets, 2 seeds) {wanted}"
    header = tables.overview([result])[2]
    assert header.count("|") == line.count("|")
    assert header.split("|")[5].strip() == "EASE"
    older = result | {"version": 1, "runs": result["runs"][:1]}
    (line,) = [line for line in tables.overview([older]) if line.startswith("| beauty")]
    assert line.startswith("| beauty (1,234 targets, 1 seed; an earlier version of the task) |")


def test_speed_compares_dense_with_single_and_packed_with_full(byte_folder: Path, tmp_path: Path) -> None:
    Dataset.read(*toy_frames(n_users=6, n_events=24)).save(tmp_path / "data")
    speed = program("speed/training.py")
    out = tmp_path / "out.json"
    speed.main(tmp_path / "data", out, str(byte_folder), 1, False)
    found = json.loads(out.read_text())
    assert found["dense"]["dense_targets"] == 6 * 20
    assert found["dense"]["single_targets"] == 3 * 20
    assert found["dense"]["targets_a_second_ratio"] > 0
    assert 0 <= found["packed"]["padding_share"] < 1
    assert found["packed"]["tokens_a_second_ratio"] > 0


def test_the_full_batch_has_no_mask_and_says_what_a_plain_forward_says(byte_folder: Path) -> None:
    import torch

    from penchant.training.config import NextItemConfig
    from penchant.training.student import load_student

    speed = program("speed/training.py")
    student = load_student(NextItemConfig(**{**QUICK, "model": str(byte_folder)}))
    full = speed._full(student, 40)
    assert full.mask is None
    assert (full.n_targets, full.n_tokens) == (1, 40)
    with torch.no_grad():
        logits = student.eval().causal_lm(input_ids=full.tokens).logits[0].log_softmax(-1)
        said = student(full)
    assert said.numpy() == pytest.approx(logits[np.arange(39), full.tokens[0, 1:]].numpy(), abs=1e-4)


def test_a_nights_table_has_the_whole_night_first_and_its_shares_below() -> None:
    def row(users: int, epoch: float) -> dict[str, Any]:
        seconds = {"read the log": 1.0, "embed items": 12.6, "train encoder": 9.0, "write everybody's ten": 3.4}
        return {
            "users": users,
            "items": 4_000,
            "events": 9,
            "seconds": seconds,
            "seconds an epoch": epoch,
            "peak_mib": 2048,
        }

    whole = row(1_000, 99.6) | {"epochs": 17, "llm": {"users": 5, "seconds a user": 1.5}}
    whole["llm"]["hours for everybody, estimated"] = 2.4
    whole["seconds"] |= {"in all": 120.0}
    about = {"task": "games", "model": "tiny", "environment": {"cores_allowed": 2, "instructions": ["avx2"]}}
    lines = program("tables.py").night({"night": whole, "growth": [row(250, 25.4)], **about})
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| 1,000 | 4,000 | 9 | 13 | 100 | 3 | 2,048 |",
        "| 250 | 4,000 | 9 | 13 | 25 | 3 | 2,048 |",
    ]
    for told in ("2 minutes", "2.0 GiB", "1.50 seconds", "(5 asked)", "2 hours", "2 cores, avx2"):
        assert told in lines[2]
