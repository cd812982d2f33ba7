"""The tables of results, made from eval/results: three in the README, all of the tasks' in eval/results/README.md.

python eval/tables.py            # rewrites both
python eval/tables.py --check    # exits 1 where one of them is not what the results say

The README has a row a task: the plain baselines, ours, and what it is ahead by; then what the LLM adds to IDs, and its
cost; then what a shop's whole night costs. In eval/results/README.md a task has two blocks: every system on all
targets, and on the LLM's sample its own rows with the best of the others (all of them are in results/TASK.md). Above
them stands what every table must say: that leave-last-out leaks time, how many targets only the order of items in a tie
decided, that candidates were sampled, and how to make it again.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from penchant.cli.script import script
from penchant.evaluation.spread import plain, row_key
from penchant.evaluation.tasks import load_task
from penchant.files import read_json

ROOT = Path(__file__).resolve().parents[1]
TASKS = (
    *("ml-100k", "ml-latest-small-5core", "ml-latest-small"),
    *("games", "games-6k", "games-20"),
    *("beauty", "sports", "toys"),
    *("mars-elearning", "mars-elearning-time"),
)
BEGIN, END = "<!-- results -->", "<!-- /results -->"
OURS, SASREC, EASE = "encoder: ids + text", "SASRec (cross entropy)", "EASE"
# Systems whose seconds are told, and with how many digits.
COSTS = ((OURS, 1), ("llm+interest", 0))
PLAIN = {
    "popularity": "popularity",
    "newest titles (BM25)": "BM25",
    "ItemKNN": "ItemKNN",
    EASE: EASE,
    SASREC: "SASRec",
    "neighbours by nearness": "neighbours",
}
# Whose differences are shown; those of our other variants are in results/TASK.md.
_WHOLE = (OURS, "llm+interest")
_LLM_ADDS = "what the LLM adds"
_STAGE = ("llm", OURS, "the candidates in random order")
# Notes of a report without which no table is to be read.
_SAID = ("a tie in time decided", "ranked among sampled candidates only", "leave-last-out: whatever is trained")
LISTS = "write everybody's ten"  # as eval/speed/nightly.py calls it
LLM = "llm yes_no"  # as eval/tallrec.py calls the LLM, alone or in a name
METRICS = ("Recall@10", "NDCG@10")
_LEGEND = (
    "A number is the mean over the seeds, ± their standard deviation; brackets reach from the lowest to the highest "
    "bound of the seeds' 95% intervals over users. Differences are paired: between systems of what each target's seeds "
    "reach on average, with that mean's interval over users (the seeds are as they are); where the LLM is part of it, "
    "seed by seed, with brackets like the others and each seed's p. p is of a permutation test, corrected (Holm) for "
    "all differences of its table, or of that seed's report (eval/results/TASK.md).",
    "",
)


def block(result: dict[str, Any]) -> list[str]:
    """One task as Markdown."""
    first = result["runs"][0]
    seeds = len(result["runs"])
    lines = [f"### {result['task']}", "", f"{result['about']}. {seeds} {'seed' if seeds == 1 else 'seeds'}.", ""]
    said = [note for note in first["notes"] if any(part in note for part in _SAID)]
    lines += [f"True of every table here: {'; '.join(said)}.", ""] if said else []
    lines += [_made_by(result), ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in first["rows"]:
        groups.setdefault(row["group"], []).append(row)
    compared = _compared(result)
    for group, rows in groups.items():
        if rows[0]["difference"]:
            if compared and not group.startswith(_LLM_ADDS):  # they stand in a table of their own, over all seeds
                continue
            shown = [row["system"] for row in rows if row["system"].startswith(_WHOLE)]
            lines += [*(f"- {plain(group)}: {_difference(result['runs'], group, system)}" for system in shown), ""]
            continue
        lines += [f"| {group} | {' | '.join(METRICS)} |", "|---|---|---|"]
        ranked = sorted(rows, key=lambda row: _mean(_of_all(result["runs"], row)), reverse=True)
        if any(row["system"].startswith("llm") for row in rows):
            # On the LLM's sample: its own rows, ours, the floor under it, and the best of the others.
            others = [row for row in ranked if not row["system"].startswith(_STAGE)]
            ranked = [row for row in ranked if row["system"].startswith(_STAGE) or row is others[0]]
        for row in ranked:
            made = _of_all(result["runs"], row)
            cells = (_cell([one["metrics"][name] for one in made]) for name in METRICS)
            lines.append(f"| {row['system'] if seeds == 1 else plain(row['system'])} | {' | '.join(cells)} |")
        lines += ["", *(_differences(result) if group == first["rows"][0]["group"] else [])]
    if first["published"]:
        lines += ["| published, the protocol as said | " + " | ".join(METRICS) + " |", "|---|---|---|"]
        for one in first["published"]:
            cells = " | ".join(_number(one["metrics"].get(name)) for name in METRICS)
            lines.append(f"| {one['system']}: {one['source']}; {one['protocol']} | {cells} |")
        lines.append("")
    return lines


def _of_all(runs: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The same row of every seed that has it."""
    return [other for run in runs for other in run["rows"] if row_key(other) == row_key(row)]


