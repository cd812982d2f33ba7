"""Our scoring and generation against the usual ways of doing the same, on SmolLM2-135M, both sides in one run.

    python eval/speed/scoring.py --out eval/results/speed-scoring.json
    python eval/speed/scoring.py --only rank,labels --out /tmp/quick.json

Rows (each side is warmed first; a peer too slow to finish is timed on a seeded sample and compared per item):
  rank       32 users, 200-token history, 100 candidates each: one padded batch of full sequences a user
  catalogue  every MovieLens-100K title for 16 users: the same
  beams      16 users, the Games catalogue, 10 and 50 beams: generate(prefix_allowed_tokens_fn, num_beams)
  exact      exact top 10 of MovieLens-100K's titles for 16 users: scoring every title our fast way
  labels     yes/no for 256 prompts that share an instruction: one batch of prompts at a time
  growth     items/s with 10, 100, 1,000 candidates and 50 to 800 tokens of history (scoring_plot.py draws it)
The floor of a row is the time its tokens would take at the rate of a plain full forward in the same run.
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
from scipy.stats import spearmanr

from penchant.catalog_trie import CatalogTrie
from penchant.cli.script import script
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.engine.transformers import TransformersEngine
from penchant.environment import made_by
from penchant.errors import ConfigError
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.prompt import Templates
from penchant.tokens import Prompt

SEED = 0
ROWS = ("labels", "rank", "beams", "catalogue", "exact", "growth")
Items = list[tuple[int, ...]]


class Bench:
    def __init__(self, dtype: str) -> None:
        self.engine: TransformersEngine = load_engine("smollm2-135m", dtype=dtype)  # type: ignore[arg-type]
        self.model = self.engine._tree.model
        self.templates = Templates()
        self.rng = np.random.default_rng(SEED)
        with (fetch("movielens-100k") / "items.csv").open(encoding="utf-8") as handle:
            self.films = [row["title"] for row in csv.DictReader(handle)]
        self.film_tokens = self.engine.codec.encode_items(self.films, "\n")
        self.rate = self.plain_rate()
        self.every: tuple[list[Prompt], float, int, list[np.ndarray]] | None = None

    def prompts(self, n: int, tokens: int, titles: Sequence[str] | None = None) -> list[Prompt]:
        """Next-item prompts of just under ``tokens`` tokens, of random histories."""
        titles = titles or self.films
        out = []
        for _ in range(n):
            history = [{"text": titles[i]} for i in self.rng.choice(len(titles), size=min(len(titles), tokens // 4))]
            count = lambda prompt: len(self.engine.codec.encode(prompt))  # noqa: E731
            out.append(self.templates.render("next_item", {"history": history}, count=count, budget=tokens).prompt)
        return out

    def score_everything(self) -> tuple[list[Prompt], float, int, list[np.ndarray]]:
        """Every film for 16 users: prompts, seconds, tokens, scores; done once, two rows need it."""
        if self.every is None:
            prompts = self.prompts(16, 200)
            self.engine.score(prompts[:2], [self.film_tokens[:50]] * 2)
            self.every = (prompts, *self.ours(lambda: self.engine.score(prompts, [self.film_tokens] * len(prompts))))
        return self.every

    @torch.inference_mode()
    def plain_rate(self) -> float:
        """Tokens/s of a plain full forward of 8 rows of 256 tokens, logits of every position included."""
        ids = torch.from_numpy(self.rng.integers(100, 40_000, size=(8, 256)))
        self.model(input_ids=ids, use_cache=False)
        best = min(timed(lambda: self.model(input_ids=ids, use_cache=False)) for _ in range(3))
        return ids.numel() / best

    def ours(self, work: Callable[[], Any]) -> tuple[float, int, Any]:
        """Seconds, tokens run, and the result."""
        before = self.engine.tokens_run
        begun = time.perf_counter()
        result = work()
        return time.perf_counter() - begun, self.engine.tokens_run - before, result

    @torch.inference_mode()
    def usual_scores(self, prompt: Prompt, items: Items) -> np.ndarray:
        """One user the usual way: every candidate behind a copy of the prompt, one right-padded batch."""
        ids = self.engine.codec.encode(prompt)
        width = len(ids) + max(map(len, items))
        batch = torch.zeros((len(items), width), dtype=torch.long)
        real = torch.zeros((len(items), width), dtype=torch.long)
        for i, item in enumerate(items):
            batch[i, : len(ids) + len(item)] = torch.tensor([*ids, *item])
            real[i, : len(ids) + len(item)] = 1
        # The logits of the candidates' positions only: kinder than what most of them do.
        keep = width - len(ids) + 1
        logits = self.model(input_ids=batch, attention_mask=real, use_cache=False, logits_to_keep=keep).logits
        out = np.zeros(len(items))
        for i, item in enumerate(items):
            logp = torch.log_softmax(logits[i, : len(item)].float(), dim=-1)
            out[i] = float(logp[torch.arange(len(item)), torch.tensor(item)].sum())
        return out


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def must_run(bench: Bench, prompts: Sequence[Prompt], lists: Sequence[Items]) -> int:
    """Tokens that no method can leave out: each prompt once, each inner node of its candidates' trie once."""
    tries = {id(items): CatalogTrie.build(items) for items in lists}
    inner = {key: int((t.child_start[1:] > t.child_start[:-1]).sum()) - 1 for key, t in tries.items()}
    prompts_tokens = sum(len(bench.engine.codec.encode(p)) for p in prompts)
    return prompts_tokens + sum(inner[id(items)] for items in lists)


