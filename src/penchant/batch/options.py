"""What a job is asked to make: everything here decides its results, so a resumed job must have the same."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penchant.errors import ConfigError
from penchant.serving import Method

Backend = Literal["transformers", "vllm"]
Job = Literal["recommend", "score", "embed-users", "embed-items"]

# Rows of a shard. What a kill can cost is one shard: a minute or so of the LLM, or of the encoder alone.
_LLM_ROWS, _ROWS = 256, 8192
_ANY = ("job", "shard_rows", "batch", "backend")
# Options that jobs other than recommend heed.
_USED: dict[str, tuple[str, ...]] = {"score": (*_ANY, "method"), "embed-users": _ANY, "embed-items": _ANY}


class BatchOptions(BaseModel):
    """The job and its settings, but for its input and output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: Job = Field(default="recommend", description="recommend, score (pairs), embed-users or embed-items")
    k: int = Field(default=10, ge=1, description="items to recommend")
    method: Method = Field(default="rank", description="rank, retrieve or generate; for pairs: rank (LLM) or retrieve")
    allow: tuple[str, ...] | None = Field(default=None, description="only these item ids")
    deny: tuple[str, ...] | None = Field(default=None, description="not these item ids")
    where: tuple[str, ...] = Field(default=(), description="conditions on item columns, as of `penchant recommend`")
    include_seen: bool = Field(default=False, description="items of the history may come again")
    diversity: float = Field(default=0.0, ge=0, le=1, description="variety for relevance")
    caps: dict[str, int] = Field(default_factory=dict, description="item column: most items of one value in a list")
    unique_titles: bool = Field(default=True, description="a title comes once in a list")
    calibration: float = Field(
        default=0.0, ge=0, description="of method generate: share of the no-history likelihood that is taken out"
    )
    shard_rows: int | None = Field(
        default=None, ge=1, description=f"input rows of a shard; None: {_LLM_ROWS:,} with the LLM, {_ROWS:,} without"
    )
    backend: Backend | None = Field(default=None, description="what runs the LLM; None: as the run was fitted")
    batch: int = Field(default=256, ge=1, description="rows answered together; batches never cross shards")

    @model_validator(mode="after")
    def _fits(self) -> BatchOptions:
        if self.job == "score" and self.method == "generate":
            raise ValueError("pairs are scored by rank (the LLM) or retrieve (the encoder), not by generate")
        if self.calibration and self.method != "generate":
            raise ValueError(f"calibration is of method generate, and the method is {self.method}")
        if self.backend is not None and not self.asks_llm:
            raise ValueError("backend says what runs the LLM, and this job asks none")
        for name, field in type(self).model_fields.items():
            if name not in _USED.get(self.job, (name,)) and getattr(self, name) != field.get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{name} means nothing to {self.job}: it would be ignored")
        return self

    @classmethod
    def of(cls, given: BatchOptions | None, **settings: object) -> BatchOptions:
        """``given`` with settings over it; ConfigError for what is no option."""
        base = {} if given is None else given.model_dump(exclude_unset=True)
        try:
            return cls.model_validate(base | settings)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "options"
            raise ConfigError(
                f"{first['msg']} (given: {first['input']!r})" if first["loc"] else first["msg"],
                where=name,
                remedy="see `penchant batch --help`",
            ) from error

    @property
    def asks_llm(self) -> bool:
        """Whether the job may ask the LLM at all."""
        return self.job in ("recommend", "score") and self.method != "retrieve"

    @property
    def rows(self) -> int:
        """Input rows of a shard."""
        return self.shard_rows or (_LLM_ROWS if self.asks_llm else _ROWS)