def _mean(rows: list[dict[str, Any]]) -> float:
    """Of NDCG@10, over the seeds."""
    return fmean(row["metrics"]["NDCG@10"]["mean"] for row in rows)


def _compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was compared on average over the seeds; nothing in results that were made before that was done."""
    return list(result.get("differences", {}).get("rows", []))


def _differences(result: dict[str, Any]) -> list[str]:
    """One of ours minus each other system, a column a group of targets; none where none were made."""
    rows = _compared(result)
    if not rows:
        return []
    ours = f"{rows[0]['system'].partition(' minus ')[0]} minus "
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{_signed(row['metrics']['NDCG@10'])}, p {row['p']:.2g}"
        found.setdefault(row["system"].removeprefix(ours), {})[row["group"]] = cell
    groups = list(dict.fromkeys(group for cells in found.values() for group in cells))
    lines = [f"| NDCG@10 of {ours.strip()} | {' | '.join(groups)} |", "|---|" + "---|" * len(groups)]
    lines += [f"| {other} | {' | '.join(cells.get(g, '') for g in groups)} |" for other, cells in found.items()]
    left_out = [f"- {note}" for note in result["differences"]["notes"] if "left out" in note]
    return [*lines, "", *left_out, *([""] if left_out else [])]


def _made_by(result: dict[str, Any]) -> str:
    """The command that makes a task's results, and whether it would make these: its version may be a later one."""
    version, now = result["version"], load_task(result["task"]).version
    since = "" if version == now else f"; it is version {now} now, and these numbers wait to be made again"
    changed = ", with uncommitted changes" if result.get("changed") else ""
    commit = f" at commit {result['commit'][:7]}{changed}" if result.get("commit") else ""
    return (
        f"Made by `python eval/benchmark.py {result['task']} --data-dir data --out eval/results`{commit} (version "
        f"{version} of the task{since})."
    )


def overview(found: list[dict[str, Any]]) -> list[str]:
    """NDCG@10 on all targets: the plain baselines and ours, a row a task."""
    rows = []
    for result in found:
        numbers = [_number(_alone(result, system)) for system in (*PLAIN, OURS)]
        gains = [_gain(_over_all_seeds(result), f"{OURS} minus {other}") for other in (SASREC, EASE)]
        n, seeds = result["spread"][0]["group"].split()[1], len(result["runs"])
        waits = "" if result["version"] == load_task(result["task"]).version else "; an earlier version of the task"
        name = f"{result['task']} ({n} targets, {seeds} {'seed' if seeds == 1 else 'seeds'}{waits})"
        rows.append(f"| {' | '.join([name, *numbers, *gains])} |")
    return [
        "### NDCG@10, a row a data set and protocol",
        "",
        f"| | {' | '.join(PLAIN.values())} | ours: {OURS} | minus SASRec | minus EASE |",
        "|---|" + "---|" * (len(PLAIN) + 3),
        *rows,
        "",
    ]


