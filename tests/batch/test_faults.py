"""A job killed, hindered and tampered with in every way ends with the files of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.batch.conftest import Jobs, made, people, quarantined, results

ROWS, SHARDS = 13, 3
FIRST_SHARD = 15  # a rename or sync of the first shard, after those that make the run's folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "users.parquet"
    people().write_parquet(path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, bytes]]:
    """How an undisturbed job ended, and its files."""
    out = tmp_path_factory.mktemp("undisturbed") / "recs"
    ended = jobs(out, rows)
    assert ended.status == 0, ended.said
    assert len(made(out)) == SHARDS + 1
    assert sorted(results(out)["row"].unique().to_list() + quarantined(out)["row"].to_list()) == list(range(ROWS))
    return ended, made(out)


def finished(jobs: Jobs, out: Path, rows: Path, expected: dict[str, bytes]) -> None:
    """Run to the end: the same files, published, and nothing half written left."""
    ended = jobs(out, rows)
    assert ended.status == 0, ended.said
    assert json.loads(ended.said)["state"] == "complete"
    assert made(out) == expected
    left = [p for p in out.rglob("*") if ".tmp" in p.name or p.name.startswith(".latest")]
    assert left == []


def test_killed_at_every_rename_and_sync(jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path) -> None:
    ended, expected = undisturbed
    assert ended.calls > 25
    # On disk, after one of them is before the next.
    for call in range(1, ended.calls + 1):
        out = tmp_path / str(call)
        killed = jobs(out, rows, kill_at=call, when="before" if call < ended.calls else "after")
        # Progress is written by the clock too, so a run may have a call or two less.
        assert killed.status == -signal.SIGKILL or call > ended.calls - 3
        finished(jobs, out, rows, expected)


def test_killed_at_30_random_moments(jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path) -> None:
    _, expected = undisturbed
    begun = time.perf_counter()
    jobs(tmp_path / "timed", rows)
    seconds = time.perf_counter() - begun
    chance = random.Random(7)
    kills = 0
    for folder in range(60):
        out = tmp_path / str(folder)
        for _ in range(3):
            ended = jobs(out, rows, signal=signal.SIGKILL, after=chance.uniform(0, seconds))
            kills += ended.status == -signal.SIGKILL
            if ended.status == 0:
                break
        finished(jobs, out, rows, expected)
        if kills >= 30:
            return
    pytest.fail(f"only {kills} of the jobs were killed before they ended")


def test_a_kill_costs_the_shard_in_hand_alone(jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path) -> None:
    ended, expected = undisturbed
    out = tmp_path / "recs"
    jobs(out, rows, kill_at=ended.calls - 3)  # while the summary is written: all shards are there
    run = out / "run-0001"
    before = {p.name: p.stat().st_mtime_ns for p in (run / "parts").iterdir()}
    assert len(before) == SHARDS
    finished(jobs, out, rows, expected)
    assert {p.name: p.stat().st_mtime_ns for p in (run / "parts").iterdir()} == before


@pytest.mark.parametrize("place", [0.3, 0.6])
def test_a_kill_in_mid_job_leaves_what_was_written_before(jobs: Jobs, rows: Path, tmp_path: Path, place: float) -> None:
    """Thirteen shards, killed as one is written: that one and the one the engine has in hand are made again."""
    whole = jobs(tmp_path / "whole", rows, shard_rows=1)
    out = tmp_path / "recs"
    killed = jobs(out, rows, shard_rows=1, kill_at=FIRST_SHARD + int(place * (whole.calls - FIRST_SHARD)))
    assert killed.status == -signal.SIGKILL
    run = out / "run-0001"
    before = {p.name: p.stat().st_mtime_ns for p in run.glob("records/*.json")}
    assert 2 <= len(before) <= 10
    again = jobs(out, rows, shard_rows=1)
    assert again.status == 0, again.said
    after = {p.name: p.stat().st_mtime_ns for p in run.glob("records/*.json")}
    assert {name: after[name] for name in before} == before, "none of them is made again"
    assert made(out) == made(tmp_path / "whole")


def test_sigterm_finishes_the_shard_in_hand_and_says_what_is_left(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    _, expected = undisturbed
    out = tmp_path / "recs"
    ended = jobs(out, rows, kill_at=FIRST_SHARD, kill_with=signal.SIGTERM)
    assert ended.status == 0
    said = json.loads(ended.said)
    assert said["state"] == "stopped"
    assert 1 <= said["shards_done"] <= 2, "the one in hand was finished, and no other begun"
    assert said["shards_left"] == SHARDS - said["shards_done"]
    assert len(list((out / "run-0001" / "parts").glob("*.parquet"))) == said["shards_done"]
    assert not (out / "latest").exists()
    finished(jobs, out, rows, expected)


@pytest.mark.parametrize("limit", [0, 150, 700, 1500, 2500, 4000])
def test_a_full_disk_is_one_error_and_the_job_goes_on_later(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path, limit: int
) -> None:
    _, expected = undisturbed
    out = tmp_path / "recs"
    ended = jobs(out, rows, fsize=limit)
    if ended.status:
        assert ended.status == 2
        assert "no room to write it" in ended.said
        assert "remedy" in ended.said
        assert not (out / "latest").exists()
    else:
        assert limit == 4000
    finished(jobs, out, rows, expected)


@pytest.mark.parametrize("harm", ["torn", "altered", "gone", "record torn", "record altered", "quarantine gone"])
@pytest.mark.parametrize("published", [False, True])
def test_a_shard_that_is_not_what_was_written_is_made_again_alone(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path, harm: str, published: bool
) -> None:
    ended, expected = undisturbed
    out = tmp_path / "recs"
    jobs(out, rows, kill_at=None if published else ended.calls - 3)
    run = out / "run-0001"
    shard = 2 if "quarantine" in harm else 1
    kind = "quarantine" if "quarantine" in harm else "records" if "record" in harm else "parts"
    victim = next((run / kind).glob(f"part-{shard:05d}.*"))
    data = victim.read_bytes()
    if "gone" in harm:
        victim.unlink()
    else:
        victim.write_bytes(data[:-20] if "torn" in harm else data.replace(data[40:41], bytes([data[40] ^ 1]), 1))
    others = {p: p.stat().st_mtime_ns for p in run.glob("parts/*") if f"{shard:05d}" not in p.name}
    finished(jobs, out, rows, expected)
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_a_truncated_input_is_refused_and_named(jobs: Jobs, rows: Path, tmp_path: Path) -> None:
    short = tmp_path / "users.parquet"
    short.write_bytes(rows.read_bytes()[:-30])
    ended = jobs(tmp_path / "recs", short)
    assert ended.status == 2
    assert str(short) in ended.said
    assert "cannot be read as Parquet" in ended.said


def test_an_input_replaced_in_between_is_refused_and_named(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    ended, expected = undisturbed
    out, mine = tmp_path / "recs", tmp_path / "users.parquet"
    mine.write_bytes(rows.read_bytes())
    jobs(out, mine, kill_at=ended.calls - 8)
    people().reverse().write_parquet(mine, row_group_size=4)
    refused = jobs(out, mine)
    assert refused.status == 2
    assert "differs in: input users.parquet" in refused.said
    mine.write_bytes(rows.read_bytes())
    finished(jobs, out, mine, expected)


def test_two_at_once_on_one_folder_are_refused(jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path) -> None:
    import fcntl

    _, expected = undisturbed
    out = tmp_path / "recs"
    out.mkdir()
    with (out / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ended = jobs(out, rows)
        assert ended.status == 2
        assert "another process is at work" in ended.said
        assert jobs(out, rows, part="1/2").status == 2
    # The lock goes with whoever held it; the file that stays means nothing.
    finished(jobs, out, rows, expected)


def test_parts_of_an_array_job_make_one_run(jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path) -> None:
    import fcntl

    _, expected = undisturbed
    out = tmp_path / "recs"
    first = jobs(out, rows, part="2/2")
    said = json.loads(first.said)
    assert (said["state"], said["shards_done"]) == ("part", 1)
    assert not (out / "latest").exists()
    with (out / "lock.1-of-2").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert jobs(out, rows, part="1/2").status == 2, "that part is at work"
        assert jobs(out, rows, part="1/3").status == 2, "parts of another number would overlap"
        again = jobs(out, rows, part="2/2")
        assert json.loads(again.said)["state"] == "part", "the other part may run beside it"
    assert json.loads(jobs(out, rows, part="1/2").said)["state"] == "complete"
    assert made(out) == expected
    for wrong in ("0/2", "3/2", "a/b", "1"):
        assert "give i/n" in jobs(out, rows, part=wrong).said


def test_an_unfinished_job_with_anything_different_is_refused(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    ended, expected = undisturbed
    out = tmp_path / "recs"
    jobs(out, rows, kill_at=ended.calls - 8)
    for change, said in (
        ({"k": 4}, "option k (3 then, 4 now)"),
        ({"method": "retrieve"}, 'option method ("rank" then, "retrieve" now)'),
        ({"shard_rows": 6}, "option shard_rows (5 then, 6 now)"),
        ({"deny": ["1"]}, "option deny"),
        ({"n_threads": 2}, "threads (1 then, 2 now)"),
    ):
        refused = jobs(out, rows, **change)
        assert refused.status == 2
        assert f"differs in: {said}" in refused.said
        assert refused.said.count(" then, ") == 1, "it names that alone"
    finished(jobs, out, rows, expected)


def test_a_complete_job_is_left_alone_and_another_one_goes_beside_it(
    jobs: Jobs, rows: Path, undisturbed: Any, tmp_path: Path
) -> None:
    ended, expected = undisturbed
    out = tmp_path / "recs"
    finished(jobs, out, rows, expected)
    finished(jobs, out, rows, expected)
    assert (out / "latest").readlink() == Path("run-0001")
    killed = jobs(out, rows, k=4, kill_at=ended.calls - 8)
    assert killed.status == -signal.SIGKILL
    assert (out / "latest").readlink() == Path("run-0001"), "never a run that isn't complete"
    assert made(out) == expected
    assert jobs(out, rows, k=4).status == 0
    assert (out / "latest").readlink() == Path("run-0002")
    assert results(out)["rank"].max() == 4
