"""Our vLLM engine against vLLM used plainly and against our transformers engine, in one run on one machine.

    .venv-vllm/bin/python eval/speed/vllm_engine.py --out eval/results/speed-vllm.json
    .venv-vllm/bin/python eval/speed/vllm_engine.py --users 8 --only rank --out /tmp/quick.json
    bash eval/speed/gpu.sh                # models of several sizes, on a GPU

Rows (each side is warmed first; a peer that is too slow is timed on some of the users and compared per item):
  rank      users with a 200-token history and 20 candidates each: plain vLLM is prompt_logprobs=0 over every full
            sequence, one request each; ours once on fresh prompts and once again on the same ones
  labels    yes/no for prompts that share an instruction: plain vLLM asks for full sequences too
  generate  the proved top 10 of a catalogue: our transformers engine
  children  a root of many children: in parts of 128 by logprob_token_ids, or all log-probabilities of the vocabulary

What is cached comes from vLLM's own count. Items/s of one row compare, those of different runs do not.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from penchant.catalog_trie import CatalogTrie
from penchant.cli.script import script
from penchant.engine.asking import Known
from penchant.engine.folders import resolve_model
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.engine.transformers import TransformersEngine
from penchant.engine.vllm import VllmEngine
from penchant.engine.vllm_options import VllmOptions
from penchant.engine.vllm_runner import _arguments
from penchant.environment import made_by
from penchant.errors import ConfigError
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.prompt import Templates
from penchant.tokens import Prompt

SEED = 0
ROWS = ("rank", "labels", "generate", "children")
Items = list[tuple[int, ...]]


class Bench:
    """Both engines of one model, and seeded prompts of random histories."""

    def __init__(self, model: str, dtype: str, users: int, sample: int, options: dict[str, Any]) -> None:
        self.users, self.sample = users, min(users, sample)
        self.folder, self.dtype, self.options = resolve_model(model), dtype, options
        self.vllm: VllmEngine = load_engine(model, dtype=dtype, backend="vllm", options=options)  # type: ignore[call-overload]
        self.plain: TransformersEngine = load_engine(model, dtype=dtype)  # type: ignore[call-overload]
        self.templates = Templates()
        self.rng = np.random.default_rng(SEED)
        with (fetch("movielens-100k") / "items.csv").open(encoding="utf-8") as handle:
            self.films = [row["title"] for row in csv.DictReader(handle)]
        self.items: Items = self.vllm.codec.encode_items(self.films, "\n")

    def prompts(self, n: int, tokens: int = 200) -> list[Prompt]:
        """Next-item prompts of just under ``tokens`` tokens."""
        out = []
        for _ in range(n):
            history = [{"text": self.films[i]} for i in self.rng.choice(len(self.films), size=tokens // 4)]
            count = lambda prompt: len(self.vllm.codec.encode(prompt))  # noqa: E731
            out.append(self.templates.render("next_item", {"history": history}, count=count, budget=tokens).prompt)
        return out

    def lists(self, n: int, candidates: int) -> list[Items]:
        return [[self.items[i] for i in self.rng.choice(len(self.items), candidates, replace=False)] for _ in range(n)]

    def ours(self, work: Callable[[], Any]) -> tuple[float, dict[str, int], Any]:
        """Seconds, vLLM's counts, and the result."""
        self.vllm.counts.clear()
        seconds, result = timed(work)
        counts = self.vllm.counts
        return seconds, {"requests": counts.requests, "tokens": counts.tokens, "cached_tokens": counts.cached}, result

    def plainly(self, prompts: Sequence[Prompt], lists: Sequence[Items]) -> list[np.ndarray]:
        """vLLM as its documentation has it: log-probabilities of each whole sequence, one request each."""
        from vllm import SamplingParams

        llm = self.vllm._runners.generating()._llm
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        starts = [self.vllm.codec.encode(prompt) for prompt in prompts]
        rows = [[*ids, *item] for ids, items in zip(starts, lists, strict=True) for item in items]
        outputs = iter(llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False))
        found = []
        for ids, items in zip(starts, lists, strict=True):
            scores = []
            for item in items:
                told = next(outputs).prompt_logprobs[len(ids) :]
                scores.append(sum(position[token].logprob for position, token in zip(told, item, strict=True)))
            found.append(np.array(scores))
        return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def apart(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """The largest difference in nats over the users that both have."""
    return round(max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=False)), 4)


def compared(work: str, items: int, seconds: dict[str, float], **more: Any) -> dict[str, Any]:
    """Items/s of each side, seconds already being scaled to the same items, and ours over each of the others."""
    rates = {name: round(items / s, 2) for name, s in seconds.items()}
    ratios = {f"times_{name}": round(s / seconds["ours"], 3) for name, s in seconds.items() if name != "ours"}
    row = {"work": work, "items": items, "items_per_second": rates, **ratios, **more}
    print(row, flush=True)
    return row


def rank(bench: Bench) -> dict[str, Any]:
    prompts, lists = bench.prompts(bench.users), bench.lists(bench.users, 20)
    warm = bench.prompts(2), bench.lists(2, 20)
    for score in (bench.vllm.score, bench.plain.score, bench.plainly):
        score(*warm)
    seconds, counts, scores = bench.ours(lambda: bench.vllm.score(prompts, lists))
    again, counts_again, scores_again = bench.ours(lambda: bench.vllm.score(prompts, lists))
    s = bench.sample
    usual, usual_scores = timed(lambda: bench.plainly(prompts[:s], lists[:s]))
    torch_seconds, torch_scores = timed(lambda: bench.plain.score(prompts, lists))
    return compared(
        f"{bench.users} users, 200-token history, 20 candidates",
        20 * bench.users,
        {
            "ours": seconds,
            "ours_again": again,
            "plain_vllm": usual * bench.users / s,
            "transformers_engine": torch_seconds,
        },
        counts=counts,
        counts_again=counts_again,
        plain_vllm_users=s,
        nats_apart={
            "again": apart(scores, scores_again),
            "plain_vllm": apart(scores, usual_scores),
            "transformers_engine": apart(scores, torch_scores),
        },
    )