def row(
    name: str, items: int, ours: float, theirs: float, tokens: int, floor_tokens: int, rate: float, **more: Any
) -> dict:
    """Per-item rates of both sides; ``theirs`` are the peer's seconds scaled to the same items."""
    found = {
        "work": name,
        "items": items,
        "ours_seconds": round(ours, 2),
        "peer_seconds": round(theirs, 2),
        "times_faster": round(theirs / ours, 2),
        "ours_items_per_second": round(items / ours, 1),
        "tokens_run": tokens,
        "tokens_needed": floor_tokens,
        "floor_seconds": round(floor_tokens / rate, 2),
        "times_the_floor": round(ours / (floor_tokens / rate), 2),
        **more,
    }
    print(
        {k: found[k] for k in ("work", "ours_seconds", "peer_seconds", "times_faster", "times_the_floor")},
        more,
        flush=True,
    )
    return found


def rank(bench: Bench) -> list[dict]:
    """32 users, 200-token history, 100 candidates each."""
    prompts = bench.prompts(32, 200)
    lists = [[bench.film_tokens[i] for i in bench.rng.choice(len(bench.films), 100, replace=False)] for _ in prompts]
    bench.engine.score(prompts[:2], lists[:2])
    seconds, tokens, scores = bench.ours(lambda: bench.engine.score(prompts, lists))
    bench.usual_scores(prompts[0], lists[0][:10])
    sample = [0, 1]
    got: dict[int, np.ndarray] = {}
    peer = sum(timed(lambda i=i: got.__setitem__(i, bench.usual_scores(prompts[i], lists[i]))) for i in sample)
    agree = float(np.mean([np.corrcoef(got[i], scores[i])[0, 1] for i in sample]))
    scaled = peer / len(sample) * len(prompts)
    reference = load_engine("smollm2-135m", dtype="float32").score(prompts[:2], lists[:2])
    agreement = float(np.mean([spearmanr(a, b).statistic for a, b in zip(reference, scores, strict=False)]))
    need = must_run(bench, prompts, lists)
    return [
        row(
            "rank 100 candidates, 32 users",
            3200,
            seconds,
            scaled,
            tokens,
            need,
            bench.rate,
            peer_sampled_users=2,
            correlation=agree,
            bfloat16_rank_agreement_with_float32_spearman=agreement,
        )
    ]


def catalogue(bench: Bench) -> list[dict]:
    """Every film for 16 users; the peer on 100 seeded films of one user."""
    prompts, seconds, tokens, scores = bench.score_everything()
    lists = [bench.film_tokens] * len(prompts)
    some = bench.rng.choice(len(bench.films), 100, replace=False)
    bench.usual_scores(prompts[0], [bench.film_tokens[i] for i in some[:10]])
    got: list[np.ndarray] = []
    peer = timed(lambda: got.append(bench.usual_scores(prompts[0], [bench.film_tokens[i] for i in some])))
    agree = float(np.corrcoef(got[0], scores[0][some])[0, 1])
    items = len(prompts) * len(bench.films)
    need = must_run(bench, prompts, lists)
    return [
        row(
            "every title, 16 users",
            items,
            seconds,
            peer / 100 * items,
            tokens,
            need,
            bench.rate,
            peer_sampled_items=100,
            correlation=agree,
        )
    ]


