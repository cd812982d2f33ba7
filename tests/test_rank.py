"""What the LLM says of candidates: likelihoods and priors, letters, yes and no."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, DataError, ModelError
from penchant.prompt import Templates
from penchant.rank import Ranker, label_logprobs, label_tokens, letters
from penchant.recommend import Recommender
from penchant.resources import shipped
from penchant.run_folder import FitConfig
from penchant.tokens import Prompt, Segment
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine
from tests.tiny import TITLES

N = len(TITLES)


def items(*rows: Sequence[int]) -> list[NDArray[np.int32]]:
    return [np.array(row, dtype=np.int32) for row in rows]


# -- the ranker --------------------------------------------------------------------------------


def ranker(engine: FakeEngine, *, max_history: int = 20, prompt_tokens: int = 400, **kw: Any) -> Ranker:
    return Ranker(engine, Templates(), TITLES, max_history=max_history, prompt_tokens=prompt_tokens, **kw)


def prompt_length(engine: FakeEngine, history: Sequence[int]) -> int:
    """Tokens of the prompt of a history, from the template itself."""
    rendered = Templates().render("next_item", {"history": [{"text": TITLES[i]} for i in history]})
    return len(engine.codec.encode(rendered.prompt))


def test_a_prompt_lists_the_history_oldest_first(fake_engine: FakeEngine) -> None:
    rendered = ranker(fake_engine).prompt(np.array([4, 0, 9]))
    assert rendered.prompt.text.endswith(f":\n{TITLES[4]}\n{TITLES[0]}\n{TITLES[9]}\n")
    assert rendered.dropped == 0
    assert rendered.n_tokens == prompt_length(fake_engine, [4, 0, 9])


def test_max_history_keeps_the_newest_and_counts_the_rest(fake_engine: FakeEngine) -> None:
    rendered = ranker(fake_engine, max_history=2).prompt(np.array([4, 0, 9, 3, 8]))
    assert rendered.prompt.text.endswith(f":\n{TITLES[3]}\n{TITLES[8]}\n")
    assert rendered.dropped == 3


def test_the_token_budget_drops_the_oldest_and_counts_them_with_those_of_max_history(fake_engine: FakeEngine) -> None:
    history = np.arange(N)
    for budget in (prompt_length(fake_engine, []), 60, 90, 120, 400):
        rendered = ranker(fake_engine, max_history=10, prompt_tokens=budget).prompt(history)
        kept = next(n for n in range(10, -1, -1) if prompt_length(fake_engine, history[N - n :]) <= budget)
        assert rendered.dropped == N - kept
        assert rendered.n_tokens == prompt_length(fake_engine, history[N - kept :]) <= budget
        assert rendered.prompt.text.split("\n")[1:-1] == [TITLES[i] for i in history[N - kept :]]


def test_a_budget_below_the_bare_prompt_is_an_error(fake_engine: FakeEngine) -> None:
    too_few = prompt_length(fake_engine, []) - 1
    with pytest.raises(DataError, match="1 over the budget"):
        ranker(fake_engine, prompt_tokens=too_few).prompt(np.array([0]))


@pytest.mark.parametrize("context", [64, 80, 128])
def test_a_prompt_leaves_the_context_room_for_the_longest_item(context: int) -> None:
    engine = FakeEngine(context_length=context)
    made = ranker(engine, prompt_tokens=context)
    longest = max(len(t) for t in made.tokens(range(N)))
    n_tokens = made.prompt(np.arange(N)).n_tokens
    assert n_tokens is not None
    assert n_tokens + longest <= context
    kept = N - made.prompt(np.arange(N)).dropped
    # And no more than that: one event more would not fit.
    assert prompt_length(engine, range(N - kept - 1, N)) + longest > context


def test_an_items_tokens_are_its_text_and_the_terminator_each_on_their_own(fake_engine: FakeEngine) -> None:
    made = ranker(fake_engine)
    end = fake_engine.codec.encode_template("\n")
    for item in (3, 0, 13, 3):
        (tokens,) = made.tokens([item])
        assert tokens == (*fake_engine.codec.encode_data(TITLES[item]), *end)
    assert made.tokens(np.array([5, 2])) == [made.tokens([5])[0], made.tokens([2])[0]]


def test_likelihoods_are_the_engines_scores_of_whole_sequences(fake_engine: FakeEngine) -> None:
    made = ranker(fake_engine, max_history=3)
    histories, candidates = items([1, 2, 3, 4], [], [7]), items([0, 5, 0], [9], [])
    got = made.likelihoods(histories, candidates)
    assert [len(row) for row in got] == [3, 1, 0]
    codec = fake_engine.codec
    for history, row, scores in zip(histories, candidates, got, strict=True):
        text = Templates().render("next_item", {"history": [{"text": TITLES[i]} for i in history[-3:]]}).prompt
        for item, score in zip(row, scores, strict=True):
            path, expected = codec.encode(text), 0.0
            for token in (*codec.encode_data(TITLES[item]), *codec.encode_template("\n")):
                expected += fake_engine._token_logprob(path, token)
                path.append(token)
            assert score == pytest.approx(expected)


def test_priors_are_the_likelihoods_behind_the_bare_prompt_and_each_computed_once(fake_engine: FakeEngine) -> None:
    made = ranker(fake_engine)
    first = made.priors(np.array([3, 1, 3]))
    assert fake_engine.scored == 2
    (alone,) = made.likelihoods(items([]), items([3, 1, 3]))
    assert first.tolist() == pytest.approx(alone.tolist())
    fake_engine.scored = 0
    again = made.priors(np.array([1, 4, 3, 4]))
    assert fake_engine.scored == 1
    assert again[[0, 2]].tolist() == first[[1, 0]].tolist()
    assert np.flatnonzero(~np.isnan(made.prior)).tolist() == [1, 3, 4]
    fake_engine.scored = 0
    made.priors(np.array([], dtype=np.int64))
    made.priors(np.array([1, 3, 4]))
    assert fake_engine.scored == 0


def test_titles_have_a_prior_whatever_the_run_asks(fake_engine: FakeEngine) -> None:
    known = ranker(fake_engine).priors(np.arange(N))
    for question in ("choose", "yes_no"):
        made = ranker(fake_engine, question=question)
        assert made.priors(np.arange(N)).tolist() == [0.0] * N
        assert made.title_priors(np.arange(N)).tolist() == known.tolist()
        assert made.priors(np.arange(N)).tolist() == [0.0] * N


def test_no_candidate_has_no_letter(fake_engine: FakeEngine) -> None:
    made = ranker(fake_engine, question="choose")
    assert [len(row) for row in made.scores(items([1], [2]), items([], []))] == [0, 0]


def test_priors_already_known_are_not_asked_for(fake_engine: FakeEngine) -> None:
    prior = np.full(N, np.nan)
    prior[2] = -7.5
    made = ranker(fake_engine, prior=prior)
    assert made.priors(np.array([2, 0]))[0] == -7.5
    assert fake_engine.scored == 1


def test_items_of_one_title_have_one_prior_whoever_was_asked_about_which(fake_engine: FakeEngine) -> None:
    """Another engine knew item 5 to within its rounding: beside it the same title must not stand above or below."""
    texts = [*TITLES[:5], TITLES[2], *TITLES[6:]]
    prior = np.full(N, np.nan)
    prior[5] = ranker(fake_engine).priors(np.array([2]))[0] + 1e-6
    made = Ranker(fake_engine, Templates(), texts, max_history=20, prompt_tokens=400, prior=prior)
    found = made.priors(np.array([5, 2, 0]))
    assert found[0] == found[1] == made.prior[5] == made.prior[2]
    (score,) = made.likelihoods(items([1]), items([5, 2]))
    assert score[0] == score[1]


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_likelihood_that_is_not_finite_is_refused(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    plain = engine.score

    def score(prompts: Any, continuations: Any, **kw: Any) -> Any:
        out = plain(prompts, continuations, **kw)
        out[-1][-1] = bad
        return out

    monkeypatch.setattr(engine, "score", score)
    made = ranker(engine)
    with pytest.raises(ModelError, match="not a number for row 1"):
        made.likelihoods(items([0], [1]), items([2, 3], [4]))
    with pytest.raises(ModelError, match="not a number for an empty history"):
        made.priors(np.array([2, 3]))
    assert np.isnan(made.prior).all()  # and nothing of it was kept


def test_progress_goes_to_the_engine(fake_engine: FakeEngine) -> None:
    asked: list[Any] = []
    plain = fake_engine.score

    def score(*args: Any, progress: Any = None) -> Any:
        asked.append(progress)
        return plain(*args)

    fake_engine.score = score  # type: ignore[method-assign]
    told: list[int] = []
    ranker(fake_engine).likelihoods(items([0]), items([1]), told.append)
    assert asked == [told.append]


def test_labels_are_scored_as_the_next_token_and_calibrated_by_the_prior(byte_engine: TransformersEngine) -> None:
    def plain(text: str) -> Prompt:
        return Prompt((Segment(text, True),))

    prompts, prior = [plain("Heat (1995)"), plain("Up")], plain("a b")
    got = label_logprobs(byte_engine, prompts, ["A", "B", "7"])
    for prompt, row in zip(prompts, got, strict=True):
        ids = byte_engine.codec.encode(prompt)
        expected = [byte_engine._tree.plain(ids, byte_engine.codec.encode_template(c)).sum() for c in "AB7"]
        np.testing.assert_allclose(row, expected, atol=1e-4)
    calibrated = label_logprobs(byte_engine, prompts, ["A", "B", "7"], prior=prior)
    np.testing.assert_allclose(calibrated, got - label_logprobs(byte_engine, [prior], ["A", "B", "7"]), atol=1e-4)


def test_a_label_of_several_tokens_is_refused(byte_engine: TransformersEngine) -> None:
    with pytest.raises(ConfigError, match="'Perhaps' has"):
        label_logprobs(byte_engine, [], ["A", "Perhaps"])


# -- letters and yes or no -----------------------------------------------------------------------


def questioner(engine: Any, question: Any, tmp_path: Path) -> Ranker:
    """A ranker whose yes/no labels are single tokens of the tiny tokenizer."""
    text = (shipped("prompts") / "yes_no.jinja").read_text(encoding="utf-8")
    (tmp_path / "yes_no.jinja").write_text(text.replace('["Yes", "No"]', '["A", "B"]'), encoding="utf-8")
    return Ranker(engine, Templates(tmp_path), TITLES, max_history=5, prompt_tokens=400, question=question)


def test_letters_do_not_depend_on_the_order_candidates_come_in(fake_engine: FakeEngine, tmp_path: Path) -> None:
    ranker = questioner(fake_engine, "choose", tmp_path)
    history, row = items([1, 2, 3])[0], np.array([4, 9, 0, 7, 12], dtype=np.int32)
    one = ranker.scores([history], [row])[0]
    other = ranker.scores([history], [row[::-1]])[0]
    assert one.tolist() == other[::-1].tolist()
    assert np.exp(one).sum() == pytest.approx(1)


def test_letters_are_those_that_stand_before_the_titles_in_the_prompt(fake_engine: FakeEngine, tmp_path: Path) -> None:
    ranker = questioner(fake_engine, "choose", tmp_path)
    seen: list[str] = []
    answered: list[Any] = []

    def score(prompts: Any, continuations: Any, *, progress: Any = None) -> Any:
        seen.extend(p.text for p in prompts)
        answered.extend(continuations)
        # The model always answers C.
        return [np.array([0.0 if i == 2 else -9.0 for i in range(len(c))]) for c in continuations]

    fake_engine.score = score  # type: ignore[method-assign]
    histories, rows = items([1], [2, 3]), items([5, 6, 7, 8], [9, 10, 11])
    for scores, row, prompt in zip(ranker.scores(histories, rows), rows, seen, strict=True):
        chosen = next(line for line in prompt.splitlines() if line.startswith("C. ")).removeprefix("C. ")
        assert TITLES[row[int(np.argmax(scores))]] == chosen


def test_more_candidates_than_letters_are_refused() -> None:
    assert letters(52)[-1] == "z"
    with pytest.raises(ConfigError, match="at most 52"):
        letters(53)


def test_yes_and_no_are_the_odds_of_the_two_labels(byte_engine: TransformersEngine, tmp_path: Path) -> None:
    ranker = questioner(byte_engine, "yes_no", tmp_path)
    history, row = items([1, 2])[0], items([5, 0, 9])[0]
    got = ranker.scores([history], [row])[0]
    yes, no = (byte_engine.codec.encode_template(label) for label in "AB")
    for item, odds in zip(row, got, strict=True):
        given = {"history": [{"text": TITLES[i]} for i in history], "item": {"text": TITLES[item]}}
        prompt = Templates().render("yes_no", given).prompt
        p = byte_engine.score([prompt], [[yes, no]])[0]
        assert odds == pytest.approx(p[0] - p[1], abs=1e-4)


def test_nothing_is_taken_out_of_letters_or_answers(fake_engine: FakeEngine, tmp_path: Path) -> None:
    ranker = questioner(fake_engine, "choose", tmp_path)
    assert ranker.priors(np.array([3, 4])).tolist() == [0, 0]
    assert fake_engine.scored == 0


@pytest.mark.parametrize("labels", ["", "labels: ['Yes']", "labels: ['Yes', 'No', 'Maybe']"])
def test_yes_and_no_are_two_labels_and_said_before_any_work(
    labels: str, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    header = f"purpose: x\nversion: 1\nformat: plain\nvariables: [history, item]\n{labels}"
    body = "{% for e in history %}{{ e.text }}\n{% endfor %}{{ item.text }}?"
    (tmp_path / "yes_no.jinja").write_text(f"{{#\n{header}\n#}}\n{body}", encoding="utf-8")
    with pytest.raises(ConfigError, match="two labels, yes first"):
        Ranker(fake_engine, Templates(tmp_path), TITLES, max_history=5, prompt_tokens=400, question="yes_no")
    split = leave_last_out(Dataset.read(*toy_frames()))
    with pytest.raises(ConfigError, match="two labels, yes first"):
        Recommender.fit(
            split, fake_engine, FitConfig(question="yes_no"), prompts=tmp_path, stages=lambda *a: pytest.fail("began")
        )


def test_two_labels_of_one_token_are_refused(fake_engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="same token"):
        label_tokens(fake_engine.codec, ["A", "A"])
