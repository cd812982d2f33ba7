"""What a model knows of a catalogue's titles by heart, before it has seen any user.

A title's first half is given and the model is asked for the rest, as Carlini et al. ("Extracting Training Data
from Large Language Models", 2021; "Quantifying Memorization Across Neural Language Models", 2023) ask for the rest
of a training document. A public catalogue that a model can recite was in its training data, and with it, perhaps,
what people wrote about which items go together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.errors import ConfigError, DataError
from penchant.evaluation.statistics import Estimate, bootstrap_mean
from penchant.tokens import Prompt, Segment

if TYPE_CHECKING:
    from penchant.engine import Engine
    from penchant.tokens import TextCodec

PREAMBLE = "Titles, one a line:\n"
_END = "\n"
# As catalogues sort their titles: "Godfather, The". Asked for its rest, the article would be a gift.
_ARTICLE = re.compile(r"^(.*\S), (the|an?|l[ae]s?|el|los|il|lo|gli|d[ie]r?|das|une?)$", re.IGNORECASE)
_YEAR = re.compile(r"^(.*\S)\s*\((\d{4})\)$")
_HALF = math.log(0.5)
# Recited titles named in the answer.
_NAMED = 20
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TitleRecall:
    """What came back of ``recited.n`` sampled titles; means with 95% bootstrap intervals over the titles.

    ``recited``: greedy decoding over the whole vocabulary gives the rest, token for token. ``probability``: that one
    random sample from the model is exactly the rest (Hayes et al. 2024, "Measuring memorization through
    probabilistic discovery"). ``chosen``: the true half is more probable than those of other titles, which by
    ``chance`` it would be that often, though grammar alone does better than chance.
    ``left_out`` counts distinct titles that have no second half, by reason.
    """

    recited: Estimate
    probability: Estimate
    chosen: Estimate
    chance: float
    eligible: int
    left_out: dict[str, int]
    titles: list[str]


@dataclass(frozen=True, slots=True)
class YearRecall:
    """Whether a title's year is the model's first choice among ``first`` to ``last``, beside always saying one year.

    ``base`` is how often the catalogue's commonest year is right on the same titles, ``above_base`` the paired
    difference, ``within_one`` how often the first choice is off by a year at most.
    """

    correct: Estimate
    base: Estimate
    above_base: Estimate
    within_one: Estimate
    first: int
    last: int
    commonest: int
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Halved:
    title: str
    prompt: str
    rest: Tokens


def title_recall(
    engine: Engine,
    texts: Sequence[str],
    *,
    n: int = 200,
    seed: int = 0,
    shots: int = 4,
    choices: int = 20,
    preamble: str = PREAMBLE,
) -> TitleRecall:
    """Ask for the second half of up to ``n`` distinct titles, drawn with ``seed``.

    A year in brackets at the end is no part of the title here (`year_recall` asks for it): with it, half of a
    title's tokens would be the year. An article at the end ("Godfather, The") goes to the front. The first half of
    the words, the odd one included, stands in the prompt behind ``preamble`` and ``shots`` other titles, the same
    for all, that show what is wanted. Titles of one word and those whose halves are not halves of the title's
    tokens are left out and counted. Raises DataError where none is left.

    For ``chosen`` the true half stands against ``choices`` - 1 second halves of other titles, the nearest in number
    of tokens (drawn with ``seed`` among equals), so that no half wins by its length.
    """
    _check(n, shots)
    if choices < 2:
        raise ConfigError(f"choices is {choices}", where="recall", remedy="give 2 or more")
    titles = sorted({_bare(text) for text in texts})
    halved, left_out = _halved(engine.codec, titles)
    if len(halved) <= shots:
        raise DataError(
            f"{len(halved)} titles have a second half that could be asked for, and {shots} are shown as examples",
            where="title recall",
            remedy="give titles of two words and more, or fewer shots",
        )
    order = np.random.default_rng(seed).permutation(len(halved))
    shown, asked = order[:shots], np.sort(order[shots : shots + n])
    drawn = [halved[i] for i in asked]
    prompts = [_prompt(preamble, [halved[i].title for i in shown], one.prompt) for one in drawn]
    rests = [one.rest for one in drawn]
    others = _others(sorted({one.rest for one in halved}), rests, choices - 1, seed)
    asked_of = [[*_beginnings(rest), *wrong] for rest, wrong in zip(rests, others, strict=True)]
    sums = engine.score(prompts, asked_of)
    parts = [np.diff(row[: len(rest)], prepend=0.0) for row, rest in zip(sums, rests, strict=True)]
    recited = _recited(engine, prompts, rests, parts)
    # A tie is a miss.
    chosen = [bool((row[len(rest) :] < row[len(rest) - 1]).all()) for row, rest in zip(sums, rests, strict=True)]
    return TitleRecall(
        recited=_share(recited, seed),
        probability=bootstrap_mean(np.exp([part.sum() for part in parts]), seed),
        chosen=_share(chosen, seed),
        chance=float(np.mean([1 / (1 + len(wrong)) for wrong in others])),
        eligible=len(halved),
        left_out=left_out,
        titles=[one.title for one, known in zip(drawn, recited, strict=True) if known][:_NAMED],
    )


def year_recall(
    engine: Engine, texts: Sequence[str], *, n: int = 200, seed: int = 0, shots: int = 4, preamble: str = PREAMBLE
) -> YearRecall | None:
    """Ask for the year of up to ``n`` distinct titles that end in "(YYYY)"; None where fewer than half of them do.

    The candidates are all years from the catalogue's first to its last, scored as " (YYYY)" after the title; the
    true one must be above all others (a tie is a miss). Titles that stand there with several years are left out.
    """
    _check(n, shots)
    found = [match for text in sorted(set(texts)) if (match := _YEAR.match(text))]
    if 2 * len(found) < len(set(texts)):
        return None
    times = Counter(match[1] for match in found)
    dated = [(match[1], int(match[2])) for match in found if times[match[1]] == 1]
    if len(dated) <= shots:
        return None
    years = list(range(min(year for _, year in dated), max(year for _, year in dated) + 1))
    drawn, merged = _drawn(engine.codec, dated, years, n + shots, seed)
    shown, asked = drawn[:shots], drawn[shots:]
    if not asked:
        return None
    examples = [f"{title} ({year})" for title, year, _ in shown]
    prompts = [_prompt(preamble, examples, title) for title, _, _ in asked]
    scores = engine.score(prompts, [rests for _, _, rests in asked])
    truth = np.array([year for _, year, _ in asked])
    commonest = min(Counter(year for _, year in dated).most_common(), key=lambda pair: (-pair[1], pair[0]))[0]
    correct = [int((s >= s[year - years[0]]).sum()) == 1 for s, year in zip(scores, truth, strict=True)]
    said = np.array([years[int(np.argmax(s))] for s in scores])
    base = truth == commonest
    return YearRecall(
        correct=_share(correct, seed),
        base=_share(base, seed),
        above_base=bootstrap_mean(np.array(correct, dtype=np.float64) - base, seed),
        within_one=_share(np.abs(said - truth) <= 1, seed),
        first=years[0],
        last=years[-1],
        commonest=commonest,
        left_out={
            "no year": len(set(texts)) - len(found),
            "several years": len(found) - len(dated),
            "the year merges with the title's tokens": merged,
        },
    )


def _drawn(
    codec: TextCodec, dated: Sequence[tuple[str, int]], years: Sequence[int], n: int, seed: int
) -> tuple[list[tuple[str, int, list[Tokens]]], int]:
    """Up to ``n`` titles in random order with the tokens of each year behind them, and how many had to be passed."""
    out: list[tuple[str, int, list[Tokens]]] = []
    merged = 0
    for i in np.random.default_rng(seed).permutation(len(dated)):
        if len(out) == n:
            break
        title, year = dated[i]
        rests = _rests(codec, title, years)
        if rests is None:
            merged += 1
        else:
            out.append((title, year, rests))
    return out, merged


# -- halves ------------------------------------------------------------------------------------


def _check(n: int, shots: int) -> None:
    for name, value, least in (("n", n, 1), ("shots", shots, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}", where="recall", remedy=f"give {least} or more")


def _bare(text: str) -> str:
    """A title without its year, its article in front."""
    dated = _YEAR.match(text)
    title = dated[1] if dated else text
    inverted = _ARTICLE.match(title)
    return f"{inverted[2]} {inverted[1]}" if inverted else title


def _halved(codec: TextCodec, titles: Sequence[str]) -> tuple[list[_Halved], dict[str, int]]:
    """Titles cut after the first half of their words, where a title's tokens can be cut there."""
    out = []
    left_out = {"one word": 0, "halves merge in tokens": 0}
    for title in titles:
        words = title.split(" ")
        start = " ".join(words[: math.ceil(len(words) / 2)])
        if len(words) < 2:
            left_out["one word"] += 1
        elif (rest := _rest(codec, start, title)) is None:
            left_out["halves merge in tokens"] += 1
        else:
            out.append(_Halved(title, start, rest))
    return out, left_out


def _rest(codec: TextCodec, start: str, whole: str) -> Tokens | None:
    """The tokens of ``whole`` behind those of ``start``; None where they aren't its beginning."""
    first, all_ = codec.encode_data(start), codec.encode_data(whole)
    return all_[len(first) :] if len(all_) > len(first) and all_[: len(first)] == first else None


def _rests(codec: TextCodec, title: str, years: Sequence[int]) -> list[Tokens] | None:
    found = [_rest(codec, title, f"{title} ({year})") for year in years]
    known = [rest for rest in found if rest is not None]
    if len(known) < len(found):
        return None
    # What all end with, the bracket, says nothing of the year.
    same = 0
    while len(known) > 1 and min(map(len, known)) > same + 1 and len({rest[-1 - same] for rest in known}) == 1:
        same += 1
    return [rest[: len(rest) - same] for rest in known]


def _prompt(preamble: str, shown: Sequence[str], start: str) -> Prompt:
    segments = [Segment(preamble, False)]
    for title in shown:
        segments += [Segment(title, True), Segment(_END, False)]
    return Prompt((*segments, Segment(start, True)))


# -- asking ------------------------------------------------------------------------------------


def _beginnings(rest: Tokens) -> list[Tokens]:
    return [rest[: i + 1] for i in range(len(rest))]


def _others(halves: Sequence[Tokens], rests: Sequence[Tokens], n: int, seed: int) -> list[list[Tokens]]:
    """For each rest the ``n`` distinct halves that are not it and nearest to it in length."""
    rng = np.random.default_rng(seed)
    length = np.array([len(half) for half in halves])
    out = []
    for rest in rests:
        order = np.lexsort((rng.random(len(halves)), np.abs(length - len(rest))))
        out.append([halves[i] for i in order[: n + 1] if halves[i] != rest][:n])
    return out


def _recited(
    engine: Engine, prompts: Sequence[Prompt], rests: Sequence[Tokens], logprobs: Sequence[NDArray[np.float64]]
) -> list[bool]:
    """Whether each token of a rest is the most probable of the whole vocabulary after those before it.

    A token with more than half of the probability is. The first tokens of all rests are asked for together, since
    most that fail fail there; then a rest's others, the least probable first.
    """
    vocabulary = range(len(engine.codec.tokenizer))
    out = [True] * len(rests)
    unsure = [i for i, logprob in enumerate(logprobs) if logprob[0] <= _HALF]
    first = CatalogTrie.build([(token,) for token in vocabulary])
    for i, found in zip(unsure, engine.generate([prompts[i] for i in unsure], first, 1), strict=True):
        out[i] = found[0].item == rests[i][0]
    for i, (prompt, rest, logprob) in enumerate(zip(prompts, rests, logprobs, strict=True)):
        for at in np.argsort(logprob, kind="stable"):
            if not out[i] or logprob[at] > _HALF:
                break
            if at > 0:
                trie = CatalogTrie.build([(*rest[:at], token) for token in vocabulary])
                out[i] = engine.generate([prompt], trie, 1)[0][0].item == rest[at]
    return out


def _share(hits: Sequence[bool] | NDArray[np.bool_], seed: int) -> Estimate:
    return bootstrap_mean(np.asarray(hits, dtype=np.float64), seed)