def exact(bench: Bench) -> list[dict]:
    """The proved top 10 of the catalogue against scoring all of it (both ours)."""
    prompts, everything, all_tokens, scores = bench.score_everything()
    trie = CatalogTrie.build(bench.film_tokens)
    bench.engine.generate(prompts[:2], trie, 10)
    seconds, tokens, answers = bench.ours(lambda: bench.engine.generate(prompts, trie, 10))
    same = np.mean(
        [
            len({g.item for g in a} & set(np.argsort(-s)[:10].tolist())) / 10
            for a, s in zip(answers, scores, strict=True)
        ]
    )
    beams = bench.engine.generate(prompts, trie, 10, beams=10)
    share = np.mean([len({g.item for g in a} & {g.item for g in b}) / 10 for a, b in zip(answers, beams, strict=True)])
    proved = all(g.exact for answer in answers for g in answer)
    return [
        row(
            "exact top 10, 16 users, against scoring every title", 160, seconds, everything, tokens, tokens, bench.rate,
            share_of_tokens=round(tokens / all_tokens, 3), proved=proved, same_as_sorting=float(same),
            ten_beams_found=float(share),
        )
    ]  # fmt: skip


def beams(bench: Bench, games: Path) -> list[dict]:
    """Constrained beams over the Games catalogue against transformers' own with a dict trie."""
    if not games.is_file():
        raise ConfigError("no such file", where=str(games), remedy="give --games .../Games.item, or leave the row out")
    with games.open(encoding="utf-8") as handle:
        titles = [line.rstrip("\n").partition("\t")[2] for line in handle][1:]
    items = bench.engine.codec.encode_items(titles, "\n")
    prompts = bench.prompts(16, 200, titles)
    trie = CatalogTrie.build(items)
    out = []
    for width, sampled in ((10, 16), (50, 4)):
        bench.engine.generate(prompts[:2], trie, width, beams=width)
        seconds, tokens, answers = bench.ours(
            lambda width=width: bench.engine.generate(prompts, trie, width, beams=width)
        )
        usual_beams(bench, prompts[:1], items, 2)
        got: list[list[tuple[tuple[int, ...], float]]] = []
        peer = timed(lambda n=sampled, w=width: got.extend(usual_beams(bench, prompts[:n], items, w)))  # noqa: B023
        out.append(
            row(
                f"constrained beams, {width} wide, 16 users, {len(items):,} titles",
                16 * width,
                seconds,
                peer / sampled * len(prompts),
                tokens,
                tokens,
                bench.rate,
                peer_sampled_users=sampled,
                same_sequences_bfloat16=same_sequences(answers, got, items)[0],
            )
        )
    # Layout moves bfloat16 scores by half a nat a title: that the answers are the same is a float32 promise.
    fast = bench.engine, bench.model
    bench.engine = load_engine("smollm2-135m", dtype="float32")
    bench.model = bench.engine._tree.model
    answers = bench.engine.generate(prompts[:4], trie, 10, beams=10)
    same, apart = same_sequences(answers, usual_beams(bench, prompts[:4], items, 10), items)
    bench.engine, bench.model = fast
    out[0] |= {"same_sequences_float32": same, "largest_score_difference_float32_nats": apart}
    print(out[0], flush=True)
    return out


def same_sequences(
    ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[tuple[tuple[int, ...], float]]], items: Items
) -> tuple[float, float]:
    """Share of our distinct sequences that the peer found too, and the largest difference of their scores in nats.

    Distinct: items that share a sequence are several answers of ours and one of the peer's, which fills up from below.
    """
    shares, apart = [], [0.0]
    for a, b in zip(ours, theirs, strict=False):
        found = dict(b)
        mine = {items[g.item]: g.logprob for g in a}
        shares.append(len(mine.keys() & found.keys()) / len(mine))
        apart += [abs(mine[s] - found[s]) for s in mine.keys() & found.keys()]
    return float(np.mean(shares)), float(max(apart))


