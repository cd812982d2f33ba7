"""Settings of the recipes: one typed model each, the same from YAML, the command line or Python."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penchant.interest.config import EncoderConfig

Quantization = Literal["none", "nf4", "int8"]


class LoraSettings(BaseModel):
    """Low-rank adapters (Hu et al. 2021), as peft makes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: int = Field(default=16, ge=1, description="rank")
    alpha: float = Field(default=32, gt=0, description="scale: alpha / r, or alpha / sqrt(r) with rslora")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the low-rank matrices")
    rslora: bool = Field(default=False, description="rank-stabilised scale (Kalajdzievski 2023)")
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="names of the adapted layers, such as [q_proj, v_proj]; never the head"
    )
    last_layers: int | None = Field(
        default=None, ge=1, description="adapt only this many of the last blocks: the backward pass stops there"
    )


class TrainConfig(BaseModel):
    """What every recipe shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    split: Literal["leave-last-out", "global-time", "none"] = Field(
        default="leave-last-out", description="as `penchant fit` cuts; none: only a validation event a user is held out"
    )
    valid_from: datetime | None = Field(default=None, description="global-time: start of validation (UTC)")
    test_from: datetime | None = Field(default=None, description="global-time: start of the test (UTC)")
    targets: Literal["all", "first", "last"] = Field(
        default="all",
        description="global-time: which events of a user in a window are held out targets, as `fit` has it",
    )
    prompts: str | None = Field(default=None, description="folder of templates that replace the shipped ones")
    model: str = Field(default="smollm2-135m", description="a known name, a model's folder, or a hub id")
    start_from: str | None = Field(default=None, description="an adapter to go on from, such as another recipe's")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="of the base weights; auto: bfloat16 where the device computes it, else float32; method full keeps "
        "and saves float32, and its steps compute in this",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    method: Literal["lora", "full"] = Field(default="lora", description="an adapter, or all weights")
    quantization: Quantization = Field(default="none", description="of the frozen base: nf4 (QLoRA) or int8")
    lora: LoraSettings = Field(default_factory=LoraSettings)

    learning_rate: float = Field(default=5e-4, gt=0, description="AdamW's peak, after warm-up, before cosine decay")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    epochs: float = Field(default=1.0, gt=0, description="passes over the rows")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many optimiser steps")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time box of the steps: how many fit is fixed from the first ones' speed",
    )
    pack_tokens: int = Field(default=1024, ge=16, description="length of a pack: rows are packed up to it")
    packs_per_step: int = Field(default=4, ge=1, description="packs in an optimiser step, over all processes")
    packs_per_forward: int = Field(default=1, ge=1, description="packs in one forward; the rest is accumulated")
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")

    max_history: int = Field(default=20, ge=1, description="newest events in a prompt")
    prompt_tokens: int = Field(default=768, ge=16, description="tokens of a prompt; the oldest events go first")
    max_rows: int | None = Field(default=None, ge=1, description="a seeded sample of the rows, at most this many")
    candidates: int = Field(default=20, ge=1, description="retrieved items that validation ranks")
    retriever: EncoderConfig = Field(
        default_factory=EncoderConfig, description="the encoder that retrieves them: best what `penchant fit` is given"
    )
    eval_users: int = Field(default=100, ge=0, description="validation users for NDCG@10; 0: loss only")
    eval_every: int | None = Field(default=None, ge=1, description="steps between validations; None: four in the run")
    eval_minutes: list[float] = Field(default_factory=list, description="also validate and keep at these minutes")
    patience: int = Field(default=2, ge=1, description="validations without a better score before it stops")
    checkpoint_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of new weights, dropout, order and samples")
    report_to: list[str] = Field(default_factory=list, description="accelerate's trackers: tensorboard, wandb, ...")

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.retriever.inputs or self.retriever.value_column is not None:
            raise ValueError("the retriever reads items alone and ranks them: no inputs, and no loss of values")
        if self.method == "full" and (self.quantization != "none" or self.start_from is not None):
            raise ValueError("method full trains the weights themselves: no quantization, and no start_from")
        return self


class NextItemConfig(TrainConfig):
    """Dense next-item training: every item of a rendered history is a target."""

    mode: Literal["dense", "single"] = Field(
        default="dense", description="single: one prompt a target, as BIGRec and TALLRec do, for comparison"
    )
    window: int = Field(default=40, ge=2, description="items in a dense row; longer histories are cut into several")
    popularity_power: float = Field(
        default=0.0, ge=0, le=1, description="a target weighs (training count) ** -power, mean 1; 0: all alike"
    )


class YesNoConfig(TrainConfig):
    """Pointwise: will this user like this item?"""

    negatives: list[Literal["unexposed", "disliked", "hard"]] = Field(
        default=["unexposed", "hard"], min_length=1, description="kinds of negatives, in turn"
    )
    negatives_per_positive: int = Field(default=1, ge=1)
    like_threshold: float | None = Field(
        default=None, description="events rated at least this are likes; None: every event is one"
    )
    targets_per_user: int = Field(default=4, ge=1, description="newest training events of a user that become targets")
    examples: str | None = Field(
        default=None, description="examples in TALLRec's format (.json or .json.gz) in place of a dataset"
    )
    valid_examples: str | None = Field(default=None, description="validation examples in TALLRec's format")

    @model_validator(mode="after")
    def _knows_dislikes(self) -> YesNoConfig:
        if self.valid_examples is not None and self.examples is None:
            raise ValueError("valid_examples go with examples: a dataset has validation events of its own")
        if "disliked" in self.negatives and self.like_threshold is None:
            raise ValueError("negatives that are disliked need a like_threshold: without it every event is a like")
        return self


class ChooseConfig(TrainConfig):
    """Listwise: the letter of the true item among lettered candidates."""

    letters: int = Field(default=20, ge=2, le=50, description="candidates in a prompt")
    targets_per_user: int = Field(default=4, ge=1, description="newest training events of a user that become targets")
    folds: int = Field(default=2, ge=2, description="retrievers: each retrieves for users it hasn't been trained on")
    insert_missed: bool = Field(
        default=False, description="a target that retrieval missed takes a candidate's place; else its row is left out"
    )


class ContrastiveConfig(TrainConfig):
    """InfoNCE: the embedding of a rendered history near the next item's, far from other items'.

    A step's packs are one batch: all their items are negatives of all their pairs, over all processes.
    """

    temperature: float = Field(
        default=0.05, gt=0, description="cosines are divided by it: smaller looks at the nearest"
    )
    hard: int = Field(
        default=4,
        ge=0,
        description="negatives of each pair drawn from its `candidates` retrieved ones; 0: in-batch only",
    )
    folds: int = Field(default=2, ge=2, description="retrievers: each retrieves for users it hasn't been trained on")
    pooling: Literal["mean", "last"] = Field(default="mean", description="pooling of the vectors over tokens")
    layer: int | None = Field(default=None, description="LLM layer of the vectors; None: two thirds up, as in `fit`")
    targets_per_user: int = Field(default=10, ge=1, description="newest training events of a user that become targets")
    packs_per_step: int = Field(default=16, ge=1, description="packs whose pairs are one batch, over all processes")
    packs_per_forward: int = Field(
        default=1, ge=1, description="the chunk of gradient caching: packs in memory at once; the gradient is the same"
    )
    candidates: int = Field(default=20, ge=1, description="retrieved items that hard negatives are drawn from")
    catalogue: int = Field(
        default=5000, ge=10, description="items that validation searches: a seeded sample that holds its targets"
    )


class PreferenceConfig(TrainConfig):
    """Softmax DPO: the item taken against retrieved items that weren't."""

    negatives: int = Field(default=3, ge=1, description="retrieved rivals of each target")
    beta: float = Field(default=1.0, gt=0, description="S-DPO's temperature")
    reference: bool = Field(
        default=True,
        description="hold log p against the base's, as S-DPO does; false: log p itself, which is what serving ranks by",
    )
    beside: float = Field(
        default=0.0,
        ge=0,
        description="how much of the retriever's own score is added to the LLM's in the loss: the LLM then learns what "
        "the retriever doesn't know. Only targets that it found are trained on, as in serving",
    )
    likelihood_weight: float = Field(
        default=0.0, ge=0, description="how much next-item cross entropy on the taken items is added"
    )
    every: int = Field(default=2, ge=1, description="every how many-th item of a history is a target with rivals")
    window: int = Field(default=20, ge=2, description="items in a row's trunk")
    folds: int = Field(default=2, ge=2, description="retrievers: each retrieves for users it hasn't been trained on")

    @model_validator(mode="after")
    def _has_a_reference(self) -> PreferenceConfig:
        if self.method == "full" and self.reference:
            raise ValueError("the reference is the base without the adapter: use method lora, or reference false")
        return self


CONFIGS: dict[str, type[TrainConfig]] = {
    "next_item": NextItemConfig,
    "yes_no": YesNoConfig,
    "choose": ChooseConfig,
    "preference": PreferenceConfig,
    "contrastive": ContrastiveConfig,
}