def added(found: list[dict[str, Any]]) -> list[str]:
    """What the LLM adds, as vectors and as a ranker, and what it costs: a row a task that says one of both."""
    rows = []
    for result in found:
        runs = result["runs"]
        seconds = {one["system"].partition(" (")[0]: one["seconds_per_1000_users"] for one in runs[0]["costs"]}
        alone = [_alone(result, f"encoder: {name}") for name in ("ids", "text", "ids + text")]
        gains = [
            _gain(_over_all_seeds(result), f"{OURS} minus encoder: ids"),
            _gain(runs, f"llm+interest minus {OURS}"),
        ]
        if not any(gains):
            continue
        cost = [f"{seconds[one]:.{digits}f}" if one in seconds else "" for one, digits in COSTS]
        rows.append(f"| {result['task']} | {' | '.join([*map(_number, alone), *gains, *cost])} |")
    if not rows:
        return []
    return [
        "### what the LLM adds, and what it costs",
        "",
        "NDCG@10 on all targets of the encoder with IDs alone, with the LLM's vectors of texts alone, and with both; "
        "then paired differences. Vectors are made once for a catalogue; the LLM that orders the retrieved candidates "
        "is asked for each user (of a sample, where its own table says so; of none where nothing stands). Seconds are "
        "of the first seed's run.",
        "",
        "| data | IDs | text | IDs + text | text beside IDs adds | the LLM's order behind both adds | encoder, "
        "s per 1,000 users | LLM, s per 1,000 users |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _over_all_seeds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Where differences are looked up: what was compared on average over the seeds, or else each seed's own."""
    return [{"rows": _compared(result)}] if _compared(result) else list(result["runs"])


def _alone(result: dict[str, Any], system: str) -> float | None:
    """A system's mean on all targets, which stand first."""
    found = [row for row in result["spread"] if row["system"] == system]
    return float(found[0]["metrics"]["NDCG@10"]["mean"]) if found else None


def _gain(runs: list[dict[str, Any]], system: str) -> str:
    """A difference on all targets of its table, which stand before any slice."""
    rows = [next((row for row in run["rows"] if plain(row["system"]) == system), None) for run in runs]
    own = [row["metrics"]["NDCG@10"] for row in rows if row is not None]
    if not own or len(own) < len(runs):
        return ""
    return _over_seeds(own)


def _over_seeds(found: list[dict[str, Any]]) -> str:
    """The mean, between the lowest and the highest bound."""
    mean = fmean(one["mean"] for one in found)
    return _signed({"mean": mean, "low": min(one["low"] for one in found), "high": max(one["high"] for one in found)})


def _cell(own: list[dict[str, Any]]) -> str:
    """A system's metric with every seed: mean, deviation where there is one, and the widest of its intervals."""
    means = [one["mean"] for one in own]
    sd = stdev(means) if len(means) > 1 else 0.0
    deviation = f" ± {_number(sd)}" if sd > 1e-9 else ""
    low, high = min(one["low"] for one in own), max(one["high"] for one in own)
    return f"{_number(fmean(means))}{deviation} [{_number(low)}, {_number(high)}]"


def _difference(runs: list[dict[str, Any]], group: str, system: str) -> str:
    """Of all seeds that have it: another seed's best baseline may be another one."""
    rows = _of_all(runs, {"group": group, "system": system})
    p = [f"{row['p']:.2g}" for row in rows if row["p"] is not None]
    seeds = "" if len(rows) == len(runs) else f" ({len(rows)} of {len(runs)} seeds)"
    said = f", p {', '.join(p)}" if p else ""
    return f"{plain(system)}{seeds}: NDCG@10 {_over_seeds([row['metrics']['NDCG@10'] for row in rows])}{said}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def curves(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What each recipe's training does to the order of the same retrieved candidates (eval/finetuning.py)."""
    points = [run["points"][0]["systems"]["encoder"]["NDCG@10"] for run in runs.values()]
    without = all(run["settings"]["retriever"]["neighbours"] == 0 for run in runs.values())
    encoder = "the encoder (without neighbours)" if without else "the encoder"
    lines = [
        "### fine-tuning on ml-100k",
        "",
        f"NDCG@10 of the same 20 retrieved candidates on all {points[0]['n']:,} test users, in the order of the LLM "
        f"alone and of LLM and encoder fused, weights from validation users; {encoder} has {_ranged(points[0])}.",
        "",
        "| recipe | minutes | held-out loss | LLM alone | fused | fused minus encoder | fused minus untuned fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        for point in run["points"]:
            alone, fused = (point["systems"][way]["NDCG@10"] for way in _WAYS)
            gains = (point[f"fused minus {other}, NDCG@10"] for other in ("encoder", "untuned fused"))
            cells = [f"{point['minutes_trained']:.0f}", f"{point['held_out_loss']:.3f}", _ranged(alone), _ranged(fused)]
            lines.append(f"| {name} | {' | '.join([*cells, *map(_signed, gains)])} |")
    return [*lines, ""]


_WAYS = ("llm, calibration from validation", "fused")


def tallrec(run: dict[str, Any]) -> list[str]:
    """AUC of yes or no after training on few examples (eval/tallrec.py), beside what needs no LLM and the published."""
    labels = list(run["auc"])
    columns = ("untuned", *(f"{label} examples" for label in labels if label != "untuned"))
    first = run["runs"][0]
    lines = [
        "### tallrec-movie",
        "",
        f"AUC on TALLRec's {first['n_test']:,} test rows, which are {first['systems'][LLM]['AUC']['n']} users'; mean "
        "over the seeds, brackets as above. What reads items' shares of likes has them from all of TALLRec's training "
        "rows, and beside the LLM its weights from 200 validation rows, whatever the LLM was trained on.",
        "",
        f"Made by `{run['command']}` at commit {run['commit'][:7]}.",
        "",
        f"| system | {' | '.join(columns)} |",
        "|---|" + "---|" * len(labels),
    ]
    for system in first["systems"]:
        cells = [
            _cell([one["systems"][system]["AUC"] for one in run["runs"] if one["examples"] == label])
            if system in of
            else ""
            for label, of in run["auc"].items()
        ]
        if LLM not in system:  # the same whatever the LLM was trained on
            cells[1:] = [""] * (len(cells) - 1)
        lines.append(f"| {system} | {' | '.join(cells)} |")
    lines += ["", "| published | AUC |", "|---|---|"]
    lines += [f"| {one['system']}: {one['source']} | {_number(one['metrics']['AUC'])} |" for one in run["published"]]
    return [*lines, ""]


def night(run: dict[str, Any]) -> list[str]:
    """What a shop's whole night costs, and how that grows with users and catalogue (eval/speed/nightly.py)."""
    whole, machine = run["night"], run["environment"]
    asked, minutes = whole["llm"], whole["seconds"]["in all"] / 60
    lines = [
        "### A shop's night, and how it grows",
        "",
        f"All users of {run['task']}: read the log, embed the titles, train the encoder with IDs, text and neighbours "
        f"(here {whole['epochs']} epochs) and write ten items for everybody take {minutes:.0f} minutes and "
        f"{whole['peak_mib'] / 1024:.1f} GiB. The untuned LLM behind it takes {asked['seconds a user']:.2f} seconds a "
        f"user ({asked['users']} asked); for everybody that would be {asked['hours for everybody, estimated']:.0f} "
        f"hours. {machine['cores_allowed']} cores, {', '.join(machine['instructions'])}, {run['model']}. Rows below "
        "the first have a seeded share of the users or of the catalogue, with the events that remain, and two epochs.",
        "",
        "| users | titles | events | embed the titles, s | train, s an epoch | ten items for everybody, s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (whole, *run["growth"]):
        took = row["seconds"]
        cells = [f"{row[name]:,}" for name in ("users", "items", "events")]
        cells += [f"{took['embed items']:.0f}", f"{row['seconds an epoch']:.0f}", f"{took[LISTS]:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {row['peak_mib']:,} |")
    return [*lines, ""]


def _ranged(found: dict[str, Any]) -> str:
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _signed(found: dict[str, Any]) -> str:
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def tasks_of(results: Path) -> list[dict[str, Any]]:
    """The results of all tasks that were run."""
    return [read_json(path) for path in (results / f"{task}.json" for task in TASKS) if path.is_file()]


def summary(tasks: list[dict[str, Any]], results: Path) -> str:
    """The README's part."""
    path = results / "nightly-games.json"
    cost = night(read_json(path)) if path.is_file() else []
    return "\n".join([*_LEGEND, *overview(tasks), *added(tasks), *cost]).strip() + "\n"


def tables(tasks: list[dict[str, Any]], results: Path) -> str:
    """All tables: of the tasks, and of the other programs whose results are there."""
    lines = ["# Results", "", "Made by `python eval/tables.py` from the JSON files beside this one.", "", *_LEGEND]
    for result in tasks:
        lines += block(result)
    found = {
        path.stem.removeprefix("finetuning-"): read_json(path) for path in sorted(results.glob("finetuning-*.json"))
    }
    lines += curves(found) if found else []
    path = results / "tallrec-movie.json"
    lines += tallrec(read_json(path)) if path.is_file() else []
    return "\n".join(lines).strip() + "\n"


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 where something would change.")
    ] = False,
) -> None:
    """Put the tables where they belong."""
    results, readme = ROOT / "eval" / "results", ROOT / "README.md"
    tasks = tasks_of(results)
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    made = {
        readme: f"{before}{BEGIN}\n{summary(tasks, results)}{END}{after}",
        results / "README.md": tables(tasks, results),
    }
    for path, text in made.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)} is not what eval/results says: run python eval/tables.py")
            raise SystemExit(1)


if __name__ == "__main__":
    script(main)