@torch.inference_mode()
def usual_beams(
    bench: Bench, prompts: Sequence[Prompt], items: Items, width: int
) -> list[list[tuple[tuple[int, ...], float]]]:
    """As MiniOneRec, LC-Rec and BIGRec decode: a dict trie behind prefix_allowed_tokens_fn."""
    root: dict[int, Any] = {}
    for item in items:
        node = root
        for token in item:
            node = node.setdefault(token, {})
    rows = [bench.engine.codec.encode(p) for p in prompts]
    start = max(map(len, rows))
    end = items[0][-1]
    ids = torch.tensor([[0] * (start - len(r)) + r for r in rows])
    real = torch.tensor([[0] * (start - len(r)) + [1] * len(r) for r in rows])

    def allowed(_: int, sent: torch.Tensor) -> list[int]:
        node = root
        for token in sent[start:].tolist():
            node = node.get(token, {})
        return list(node) or [end]

    out = bench.model.generate(
        input_ids=ids, attention_mask=real, num_beams=width, num_return_sequences=width, do_sample=False,
        length_penalty=0.0, early_stopping=False, max_new_tokens=max(map(len, items)), eos_token_id=end, pad_token_id=0,
        prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    answers: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in rows]
    for j, (sequence, score) in enumerate(zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True)):
        tail = sequence[start:]
        if end in tail:
            answers[j // width].append((tuple(tail[: tail.index(end) + 1]), score))
    return answers


def labels(bench: Bench) -> list[dict]:
    """Yes or no for 256 prompts that share their instruction."""
    prompts = []
    for _ in range(256):
        some = bench.rng.choice(len(bench.films), 6)
        given = {"history": [{"text": bench.films[i]} for i in some[1:]], "item": {"text": bench.films[some[0]]}}
        prompts.append(bench.templates.render("yes_no", given).prompt)
    pair = [bench.engine.codec.encode_template(label) for label in bench.templates.headers["yes_no"].labels]
    lists = [pair] * len(prompts)
    bench.engine.score(prompts[:32], lists[:32])
    seconds, tokens, scores = bench.ours(lambda: bench.engine.score(prompts, lists))
    rows = sorted((bench.engine.codec.encode(p), i) for i, p in enumerate(prompts))
    rows.sort(key=lambda r: len(r[0]))
    got = np.zeros((len(prompts), 2))

    @torch.inference_mode()
    def usual(rows: list[tuple[list[int], int]]) -> None:
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            width = max(len(r) for r, _ in part)
            batch = torch.tensor([[0] * (width - len(r)) + r for r, _ in part])
            real = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r, _ in part])
            position = (real.cumsum(1) - 1).clamp(min=0)
            logits = bench.model(
                input_ids=batch, attention_mask=real, position_ids=position, use_cache=False, logits_to_keep=1
            ).logits[:, -1]
            logp = torch.log_softmax(logits.float(), dim=-1)[:, [p[0] for p in pair]]
            for (_, i), values in zip(part, logp.tolist(), strict=True):
                got[i] = values

    usual(rows[:32])
    peer = timed(lambda: usual(rows))
    ours = np.array([[s[0], s[1]] for s in scores])
    agree = float(np.corrcoef(ours[:, 0] - ours[:, 1], got[:, 0] - got[:, 1])[0, 1])
    need = sum(len(r) for r, _ in rows)
    return [
        row(
            "yes/no, 256 prompts sharing an instruction",
            256,
            seconds,
            peer,
            tokens,
            need,
            bench.rate,
            correlation=agree,
        )
    ]


def growth(bench: Bench) -> list[dict]:
    """Items a second for more candidates and longer histories; 4 users."""
    found = []
    for tokens in (50, 200, 800):
        for n in (10, 100, 1000):
            prompts = bench.prompts(4, tokens)
            lists = [
                [bench.film_tokens[i] for i in bench.rng.choice(len(bench.films), n, replace=False)] for _ in prompts
            ]
            seconds, run, _ = bench.ours(lambda prompts=prompts, lists=lists: bench.engine.score(prompts, lists))
            need = must_run(bench, prompts, lists)
            found.append(
                {
                    "history_tokens": tokens, "candidates": n, "items_per_second": round(4 * n / seconds, 1),
                    "tokens_run": run, "times_the_floor": round(seconds / (need / bench.rate), 2),
                }
            )  # fmt: skip
            print(found[-1], flush=True)
    return found


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    only: Annotated[str, typer.Option(help="Rows to run, separated by commas.")] = ",".join(ROWS),
    games: Annotated[Path, typer.Option(help="LLMRank's Games.item, for the row beams.")] = Path("data/Games.item"),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Run the rows and write the JSON after each of them."""
    quiet_libraries()
    bench = Bench(dtype)
    print(f"plain full forward: {bench.rate:,.0f} tokens/s, {torch.get_num_threads()} threads, {dtype}", flush=True)
    kept: dict[str, Any] = {
        **made_by(__file__),
        "model": "smollm2-135m",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "plain_tokens_per_second": round(bench.rate, 1),
        "rows": [],
    }
    for name in only.split(","):
        if name == "rank":
            kept["rows"] += rank(bench)
        elif name == "catalogue":
            kept["rows"] += catalogue(bench)
        elif name == "exact":
            kept["rows"] += exact(bench)
        elif name == "beams":
            kept["rows"] += beams(bench, games)
        elif name == "labels":
            kept["rows"] += labels(bench)
        elif name == "growth":
            kept["growth"] = growth(bench)
        else:
            raise ConfigError(f"unknown row {name!r}", remedy=f"choose among {', '.join(ROWS)}")
        write_json(out, kept)
    print(out)


if __name__ == "__main__":
    script(main)
