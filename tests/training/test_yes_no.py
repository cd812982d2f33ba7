"""yes_no: a positive and its negatives, none of them taken by the user in training; and TALLRec's own format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tests.conftest import SHARED_DATA, toy_frames
from tests.training.helpers import corpus_of, settings
from tests.training.test_choose import Fixed

from penchant.data.dataset import Dataset
from penchant.errors import ConfigError, DataError
from penchant.evaluation.readers import YesNo, read_yes_no
from penchant.evaluation.yes_no import answer_margins
from penchant.prompt import Templates
from penchant.training.config import YesNoConfig
from penchant.training.corpus import Corpus
from penchant.training.recipe import Recipe
from penchant.training.rows import Row
from penchant.training.validation import engine_of, label_scores
from penchant.training.yes_no import answer_tokens, example_row, read_examples, valid_rows, yes_no_rows

TALLREC = SHARED_DATA / "tallrec"


def config(folder: Path, **changes: Any) -> YesNoConfig:
    return settings(folder, YesNoConfig, **{"targets_per_user": 3, "prompt_tokens": 700, **changes})


@pytest.fixture
def rated(byte_folder: Path, prompts: Path) -> Corpus:
    """The toy data with ratings 1 to 5, and two items that only some users take."""
    interactions, items = toy_frames()
    n = len(interactions)
    ratings = np.random.default_rng(1).integers(1, 6, size=n).astype(float)
    return corpus_of(Dataset.read(interactions.with_columns(rating=ratings), items), byte_folder, prompts)


def asked_item(corpus: Corpus, row: Row) -> int:
    """The item a row asks about, read from its prompt."""
    text = corpus.codec.tokenizer.decode(row.tokens.tolist())
    title = text.split("Will the user like this next?\n- ")[1].split("\nAnswer")[0]
    return corpus.texts.index(title)


def is_yes(row: Row) -> bool:
    assert row.at.tolist() == [len(row) - 1], "loss on the label token only"
    assert row.label[0] in row.choices
    return bool(row.label[0] == row.choices[0])


@pytest.mark.parametrize("kinds", [["unexposed"], ["hard"], ["unexposed", "hard"], ["hard", "unexposed"]])
def test_no_negative_is_an_item_the_user_took_and_held_out_ones_are_not_spared(
    corpus: Corpus, byte_folder: Path, kinds: list[str]
) -> None:
    split, log = corpus.split, corpus.split.log
    retriever: Any = Fixed(corpus)  # its candidates include items that the user takes later, and held-out ones
    made = config(byte_folder, negatives=kinds, negatives_per_positive=2, candidates=12)
    trained, valid = list(yes_no_rows(corpus, made, retriever)), valid_rows(corpus, made, retriever, 20)
    assert sum(is_yes(row) for row in trained) == 90
    assert sum(is_yes(row) for row in valid) == 20
    held_out = dict.fromkeys(("valid", "test"), 0)
    for rows in (trained, valid):
        negatives = [row for row in rows if not is_yes(row)]
        assert len(negatives) > 1.4 * sum(is_yes(row) for row in rows)
        for row in negatives:
            mine, item = log.all_of(row.user), asked_item(corpus, row)
            assert item not in log.item[mine][split.train[mine]]
            for name, part in (("valid", split.valid), ("test", split.test)):
                held_out[name] += rows is trained and item in part.item[part.user == row.user]
    assert min(held_out.values()) > 0, "a row that never names them would tell which they are"
    for row in valid:
        assert is_yes(row) or asked_item(corpus, row) not in split.valid.item[split.valid.user == row.user]
    for row in (row for row in trained + valid if is_yes(row)):
        assert asked_item(corpus, row) == log.item[row.targets[0]]


@pytest.mark.parametrize("kinds", [["unexposed"], ["hard"]])
def test_no_prompt_is_taught_both_answers_where_items_share_a_title(
    byte_folder: Path, prompts: Path, kinds: list[str]
) -> None:
    interactions, items = toy_frames()
    twins = items.with_columns(title=items["title"].gather([i // 2 * 2 for i in range(len(items))]))
    corpus = corpus_of(Dataset.read(interactions, twins.drop("genres", "year")), byte_folder, prompts)
    made = config(byte_folder, negatives=kinds, negatives_per_positive=3, candidates=12)
    retriever: Any = Fixed(corpus)
    for rows in (list(yes_no_rows(corpus, made, retriever)), valid_rows(corpus, made, retriever, 20)):
        answers: dict[tuple[int, bytes], set[bool]] = {}
        for row in rows:
            answers.setdefault((row.user, row.tokens.tobytes()), set()).add(is_yes(row))
        assert all(len(said) == 1 for said in answers.values())
        assert any(said == {False} for said in answers.values())


def test_hard_negatives_are_the_retrievers_and_kinds_take_turns(corpus: Corpus, byte_folder: Path) -> None:
    log = corpus.split.log
    retriever: Any = Fixed(corpus)
    rows = list(yes_no_rows(corpus, config(byte_folder, negatives=["hard"], candidates=4), retriever))
    negatives = [row for row in rows if not is_yes(row)]
    assert negatives
    for row in negatives:
        pool = retriever.candidates(row.targets, 4).items[0]
        mine = log.all_of(row.user)
        assert asked_item(corpus, row) in set(pool.tolist()) - set(log.item[mine][corpus.split.train[mine]].tolist())
    both = list(yes_no_rows(corpus, config(byte_folder, negatives_per_positive=2, candidates=16), retriever))
    assert sum(not is_yes(row) for row in both) == 2 * sum(is_yes(row) for row in both)


def test_a_history_stands_before_its_target_and_says_what_was_liked(rated: Corpus, byte_folder: Path) -> None:
    made = config(byte_folder, like_threshold=4, negatives=["unexposed", "disliked"])
    rows = list(yes_no_rows(rated, made, None))
    log = rated.split.log
    for row in rows:
        target = int(row.targets[0])
        past = np.arange(log.before(target).start, target)[-8:]
        assert row.inputs.tolist() == past.tolist()
        text = rated.codec.tokenizer.decode(row.tokens.tolist())
        for p in past:
            said = "liked" if rated.ratings[p] >= 4 else "disliked"
            assert f"- {rated.texts[log.item[p]]} ({said})\n" in text


def test_below_the_threshold_is_a_no_and_never_a_yes(rated: Corpus, byte_folder: Path) -> None:
    log = rated.split.log
    rows = list(yes_no_rows(rated, config(byte_folder, like_threshold=4, negatives=["disliked"]), None))
    assert {is_yes(row) for row in rows} == {True, False}
    for row in rows:
        assert asked_item(rated, row) == log.item[row.targets[0]]
        assert is_yes(row) == (rated.ratings[row.targets[0]] >= 4)
    targets = [int(row.targets[0]) for row in rows]
    assert sorted(targets) == sorted(p for positions in rated.train_positions for p in positions[1:][-3:])
    # Without the kind, disliked events are no targets at all.
    only = list(yes_no_rows(rated, config(byte_folder, like_threshold=4, negatives=["unexposed"]), None))
    assert all(rated.ratings[row.targets[0]] >= 4 for row in only)


def test_a_threshold_without_ratings_is_refused(corpus: Corpus, byte_folder: Path) -> None:
    with pytest.raises(DataError, match="not every event has a rating"):
        list(yes_no_rows(corpus, config(byte_folder, like_threshold=3, negatives=["unexposed"]), None))


def test_disliked_negatives_without_a_threshold_are_refused(byte_folder: Path) -> None:
    """Nothing would be disliked: every answer would be yes."""
    with pytest.raises(ValidationError, match="like_threshold"):
        config(byte_folder, negatives=["disliked"])


def test_labels_of_several_tokens_are_refused(byte_folder: Path, toy: Dataset) -> None:
    corpus = corpus_of(toy, byte_folder)  # the shipped template's Yes and No
    with pytest.raises(ConfigError, match="'Yes' has 2 tokens"):
        list(yes_no_rows(corpus, config(byte_folder, negatives=["unexposed"]), None))


@pytest.mark.parametrize(("labels", "words"), [('["A"]', "two labels"), ('["A", "A"]', "same token")])
def test_labels_that_are_not_two_are_refused(
    toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path, labels: str, words: str
) -> None:
    text = (prompts / "yes_no.jinja").read_text(encoding="utf-8")
    (tmp_path / "yes_no.jinja").write_text(text.replace('["A", "B"]', labels), encoding="utf-8")
    corpus = corpus_of(toy, byte_folder, tmp_path)
    with pytest.raises(ConfigError, match=words):
        answer_tokens(corpus.templates, corpus.codec)


# -- TALLRec's format ------------------------------------------------------------------------------


def entry(liked: str, disliked: str, target: str, output: str = "Yes.", kind: str = "movie") -> dict[str, str]:
    lines = [f"User Preference: {liked}", f"User Unpreference: {disliked}"]
    lines.append(f'Whether the user will like the target {kind} "{target}"?')
    return {"instruction": "Given the user's preference ...", "input": "\n".join(lines), "output": output}


def written(path: Path, rows: Any) -> Path:
    text = json.dumps(rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_examples_are_read_as_they_are_released(tmp_path: Path, name: str) -> None:
    rows = [
        entry('"Paris, Texas (1984)", "Rebel Without a Cause (1955)"', '"Kalifornia (1993)"', "Orlando (1993)", "No."),
        entry("", '"Dave (1993)"', 'The "Burbs", or so (1989)'),
        entry('"Hate (Haine, La) (1995)", "Don\'t Be a "Menace" (1996)", "Seven, "Se7en" (1995)"', "", "M?"),
    ]
    first, second, third = read_examples(written(tmp_path / name, rows))
    assert first.liked == ("Paris, Texas (1984)", "Rebel Without a Cause (1955)")
    assert first.disliked == ("Kalifornia (1993)",)
    assert (first.target, first.answer) == ("Orlando (1993)", False)
    assert (second.liked, second.disliked) == ((), ("Dave (1993)",))
    assert (second.target, second.answer) == ('The "Burbs", or so (1989)', True)
    assert third.liked[:2] == ("Hate (Haine, La) (1995)", 'Don\'t Be a "Menace" (1996)')
    assert third.target == "M?"


def test_the_book_form_names_the_writer(tmp_path: Path) -> None:
    liked = '"The Bean Trees" written by Barbara Kingsolver, "Sula" written by Toni Morrison'
    row = entry(liked, "", '"Epitaph for a Peach" written by David M. Masumoto', kind="book")
    (found,) = read_examples(written(tmp_path / "b.json", [row]))
    assert found.liked == ("The Bean Trees by Barbara Kingsolver", "Sula by Toni Morrison")
    assert found.target == "Epitaph for a Peach by David M. Masumoto"


BAD: dict[str, Any] = {
    "no mapping": "text",
    "no input": {"instruction": "", "output": "Yes."},
    "no target": {"input": "User Preference: \nUser Unpreference: ", "output": "Yes."},
    "no quotes": {"input": "Whether the user will like the target movie Heat?", "output": "Yes."},
    "another answer": entry("", "", "Heat", "Perhaps."),
    "no output": {"input": entry("", "", "Heat")["input"]},
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_not_so_is_refused_by_its_number(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "bad.json", [entry("", "", "Heat"), BAD[name]])
    with pytest.raises(DataError, match="no example of TALLRec's") as raised:
        read_examples(path)
    assert raised.value.where == f"{path}, row 1"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\x1f\x8bxx", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_examples(path)
    assert str(path) in str(raised.value.where)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "absent.json")


def test_a_torn_gzip_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json.gz", [entry("", "", "Heat")] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(path)
    path.write_bytes(path.read_bytes()[:12] + b"\xff" * 40)
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(path)


def test_an_example_as_a_row(corpus: Corpus, byte_folder: Path, tmp_path: Path) -> None:
    (example,) = read_examples(written(tmp_path / "x.json", [entry('"Heat"', '"Up"', "Alien", "No.")]))
    labels = answer_tokens(corpus.templates, corpus.codec)
    row = example_row(example, corpus.templates, corpus.codec, config(byte_folder), labels)
    text = corpus.codec.tokenizer.decode(row.tokens.tolist())
    assert "- Heat (liked)\n- Up (disliked)\n" in text
    assert "Will the user like this next?\n- Alien\n" in text
    assert row.label.tolist() == [labels[1]]
    assert row.choices.tolist() == labels


@pytest.mark.skipif(not TALLREC.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("file", "n"),
    [("movie/train", 8000), ("movie/valid", 1000), ("movie/test", 1000), ("book/valid", 2427), ("book/test", 2427)],
)
def test_the_released_files_are_read_whole(file: str, n: int) -> None:
    path = TALLREC / f"{file}.json.gz"
    examples = read_examples(path)
    raw = json.loads(gzip.decompress(path.read_bytes()))
    assert len(examples) == len(raw) == n
    assert [e.answer for e in examples] == [r["output"] == "Yes." for r in raw]
    for example, row in zip(examples, raw, strict=True):
        assert example.target
        assert all(example.liked)
        assert all(example.disliked)
        # Each title as it stands there, and no quotation mark of the format left at its ends.
        for title in (*example.liked, *example.disliked, example.target):
            assert '" written by ' not in title
            assert f'"{title.split(" by ")[0]}' in row["input"]
    if file == "movie/test":
        assert np.mean([e.answer for e in examples]) == pytest.approx(0.528, abs=5e-4)


@pytest.mark.skipif(not TALLREC.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("file", ["movie/test", "book/test"])
def test_as_many_titles_as_the_released_files_name(file: str) -> None:
    """Counted in another way: the movie form ends every title with its year, the book form names every writer."""
    for row, example in zip(
        json.loads(gzip.decompress((TALLREC / f"{file}.json.gz").read_bytes())),
        read_examples(TALLREC / f"{file}.json.gz"),
        strict=True,
    ):
        history = row["input"].split("\nWhether")[0]
        mark = '"' if file.startswith("movie") else '" written by'
        counted = history.count(mark) // 2 if mark == '"' else history.count(mark)
        assert len(example.liked) + len(example.disliked) == counted


def test_a_test_row_is_scored_as_training_scores_it(byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Two readers, two ways through the model: the evaluation's answers are those that the recipe is judged by."""
    rows = [
        {
            "input": f'User Preference: "Heat (1995)", "M (1931)"\nUser Unpreference: "Up (2009)"\nWhether the user '
            f'will like the target movie "{title}"?',
            "output": "Yes." if i % 2 else "No.",
        }
        for i, title in enumerate(["Alien (1979)", "Se7en (1995)", "Aliens (1986)"])
    ]
    path = tmp_path / "test.json"
    path.write_text(json.dumps(rows))
    recipe = Recipe("yes_no", config(byte_folder, prompts=str(prompts), examples=str(path)), None)
    labels = answer_tokens(recipe.templates, recipe.codec)
    trained = [
        example_row(e, recipe.templates, recipe.codec, recipe.config, labels)  # type: ignore[arg-type]
        for e in read_examples(path)
    ]
    logp = label_scores(recipe.student, trained, 4096)
    reader = YesNo(kind="tallrec", folder="none", train=path.name, valid=path.name, test=path.name)
    margins = answer_margins(
        engine_of(recipe.student, recipe.tokenizer),
        recipe.templates,
        read_yes_no(reader, "test", tmp_path),
        prompt_tokens=700,
    )
    assert np.ptp(margins) > 1e-4
    np.testing.assert_allclose(margins, logp[:, 0] - logp[:, 1], atol=1e-4)


def test_the_templates_of_this_folder_have_single_token_labels(prompts: Path) -> None:
    assert Templates(prompts).headers["yes_no"].labels == ["A", "B"]
