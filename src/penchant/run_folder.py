"""A fitted recommender on disk: plain files that any tool can open, none of them a pickle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penchant import __version__
from penchant.data.dataset import Dataset
from penchant.data.split import Split
from penchant.errors import StorageError
from penchant.files import read_json, save_array, sha256_file, sha256_text, staged_folder, write_json
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.inputs import Columns
from penchant.interest.search import IndexKind
from penchant.interest.vectors import Scale, Scaling
from penchant.interest.words import Words
from penchant.journal import Journal, same_records, unchanging, write_journal
from penchant.prompt import NAMES, Templates
from penchant.rank import Question, letters


class FitConfig(BaseModel):
    """All that fitting decides besides the data and the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: EncoderConfig = Field(default_factory=EncoderConfig, description="the interest encoder")
    layer: int | None = Field(default=None, description="LLM layer of the item vectors; None: two thirds up")
    fields: tuple[str, ...] = Field(
        default=(), description="item columns embedded one by one, side by side; none: the item template's text"
    )
    index: IndexKind = Field(
        default="exact", description="how the encoder's items are searched: exact, or hnsw (faiss) for large catalogues"
    )
    scale: Scale = Field(default="standardise", description="of the vectors: standardise, or whiten")
    pooling: Literal["mean", "last"] = Field(default="mean", description="pooling of the item vectors over tokens")
    question: Question = Field(
        default="likelihood", description="what the LLM is asked of the candidates: likelihood, choose or yes_no"
    )
    candidates: int = Field(default=20, ge=1, description="retrieved items that the LLM ranks")
    max_history: int = Field(default=20, ge=1, description="newest events in a prompt")
    prompt_tokens: int = Field(default=768, ge=16, description="tokens of a prompt; the oldest events go first")
    validation_users: int = Field(
        default=200,
        ge=1,
        description="validation users, of those whose target was retrieved, that the LLM's weight is chosen on",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the sample of validation users")

    @model_validator(mode="after")
    def _fits(self) -> FitConfig:
        if self.question == "choose":
            letters(self.candidates)
        if self.encoder.match and self.scale == "whiten":
            raise ValueError("encoder.match whitens by itself what varies most: give scale standardise")
        return self


@dataclass(eq=False)
class Fitted:
    """All that fitting made, and all that a run folder holds.

    ``texts`` are the rendered items, ``vectors`` (n_items, d) the LLM's item vectors as they came, ``columns`` and
    ``words`` what the encoder reads of events beside their items, ``live`` what has happened since, ``prior``
    (n_items,) the no-history log-likelihoods in nats (NaN where not needed yet), ``seconds`` where the time went.
    ``embedder`` names the model that made the vectors where it isn't the one that ranks (fingerprint, source), ``run``
    the saved run that this is, which its journal names too; an empty text where it was never saved.
    """

    split: Split
    config: FitConfig
    templates: Templates
    texts: list[str]
    vectors: NDArray[np.float32]
    encoder: InterestEncoder
    engine_source: dict[str, Any] | None
    fingerprint: str
    columns: Columns = field(default_factory=Columns)
    words: Words | None = None
    live: list[dict[str, Any]] = field(default_factory=list)
    graph: HNSWIndex | None = None
    embedder: dict[str, Any] | None = None
    fusion: Fusion = field(default_factory=lambda: Fusion(0.0, 0.0))
    prior: NDArray[np.float64] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    training: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    run: str = ""


FORMAT = 2
JOURNAL, WORDS, INDEX = "live.jsonl", "words.npz", "index"
_FILES = ("split.npz", "encoder.safetensors", "vectors.npy", "prior.npy")
_ALL = {"manifest.json", "dataset", "split.json", "prompts", JOURNAL, WORDS, INDEX, *_FILES}


def save_run(model: Fitted, folder: Path, graph: HNSWIndex | None = None) -> str:
    """Write the run atomically, and say which it is (``Fitted.run``); the run that stood there before stays until the
    new one is whole, and takes no update meanwhile.

    ``graph`` is the index of its items, where that is dear to build.
    """
    with unchanging(folder / JOURNAL):
        check_target(folder, model.live)
        return _save_run(model, folder, graph)


def _save_run(model: Fitted, folder: Path, graph: HNSWIndex | None) -> str:
    with staged_folder(folder) as stage:
        model.split.dataset.save(stage / "dataset")
        model.split.save(stage)
        model.encoder.save(stage / "encoder.safetensors")
        n_items = model.split.log.n_items  # items that came since are in the journal
        save_array(stage / "vectors.npy", model.vectors[:n_items])
        prior = model.prior if model.prior is not None else np.full(n_items, np.nan)
        save_array(stage / "prior.npy", prior[:n_items])
        if model.words is not None:
            model.words.save(stage / WORDS)
        if graph is not None and graph.n_items == n_items:  # one that has grown is built again when the run is opened
            graph.exact.model = sha256_file(stage / "encoder.safetensors")
            graph.save(stage / INDEX)
        (stage / "prompts").mkdir()
        for name, text in model.templates.sources.items():
            (stage / "prompts" / f"{name}.jinja").write_text(text, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "penchant": __version__,
            "engine": _with_ways(model.engine_source, folder),
            "fingerprint": model.fingerprint,
            "embedder": model.embedder and model.embedder | {"source": _with_ways(model.embedder["source"], folder)},
            "data": model.split.dataset.content_hash,
            "templates": model.templates.hash(),
            "split": model.split.spec,
            "columns": model.columns.model_dump(mode="json"),
            "config": model.config.model_dump(mode="json"),
            "fusion": model.fusion.to_dict(),
            "training": model.training,
            "seconds": {name: round(value, 2) for name, value in model.seconds.items()},
            "warnings": model.warnings,
            # The journal goes on growing, and has checksums of its own.
            "files": {name: sha256_file(stage / name) for name in (*_FILES, WORDS) if (stage / name).is_file()},
        }
        run = _run_of(manifest)
        write_journal(stage / JOURNAL, model.live, run)
        write_json(stage / "manifest.json", manifest)
        check_target(folder, model.live)  # this process may have updated it by another model, and not all disks lock
    return run


def _run_of(manifest: dict[str, Any]) -> str:
    """Which run that is: updates are of its catalogue, vectors and events, and mean nothing to another."""
    files = [f"{name} {digest}" for name, digest in sorted(manifest["files"].items())]
    return sha256_text(manifest["data"], manifest["templates"], manifest["fingerprint"], *files)


def check_target(folder: Path, live: Sequence[Any] = ()) -> None:
    """Saving replaces the folder: StorageError where that would lose what is no run, what lies beside the run's own
    files, or what came after the fit and isn't among the records that are saved with it (``live``).
    """
    if os.path.isfile(folder):
        raise StorageError("is a file", where=str(folder), remedy="give a folder to write into")
    # A run that lost one of its files may be made again in its place.
    is_run = sum((folder / name).is_file() for name in ("manifest.json", *_FILES)) >= len(_FILES)
    if os.path.isdir(folder) and any(folder.iterdir()) and not is_run:
        raise StorageError(
            "the folder holds something that is no run, and saving would replace it",
            where=str(folder),
            remedy="give a new folder (--out)",
        )
    if not is_run:
        return
    # What a kill left half written is nobody's.
    others = {path.name for path in folder.iterdir()} - _ALL - {path.name for path in folder.glob(".*.tmp")}
    if others:
        raise StorageError(
            f"the folder of the run holds other things ({min(others)}), and saving would replace it",
            where=str(folder),
            remedy="move them elsewhere, or give a new folder (--out)",
        )
    journal = folder / JOURNAL
    if journal.is_file():
        kept = Journal(journal).read()
        if not same_records(kept, live[: len(kept)]):
            raise StorageError(
                "holds events or items that came after the fit, and a new fit there would lose them",
                where=str(journal),
                remedy="give a new folder (--out), or delete this file",
            )


def load_run(folder: Path) -> Fitted:
    """Open a run; StorageError naming the file where one is missing, torn or not of this run."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            state = "is corrupt" if path.is_file() else "is missing"
            raise StorageError(state, where=str(path), remedy="make the run again with `penchant fit`")
    try:
        dataset = Dataset.load(folder / "dataset")
        split = Split.load(folder, dataset)
        config = FitConfig.model_validate(manifest["config"])
        sources = {name: (folder / "prompts" / f"{name}.jinja").read_text(encoding="utf-8") for name in NAMES}
        templates = Templates.from_sources(sources, str(folder / "prompts"))
        if templates.hash() != manifest["templates"]:
            raise StorageError(
                "differ from those the run was fitted with",
                where=str(folder / "prompts"),
                remedy="put them back, or fit again with --prompts FOLDER",
            )
        vectors: NDArray[np.float32] = np.load(folder / "vectors.npy", allow_pickle=False)
        columns = Columns.model_validate(manifest["columns"])
        words = Words.load(folder / WORDS) if columns.words else None
        encoder = InterestEncoder.load(
            folder / "encoder.safetensors",
            config.encoder,
            len(vectors),
            Scaling.fit(vectors, config.scale).apply(vectors) if config.encoder.use_text else None,
            columns=columns.sizes,
            words=None if words is None else words.vectors,
            n_words=len(columns.words),
        )
        if not (folder / JOURNAL).is_file():
            raise StorageError(
                "is missing, and with it all updates since the fit",
                where=str(folder / JOURNAL),
                remedy="put it back from a copy, or make an empty file of that name to go on without them",
            )
        run = _run_of(manifest)
        journal = Journal(folder / JOURNAL, run=run)
        live = journal.read()
        notes = ["an update that a crash cut off was left out"] if journal.torn else []
        texts = templates.item_texts(dataset.items.to_dict(as_series=False), split.log.item_ids).texts
        return Fitted(
            split=split,
            config=config,
            templates=templates,
            texts=texts,
            vectors=vectors,
            encoder=encoder,
            engine_source=_arguments(manifest["engine"], manifest["fingerprint"], folder),
            fingerprint=manifest["fingerprint"],
            columns=columns,
            words=words,
            live=live,
            graph=_graph(folder, manifest) if config.index == "hnsw" else None,
            embedder=_embedder(manifest.get("embedder"), folder),
            fusion=Fusion(**manifest["fusion"]),
            prior=np.load(folder / "prior.npy", allow_pickle=False),
            seconds=manifest["seconds"],
            training=manifest["training"],
            warnings=[*manifest["warnings"], *notes],
            run=run,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ValidationError) as error:
        raise StorageError(
            f"cannot be opened: {type(error).__name__}: {error}", where=str(folder), remedy="make the run again"
        ) from error


def _with_ways(source: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """How to load an engine, and the ways from the run to its folders: run and model may be moved together."""
    if source is None:
        return None
    places = {key: source.get(key) for key in ("model", "adapter")}
    ways = {key: os.path.relpath(at, folder.absolute()) for key, at in places.items() if at and os.path.isabs(at)}
    return source | {"ways": ways} if ways else source


def _arguments(source: dict[str, Any] | None, fingerprint: str, folder: Path) -> dict[str, Any] | None:
    """How to load an engine: with the numbers that it had (runs of before wrote "auto" for what the checkpoint had),
    and from where its folders are now. That they are the same ones is checked by the fingerprint.
    """
    if source is None:
        return None
    source = dict(source)
    for key, way in source.pop("ways", {}).items():
        if not os.path.isdir(source[key]) and (folder / way).is_dir():
            source[key] = str((folder / way).absolute())
    if source.get("dtype") == "auto":
        source["dtype"] = fingerprint.rpartition(":")[2].partition("/")[0]
    return source


def _embedder(made: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    return made and made | {"source": _arguments(made["source"], made["fingerprint"], folder)}


def _graph(folder: Path, manifest: dict[str, Any]) -> HNSWIndex | None:
    """The saved graph of the encoder's items; None where it has to be built again."""
    if not (folder / INDEX).is_dir():
        return None
    return HNSWIndex.load(folder / INDEX, model=manifest["files"]["encoder.safetensors"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder, checked to be one of ours and of this format."""
    if not folder.is_dir():
        raise StorageError("no such run", where=str(folder), remedy="make one with `penchant fit DATA --out RUN`")
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or "fingerprint" not in manifest or not isinstance(manifest.get("files"), dict):
        raise StorageError("is not a run of `penchant fit`", where=str(folder), remedy="give the folder of --out")
    if manifest.get("format") != FORMAT:
        raise StorageError(
            f"has format {manifest.get('format')}, this version reads {FORMAT}",
            where=str(folder),
            remedy="fit it again",
        )
    return manifest
