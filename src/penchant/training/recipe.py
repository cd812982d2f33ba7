"""One recipe on one dataset: its rows, its loss and its validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.adapter_card import check_templates
from penchant.data.provenance import Own, check_rows
from penchant.data.split import Split
from penchant.engine.blocks import context_of
from penchant.engine.device import resolve_device, resolve_dtype
from penchant.engine.folders import fingerprint_of, resolve_model
from penchant.engine.weights import load_tokenizer
from penchant.errors import ConfigError
from penchant.files import sha256_file, sha256_text
from penchant.interest.vectors import default_layer, item_vectors
from penchant.prompt import Templates
from penchant.recommend import Stages, silent
from penchant.tokens import MAX_DATA_CHARS, TextCodec, clean
from penchant.training import choose, contrastive, next_item, preference, yes_no
from penchant.training.batch import Batch
from penchant.training.candidates import Retriever
from penchant.training.config import (
    CONFIGS,
    ChooseConfig,
    ContrastiveConfig,
    NextItemConfig,
    PreferenceConfig,
    TrainConfig,
    YesNoConfig,
)
from penchant.training.corpus import Corpus
from penchant.training.objectives import Loss, StepLoss, task_loss
from penchant.training.rows import Row
from penchant.training.start import started
from penchant.training.store import RowStore, stored_rows
from penchant.training.student import Student, load_student
from penchant.training.task import Task
from penchant.training.validation import AnswerScore, LetterScore, LikelihoodScore, NearestScore, engine_of

# Held-out rows of every run: enough that the loss is steady, few enough to be cheap.
_VALID_ROWS = 200
# Training rows whose provenance is looked at together.
_CHECKED = 50_000
# The templates that decide what each recipe's model must be served with.
TEMPLATES = {
    "next_item": ("item", "next_item"),
    "preference": ("item", "next_item"),
    "yes_no": ("item", "user", "yes_no"),
    "choose": ("item", "user", "choose"),
    "contrastive": ("item", "user"),
}


@dataclass(eq=False)
class Recipe:
    """One recipe on one dataset: what both training and `--dry-run` are made of.

    ``stages`` is told of what takes a while before the first step, once it has begun: not of what is in the cache.
    """

    name: str
    config: TrainConfig
    split: Split | None
    stages: Stages = silent
    _embedded: Callable[[int], None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        kind = CONFIGS.get(self.name)
        if kind is None:
            raise ConfigError(
                f"no recipe is called {self.name!r}", where="training", remedy=f"use one of: {', '.join(CONFIGS)}"
            )
        if not isinstance(self.config, kind):
            raise ConfigError(
                f"wants settings of type {kind.__name__}, and got {type(self.config).__name__}", where=self.name
            )
        config = started(self.config)
        # What "auto" is on this machine stands in what the run leaves: it cannot go on with other numbers elsewhere.
        numbers = resolve_dtype(config.dtype, resolve_device(config.device))
        self.config = config.model_copy(update={"dtype": numbers})
        self.templates = Templates(self.config.prompts)
        self.base = resolve_model(self.config.model)
        self.tokenizer = load_tokenizer(self.base)
        self.codec = TextCodec(self.tokenizer)
        check_templates(self.config.start_from, self.templates)

    @cached_property
    def corpus(self) -> Corpus:
        if self.split is None:
            raise ConfigError("needs a dataset", where=self.name, remedy="give --data FOLDER of `penchant prepare`")
        return Corpus.of(self.split, self.templates, self.codec)

    @cached_property
    def student(self) -> Student:
        """The model to be trained, loaded when first needed."""
        return load_student(self.config)

    @cached_property
    def retriever(self) -> Retriever:
        """Encoders over the untuned model's item vectors, the same that `penchant fit` would make."""
        corpus, student = self.corpus, self.student
        name = fingerprint_of(self.base) + f":{str(student.dtype).removeprefix('torch.')}"
        if self.config.quantization != "none":
            name += f":{self.config.quantization}"
        if self.config.start_from is not None:
            with student.adapter_off():
                vectors = self._vectors(name)
        else:
            vectors = self._vectors(name)  # a new adapter is zero: the model is still its base
        return Retriever(
            corpus.split,
            vectors,
            self.config.retriever,
            seed=self.config.seed,
            key=(name, self.templates.hash("item")),
            stages=self.stages,
        )

    def _vectors(self, name: str) -> NDArray[np.float32]:
        engine = engine_of(self.student, self.tokenizer, name)
        return item_vectors(
            engine,
            self.corpus.texts,
            layer=default_layer(engine.n_layers),
            template_hash=self.templates.hash("item"),
            progress=self._embedding,
        )

    def _embedding(self, n: int) -> None:
        if self._embedded is None:
            self._embedded = self.stages("embed items", len(self.corpus.texts))
        self._embedded(n)

    # -- rows ----------------------------------------------------------------------------------

    def rows(self) -> RowStore:
        """All training rows (a seeded sample where max_rows says so), from the cache where they were made before.

        DataError where one of them, cached or new, holds an event that is held out or not before its target.
        """
        dropped = (lambda: self.corpus.dropped) if self.split is not None else (lambda: 0)
        found = stored_rows(self._key(), self._made_now, dropped)
        if self.split is not None and "examples" not in self.example_files:
            own = Own.of(self.split)
            for start in range(0, len(found), _CHECKED):
                check_rows(self.split, found.provenance(slice(start, start + _CHECKED)), "train", own=own)
        return found

    @property
    def example_files(self) -> dict[str, Path]:
        """The files of examples that stand in for a dataset, by their settings: these do not say which events they
        were made of.
        """
        named = ((name, getattr(self.config, name, None)) for name in ("examples", "valid_examples"))
        return {name: Path(path) for name, path in named if path is not None and Path(path).is_file()}

    def _made_now(self) -> Iterator[Row]:
        self.stages("make the training rows", None)
        return self._sampled(self._make())

    def _make(self) -> Iterator[Row]:
        config = self.config
        if isinstance(config, NextItemConfig):
            return next_item.next_item_rows(self.corpus, config)
        if isinstance(config, PreferenceConfig):
            return preference.preference_rows(self.corpus, config, self.retriever)
        if isinstance(config, ChooseConfig):
            return choose.choose_rows(self.corpus, config, self.retriever)
        if isinstance(config, ContrastiveConfig):
            return contrastive.contrastive_rows(self.corpus, config, self.retriever if config.hard else None)
        if isinstance(config, YesNoConfig):
            if config.examples is not None:
                return self._example_rows(config.examples)
            hard = self.retriever if "hard" in config.negatives else None
            return yes_no.yes_no_rows(self.corpus, config, hard)
        raise ConfigError(f"no recipe for {type(config).__name__}", where="training")

    def _example_rows(self, path: str) -> Iterator[Row]:
        config = self.config
        if not isinstance(config, YesNoConfig):
            raise ConfigError("examples are for yes_no", where=self.name)
        labels = yes_no.answer_tokens(self.templates, self.codec)
        for example in yes_no.read_examples(path):
            yield yes_no.example_row(example, self.templates, self.codec, config, labels)

    def _sampled(self, rows: Iterator[Row]) -> Iterator[Row]:
        if self.config.max_rows is None:
            yield from rows
            return
        every = list(rows)
        keep = np.random.default_rng(self.config.seed).permutation(len(every))[: self.config.max_rows]
        yield from (every[i] for i in np.sort(keep))

    def valid(self) -> list[Row]:
        """Held-out rows for the loss; DataError where one holds an event that is not before its target."""
        config, rows = self.config, list[Row]()
        if isinstance(config, NextItemConfig):
            rows = next_item.valid_rows(self.corpus, config, _VALID_ROWS)
        elif isinstance(config, PreferenceConfig):
            rows = preference.valid_rows(self.corpus, config, self.retriever, _VALID_ROWS)
        elif isinstance(config, ChooseConfig):
            rows = choose.valid_rows(self.corpus, config, self.retriever, _VALID_ROWS)
        elif isinstance(config, ContrastiveConfig):
            rows = contrastive.valid_rows(self.corpus, config, self.retriever if config.hard else None, _VALID_ROWS)
        elif isinstance(config, YesNoConfig) and config.examples is None:
            hard = self.retriever if "hard" in config.negatives else None
            rows = yes_no.valid_rows(self.corpus, config, hard, max(_VALID_ROWS, config.eval_users))
        elif isinstance(config, YesNoConfig) and config.valid_examples is not None:
            every = list(self._example_rows(config.valid_examples))
            # A sample: such files stand in order of users.
            drawn = np.random.default_rng(config.seed).permutation(len(every))[: max(_VALID_ROWS, config.eval_users)]
            rows = [every[i] for i in np.sort(drawn)]
        if self.split is not None and "examples" not in self.example_files:
            check_rows(self.split, rows, "valid")
        return rows

    def _key(self) -> tuple[str, ...]:
        """All that decides the rows."""
        config, split = self.config, self.split
        data = ("none",) if split is None else (split.dataset.content_hash, repr(sorted(split.spec.items())))
        files = tuple(sha256_file(path) for name, path in self.example_files.items() if name == "examples")
        tokenizer = sha256_text(*(f"{t} {i}" for t, i in sorted(self.tokenizer.get_vocab().items())))
        return (
            self.name,
            config.model_dump_json(exclude=_NOT_ROWS),
            self.templates.hash(),
            tokenizer,
            fingerprint_of(self.base),  # the retriever's encoders stand on its vectors
            *data,
            *files,
        )

    # -- the task ------------------------------------------------------------------------------

    def task(self) -> Task:
        """Rows, loss and validation for the loop."""
        valid = self.valid()
        loss, weight = self.objective()
        score, name = self.score(valid, self.config)
        rows = self.rows()
        self.require_context(rows)
        self.require_context(valid)
        return Task(self.name, rows, valid, loss, weight, score, name, self.notes)

    @property
    def notes(self) -> list[str]:
        """What is to be said of the data before anything is trained on it."""
        cut = self.texts_cut
        return [f"{cut} item texts were cut to their first {MAX_DATA_CHARS} characters, as targets too"] if cut else []

    @cached_property
    def texts_cut(self) -> int:
        """How many item texts are longer than what is read of them."""
        if self.split is not None and "examples" not in self.example_files:
            return self.corpus.truncated
        read = [one for path in self.example_files.values() for one in yes_no.read_examples(path)]
        titles = {title for one in read for title in (*one.liked, *one.disliked, one.target)}
        return sum(len(clean(title, None)) > MAX_DATA_CHARS for title in titles)

    def objective(self) -> tuple[Loss | StepLoss, Callable[[Batch], float]]:
        """The summed loss of a batch or of a step, and what it is divided by."""
        if isinstance(self.config, ContrastiveConfig):
            return contrastive.InfoNCE(self.corpus, self.config), contrastive.n_pairs
        return task_loss(self.name, self.config)

    @property
    def template_names(self) -> tuple[str, ...]:
        """The templates that the trained model must be served with."""
        return TEMPLATES[self.name]

    @property
    def served_as(self) -> dict[str, Any]:
        """What else of the card serving must keep to: where the vectors of a model trained to embed are taken, and
        whether its histories said what was liked.
        """
        if isinstance(self.config, YesNoConfig):
            return {"marks_likes": self.config.examples is not None or self.config.like_threshold is not None}
        if not isinstance(self.config, ContrastiveConfig):
            return {}
        return {"vectors": {"layer": self.student.layer, "pooling": self.config.pooling}}

    def require_context(self, rows: RowStore | Sequence[Row]) -> None:
        """Guard: positions past a model's context are trained, or measured, to no purpose, and without a word from the
        model. Branches of a row begin where they leave its trunk.
        """
        context = context_of(self.student.causal_lm.config.get_text_config())
        lengths = rows.lengths if isinstance(rows, RowStore) else np.array([len(row) for row in rows])
        longest = max((1 + int(rows[int(i)].position.max()) for i in np.flatnonzero(lengths > context)), default=0)
        if longest > context:
            raise ConfigError(
                f"a row reaches {longest} tokens, and the model's context only {context}",
                where="training",
                remedy="lower pack_tokens, prompt_tokens, max_history or window",
            )

    def score(
        self, valid: Sequence[Row], config: TrainConfig
    ) -> tuple[Callable[[Student], dict[str, float]] | None, str]:
        """What measures a student on validation users, and the name of its figure that decides; None without any."""
        if config.eval_users == 0:
            return None, ""
        if isinstance(config, YesNoConfig):
            return (AnswerScore(valid, config), "AUC") if valid else (None, "")
        targets = self.corpus.split.valid.sample(config.eval_users, config.seed)
        if isinstance(config, ChooseConfig):
            return LetterScore(
                self.corpus, config, targets, self.retriever.for_targets(targets, config.letters)
            ), "NDCG@10"
        if isinstance(config, ContrastiveConfig):
            return NearestScore(self.corpus, config, targets, self.tokenizer), "NDCG@10"
        found = self.retriever.for_targets(targets, config.candidates)
        beside = isinstance(config, PreferenceConfig) and config.beside > 0
        score = LikelihoodScore(self.corpus, config, targets, found, self.tokenizer)
        # Beside the retriever the held-out loss, which is of the two together, decides: the LLM's own order is not what
        # is trained, and the fused one stays the retriever's until the LLM has paid for its say.
        return score, "" if beside else "NDCG@10"


# Settings that leave the rows as they are. All others are part of the rows' hash: one that is forgotten here makes
# rows anew, and never takes stale ones. Paths and templates are hashed by what they hold.
_NOT_ROWS = {
    "split",
    "valid_from",
    "test_from",
    "targets",
    "prompts",
    "examples",
    "valid_examples",
    "start_from",
    "device",
    "lora",
    "learning_rate",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "epochs",
    "max_steps",
    "max_minutes",
    "packs_per_step",
    "packs_per_forward",
    "gradient_checkpointing",
    "eval_users",
    "eval_every",
    "eval_minutes",
    "patience",
    "checkpoint_every",
    "report_to",
    "beta",
    "reference",
    "likelihood_weight",
    "temperature",
    "layer",
    "catalogue",
}