def labels(bench: Bench) -> dict[str, Any]:
    prompts = []
    for _ in range(2 * bench.users):
        some = bench.rng.choice(len(bench.films), 6)
        given = {"history": [{"text": bench.films[i]} for i in some[1:]], "item": {"text": bench.films[some[0]]}}
        prompts.append(bench.templates.render("yes_no", given).prompt)
    pair: Items = [bench.vllm.codec.encode_template(label) for label in bench.templates.headers["yes_no"].labels]
    lists = [pair] * len(prompts)
    for score in (bench.vllm.score, bench.plain.score, bench.plainly):
        score(bench.prompts(2), [pair] * 2)
    seconds, counts, scores = bench.ours(lambda: bench.vllm.score(prompts, lists))
    usual, usual_scores = timed(lambda: bench.plainly(prompts, lists))
    torch_seconds, torch_scores = timed(lambda: bench.plain.score(prompts, lists))
    return compared(
        f"yes/no, {len(prompts)} prompts",
        len(prompts),
        {"ours": seconds, "plain_vllm": usual, "transformers_engine": torch_seconds},
        counts=counts,
        nats_apart={"plain_vllm": apart(scores, usual_scores), "transformers_engine": apart(scores, torch_scores)},
    )


def generate(bench: Bench) -> dict[str, Any]:
    n = max(1, bench.users // 16)
    prompts, trie = bench.prompts(n), CatalogTrie.build(bench.items)
    bench.vllm.generate(bench.prompts(1), trie, 1)
    bench.plain.generate(bench.prompts(1), trie, 1)
    seconds, counts, answers = bench.ours(lambda: bench.vllm.generate(prompts, trie, 10))
    torch_seconds, torch_answers = timed(lambda: bench.plain.generate(prompts, trie, 10))
    same = [len({g.item for g in a} & {g.item for g in b}) / 10 for a, b in zip(answers, torch_answers, strict=True)]
    return compared(
        f"exact top 10 of {len(bench.items):,} titles, {n} users",
        10 * n,
        {"ours": seconds, "transformers_engine": torch_seconds},
        counts=counts,
        proved=all(g.exact for answer in answers for g in answer),
        same_items=float(np.mean(same)),
    )


def children(bench: Bench) -> dict[str, Any]:
    """All prompts are cached but for their last blocks. An engine of its own, that may tell the whole vocabulary."""
    import vllm

    n = max(4, bench.users // 4)
    trie = CatalogTrie.build(bench.items)
    runner = bench.vllm._runners.generating()
    behind = [Known(bench.vllm.codec.encode(prompt), trie) for prompt in bench.prompts(n)]
    asks = [ask for known in behind for ask in known.ask(0, deep=False)]
    rows = [{"prompt_token_ids": known.ids} for known in behind]
    runner.ask(asks)
    parts, _ = timed(lambda: runner.ask(asks))
    bench.vllm.close()
    llm = vllm.LLM(**_arguments(bench.folder, bench.dtype, VllmOptions.of(bench.options), None), max_logprobs=-1)
    params = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False, flat_logprobs=True)
    llm.generate(rows, params, use_tqdm=False)
    whole, _ = timed(lambda: llm.generate(rows, params, use_tqdm=False))
    llm.llm_engine.engine_core.shutdown()
    row = {
        "work": f"a root of {len(trie.children(0)):,} children, {n} users",
        "milliseconds_a_root_in_parts_of_128": round(1e3 * parts / n, 2),
        "milliseconds_a_root_with_the_whole_vocabulary": round(1e3 * whole / n, 2),
    }
    print(row, flush=True)
    return row


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="A name that penchant fetch knows, or a folder.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Users of the row rank.")] = 64,
    sample: Annotated[int, typer.Option(help="Of them, users that plain vLLM scores.")] = 16,
    only: Annotated[str, typer.Option(help="Rows to run, separated by commas.")] = ",".join(ROWS),
    gpu_memory_utilization: Annotated[float, typer.Option(help="vLLM's share of a GPU.")] = 0.45,
) -> None:
    """Run the rows and write the JSON after each of them."""
    quiet_libraries()
    unknown = set(only.split(",")).difference(ROWS)
    if unknown:
        raise ConfigError(f"unknown row {min(unknown)!r}", remedy=f"choose among {', '.join(ROWS)}")
    options = {"gpu_memory_utilization": gpu_memory_utilization}
    bench = Bench(model, dtype, users, sample, options)
    kept: dict[str, Any] = {
        **made_by(__file__),
        "model": model,
        "dtype": dtype,
        "seed": SEED,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch_threads": torch.get_num_threads(),
        "rows": [],
    }
    measured = {"rank": rank, "labels": labels, "generate": generate, "children": children}
    for name in only.split(","):
        kept["rows"].append(measured[name](bench))
        write_json(out, kept)
    bench.vllm.close()
    print(out)


if __name__ == "__main__":
    script(main)
