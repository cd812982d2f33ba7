"""What the interest encoder is made of and how it is trained: one typed configuration."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Loss = Literal["auto", "softmax", "sampled", "bce", "mse"]
Sampling = Literal["uniform", "popularity", "in_batch"]

# Items from which on "auto" draws negatives: a softmax over more would be most of the training's time.
FULL_SOFTMAX_ITEMS = 100_000


class EncoderConfig(BaseModel):
    """Shape and training of the encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- E_c, the items, and E_u, the histories
    kind: Literal["transformer", "gru", "mean"] = Field(
        default="transformer", description="how a history becomes an interest; mean: recency-weighted, its decay learnt"
    )
    dim: int = Field(default=64, ge=4, description="size of item and interest vectors")
    blocks: int = Field(default=2, ge=1, description="transformer blocks, or GRU layers")
    heads: int = Field(default=2, ge=1, description="attention heads; must divide dim")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="after embeddings, attention and feed-forward")
    max_length: int = Field(default=100, ge=1, description="newest events of a history that are read")
    use_text: bool = Field(default=True, description="item vectors from the LLM")
    use_ids: bool = Field(default=True, description="an ID embedding for each item")
    id_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of items that lose their ID in a training step, so that text serves"
    )
    match: int = Field(
        default=0,
        ge=0,
        description="dimensions of the items' texts, whitened, whose likeness to the newest items' texts is fused in, "
        "as much as validation wants; 0: none",
    )
    cold_price: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the validation NDCG@10 that this may cost, where it finds more items without an event",
    )
    neighbours: int | None = Field(
        default=None,
        ge=0,
        description="items remembered for each item that stood near it in training histories; as much as validation "
        "wants, they are added to the score of what follows the newest items (vectors alone don't hold them); "
        "0: none, None: 100, but none without IDs, with relevance mlp or where a value is learnt",
    )
    inputs: tuple[str, ...] = Field(
        default=(),
        description="more about each event: event_type, rating, gap (time since the one before), review, query, or "
        "any context column",
    )
    interests: int = Field(default=1, ge=1, le=16, description="interest vectors a user; the best one counts")
    # -- R, how well an interest and an item fit
    relevance: Literal["dot", "cosine", "mlp"] = Field(
        default="dot", description="cosine: with a learnt temperature; mlp: dot plus a small network on both"
    )
    hidden: int = Field(default=32, ge=1, description="width of that network")
    # -- what is learnt from
    loss: Loss = Field(
        default="auto",
        description="softmax: over the whole catalogue; sampled: over negatives, logQ-corrected; bce: clicks; mse: "
        f"ratings; auto: softmax up to {FULL_SOFTMAX_ITEMS:,} items, then sampled",
    )
    negatives: int = Field(default=512, ge=1, description="items drawn in a step that all its targets share")
    sampling: Sampling = Field(default="uniform", description="how they are drawn; in_batch: the step's other targets")
    hard_negatives: int = Field(default=0, ge=0, description="besides, so many of the items that score best now")
    value: str | None = Field(
        default=None,
        description="column that mse predicts (default: rating) or bce (0 or 1; default: drawn negatives)",
    )
    user_weight: float = Field(default=0.0, ge=0, le=1, description="targets weigh (events of their user) ** -this")
    item_weight: float = Field(default=0.0, ge=0, le=1, description="targets weigh (events of their item) ** -this")
    epochs: int = Field(default=40, ge=1, description="most epochs; training stops earlier by patience")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="epochs without a better validation score before it stops; None: a quarter of the epochs, at least "
        "6 (the score may stand still while the rate is high, and rise again as it falls)",
    )
    batch_rows: int | None = Field(
        default=None, ge=1, description="histories in a training step; None: as many as hold about 2,000 events"
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="AdamW's peak, after warm-up, before cosine decay")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW")
    softmax_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the products over the catalogue in training; bfloat16: faster where the device computes it, "
        "float32 elsewhere",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial weights, dropout and the order of batches")

    @model_validator(mode="after")
    def _fits(self) -> EncoderConfig:
        if self.relevance == "mlp" and self.loss in ("auto", "softmax"):
            raise ValueError("relevance mlp is too dear for a softmax over all items: give loss sampled, bce or mse")
        if self.hard_negatives and self.loss != "sampled":
            raise ValueError("hard_negatives are for loss sampled")
        if self.value is not None and self.loss not in ("bce", "mse"):
            raise ValueError("value is for loss bce or mse")
        if self.match and not self.use_text:
            raise ValueError("match compares texts: give use_text")
        if self.match and not self._is_product:
            raise ValueError("match is a second dot product beside the first: give relevance dot or cosine, no value")
        if self.neighbours and not self._is_product:
            raise ValueError("neighbours are added to a dot product: give relevance dot or cosine, no value")
        if self.cold_price and not self.match:
            raise ValueError("cold_price is paid for match")
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("an input is named twice")
        return self

    @property
    def value_column(self) -> str | None:
        """The column of the values that are learnt, None where the items taken are."""
        return self.value or ("rating" if self.loss == "mse" else None)

    @property
    def near(self) -> int:
        """``neighbours`` as a number."""
        if self.neighbours is None:
            return 100 if self.use_ids and self._is_product else 0
        return self.neighbours

    def resolved(self) -> EncoderConfig:
        """The same with ``neighbours`` as a number: what is saved says what it has."""
        return self.model_copy(update={"neighbours": self.near})

    @property
    def _is_product(self) -> bool:
        return self.relevance != "mlp" and self.value_column is None

    @property
    def waits(self) -> int:
        """``patience`` as epochs."""
        return max(6, math.ceil(self.epochs / 4)) if self.patience is None else self.patience

    def loss_for(self, n_items: int) -> Literal["softmax", "sampled", "bce", "mse"]:
        """The loss that "auto" stands for in a catalogue of that size."""
        if self.loss != "auto":
            return self.loss
        return "softmax" if n_items <= FULL_SOFTMAX_ITEMS else "sampled"
