"""The loop: steps planned ahead, losses normalised over all processes, checkpoints, validation, guards.

One loop serves all recipes and any number of processes (`accelerate launch`): a step's packs depend on
the seed alone, each process takes its share of them, and the gradient is that of the summed loss over
the step's whole weight, however it was cut. In float32 two processes take the steps of one.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from penchant.errors import ConfigError, ModelError, NotFiniteLossError, PenchantWarning
from penchant.files import without_nan
from penchant.training.batch import Batch, collate
from penchant.training.checkpoints import checkpoints, load_checkpoint, prune, save_checkpoint
from penchant.training.config import TrainConfig
from penchant.training.held_out import finite, held_out_loss, validation_every, worth
from penchant.training.journal import Journal
from penchant.training.objectives import over
from penchant.training.packing import Plan
from penchant.training.processes import Processes, memory_mib
from penchant.training.rows import Row
from penchant.training.student import Student
from penchant.training.task import Outcome, Task

# Steps whose speed decides how many fit the time box, after some that warm up.
_WARM, _TIMED = 1, 3
# A run that learns shows it by then.
_LEARNT_BY = 50


class Loop:
    """One training run in the folder ``out``; ``run`` goes on from its newest checkpoint where ``resume`` is set."""

    def __init__(
        self,
        task: Task,
        student: Student,
        config: TrainConfig,
        out: Path,
        *,
        accelerator: Accelerator,
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.task, self.student, self.config, self.out = task, student, config, out
        self.accelerator, self._processes = accelerator, Processes(accelerator)
        self.plan = Plan(
            task.rows.lengths, pack_tokens=config.pack_tokens, packs_per_step=config.packs_per_step, seed=config.seed
        )
        trainable = student.trainable()
        if not trainable:
            raise ConfigError("nothing in the model is to be trained", where="training", remedy="check lora.targets")
        self.optimiser = torch.optim.AdamW(
            trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.forward: Any = accelerator.prepare(student) if accelerator.num_processes > 1 else student
        if accelerator.num_processes > self.plan.fewest:
            raise ConfigError(
                f"{accelerator.num_processes} processes share {self.plan.fewest} packs a step",
                where="training",
                remedy="use fewer processes, or raise packs_per_step and give enough rows for as many packs",
            )
        self._on_record = on_record or (lambda record: None)
        self._folder = out / "checkpoints"
        self.step = 0  # steps done
        self._journal: Journal | None = None
        # All that a checkpoint keeps besides weights and moments.
        self.state: dict[str, Any] = {
            "rows": task.rows.content,
            "total_steps": self._planned(),
            "targets": 0,
            "tokens": 0,
            "seconds": 0.0,
            "best_step": 0,
            "best": None,
            "bad": 0,
            "start": None,
            "stopped": "",
            "warnings": [],
        }

    # -- the run -------------------------------------------------------------------------------

    def run(self, *, resume: bool = False) -> Outcome:
        found = self._resume() if resume else None
        if self.accelerator.is_main_process:
            self._journal = Journal(self.out / "log.jsonl", resume_step=found)
        self.step = step = found or 0
        if found is None:
            for note in self.task.notes:
                self.warn(note)
            self._validate(0)
            self._checkpoint(0, keep=bool(self.config.eval_minutes))
        due = sorted(60 * m for m in self.config.eval_minutes if 60 * m > self.state["seconds"])
        while step < self.state["total_steps"] and not self.state["stopped"]:
            self._step(step)
            self.step = step = step + 1
            fixed = self._fix_total(step)
            last = step == self.state["total_steps"]
            at_minute = bool(due) and self.state["seconds"] >= due[0]
            if at_minute:
                due.pop(0)
            if step == min(_LEARNT_BY, self.state["total_steps"]):
                self._check_learning(step)
            over = not last and self._over_time()
            looked_at = last or at_minute or over or step % self._every() == 0
            kept = fixed or step % self.config.checkpoint_every == 0
            if looked_at or kept:
                self._require_numbers(step)
            if looked_at:
                better = self._validate(step)
                if over:
                    self.state["stopped"] = "the time box was full before its steps"
                elif not better and self.state["bad"] >= self.config.patience and not last:
                    self.state["stopped"] = f"no better validation in {self.config.patience}"
                self._checkpoint(step, keep=at_minute)
            elif kept:
                # A resumed run must not time its steps anew: on a faster clock its schedule would be another one.
                self._checkpoint(step)
        self._check_gain()
        return self.outcome()

    def outcome(self) -> Outcome:
        """Where the run stands."""
        s = self.state
        return Outcome(
            self.step,
            s["total_steps"],
            s["best_step"],
            s["best"],
            s["targets"],
            s["tokens"],
            round(s["seconds"], 2),
            s["stopped"] or "finished",
            s["warnings"],
        )

    def close(self) -> None:
        """Let go of the wrapper of many processes, before their group ends.

        Freed after it, the wrapper frees the group while it holds Python's lock, and gloo's threads may be waiting for
        that lock: a process in twenty hung so.
        """
        self.forward = self.student
        self.accelerator.free_memory()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was logged so far; the main process has it."""
        return self._journal.records if self._journal is not None else []

    def best_checkpoint(self) -> Path:
        """The checkpoint of the best validation."""
        return self._folder / f"step-{self.state['best_step']:07d}"

    def _step(self, step: int) -> None:
        begun = time.perf_counter()
        config, world = self.config, self.accelerator.num_processes
        self.student.train()
        packs = self.plan.step(step)[self.accelerator.process_index :: world]
        batches = [
            self._batch([[self.task.rows[r] for r in pack] for pack in packs[i : i + config.packs_per_forward]])
            for i in range(0, len(packs), config.packs_per_forward)
        ]
        weight = self._processes.sum(sum(self.task.weight(batch) for batch in batches))
        if weight <= 0:
            raise ModelError(f"step {step + 1} has no weighted target", where="training", remedy="check the weights")
        rate = self._rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # The noise of dropout is a function of seed, step and process: a resumed run draws the same.
        torch.manual_seed(hash((config.seed, step, self.accelerator.process_index)) % 2**63)
        loss_of = over(self.task.loss, self.student, batches, self._processes.gather)
        summed = 0.0
        for i, batch in enumerate(batches):
            hold = i + 1 < len(batches) and world > 1
            with self.accelerator.no_sync(self.forward) if hold else contextlib.nullcontext():
                loss = loss_of(self.forward, self.student, batch)
                # DDP averages gradients over processes: the sum is wanted.
                self.accelerator.backward(loss * (world / weight))
            summed += float(loss.detach())
        loss_value = self._processes.sum(summed) / weight
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.trainable().values(), config.max_grad_norm))
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            self._stop_not_finite(
                f"the loss is {loss_value} and the gradient's norm {norm} in step {step + 1}; it was not taken"
            )
        if step == 0 and norm == 0:
            raise ModelError(
                "no weight gets a gradient: nothing would be learnt",
                where="training",
                remedy="check lora.targets, lora.last_layers and the template",
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        targets = int(self._processes.sum(float(sum(b.n_targets for b in batches))))
        tokens = int(self._processes.sum(float(sum(b.n_tokens for b in batches))))
        run = int(self._processes.sum(float(sum(b.tokens.numel() for b in batches))))
        examples = int(self._processes.sum(float(sum(len(pack) for pack in packs))))
        seconds = float(self._processes.same({"seconds": time.perf_counter() - begun})["seconds"])
        self.state["targets"] += targets
        self.state["tokens"] += tokens
        self.state["seconds"] += seconds
        self._record(
            {
                "kind": "step",
                "step": step + 1,
                "of": self.state["total_steps"],
                "loss": loss_value,
                "learning_rate": rate,
                "gradient_norm": norm,
                "examples": examples,
                "targets": targets,
                "tokens": tokens,
                "padding": round(1 - tokens / run, 4),
                "seconds": round(seconds, 4),
                "minutes": round(self.state["seconds"] / 60, 3),
                "examples/s": round(examples / seconds, 2),
                "targets/s": round(targets / seconds, 2),
                "tokens/s": round(tokens / seconds, 1),
                "memory_mib": memory_mib(),
            }
        )

    def _batch(self, packs: list[list[Row]]) -> Batch:
        return collate(packs, self.student.dtype, self.student.causal_lm.device)

    # -- validation ----------------------------------------------------------------------------

    def _validate(self, step: int) -> bool:
        """Held-out loss and score at a step; True where they are the best so far."""
        found: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            begun = time.perf_counter()
            found["valid_loss"] = held_out_loss(self.task, self.student, self.config)
            if self.task.score is not None and finite(found["valid_loss"]):
                self.student.eval()
                with torch.no_grad():
                    found |= without_nan(self.task.score(self.student))
                if self.task.score_name:
                    found |= {"score": found[self.task.score_name], "score_name": self.task.score_name}
            found["validation_seconds"] = round(time.perf_counter() - begun, 2)
        found = self._processes.same(found)
        state = self.state
        if not finite(found["valid_loss"]):
            self._stop_not_finite(f"the held-out loss is {found['valid_loss']} after step {step}")
        if state["start"] is None:
            if found["valid_loss"] is None:
                self.warn("no held-out row: neither loss nor score can say whether this training helps")
            state["start"] = found | {"watched": found["valid_loss"] if self.task.valid else self._watched()}
        best = math.nan if state["best"] is None else worth(state["best"])
        # The model before training is what the others are held against, and never what is kept: an adapter that is
        # all zeros would be no adapter. Where nothing can be measured the newest is kept.
        better = step > 0 and (math.isnan(best) or worth(found) > best)
        if better:
            state |= {"best": found, "best_step": step, "bad": 0}
        elif step > 0:
            state["bad"] += 1
        minutes = round(state["seconds"] / 60, 3)
        self._record({"kind": "validation", "step": step, "minutes": minutes, "best": better, **found})
        return better

    def _check_gain(self) -> None:
        """A loud word where no validation after training was better than the one before it."""
        start, best = (worth(self.state[name]) if self.state[name] else math.nan for name in ("start", "best"))
        if not best > start and not (math.isnan(best) and math.isnan(start)):
            self.warn(
                f"no validation was better than the one before training ({start:.4f}, then at best {best:.4f}): the "
                "untuned model may serve better; lower learning_rate, train longer, or see log.jsonl"
            )

    def _check_learning(self, step: int) -> None:
        """A loud word where the held-out loss hasn't moved down since the start; without such rows the first step's."""
        what = "held-out loss" if self.task.valid else "loss of the first step's rows"
        found, first = self._watched(), self.state["start"].get("watched")
        if not finite(found):
            self._stop_not_finite(f"the {what} is {found} after step {step}")
        if first is not None and found is not None and not found < first - 1e-4:
            self.warn(
                f"nothing learnt in {step} steps: the {what} was {first:.4f} nats and is {found:.4f}; "
                "raise learning_rate, check the template and the data"
            )

    def _watched(self) -> float | None:
        """The loss that has to move, on all processes: of held-out rows, or else of the first step's."""
        if not self.accelerator.is_main_process:
            return self._processes.same({})["loss"]
        rows = self.task.valid or [self.task.rows[r] for pack in self.plan.step(0) for r in pack]
        return self._processes.same({"loss": held_out_loss(replace(self.task, valid=rows), self.student, self.config)})[
            "loss"
        ]

    # -- small parts ---------------------------------------------------------------------------

    def _planned(self) -> int:
        steps = max(1, math.ceil(self.config.epochs * self.plan.steps_per_epoch))
        return min(steps, self.config.max_steps or steps)

    def _fix_total(self, step: int) -> bool:
        """After the first steps, how many fit the time box: fixed then, so that the schedule is known and resumes.

        True where it was fixed now.
        """
        if self.config.max_minutes is None or step != _WARM + _TIMED or self.state.get("fixed"):
            return False
        records = [r for r in self.records if r["kind"] == "step"]
        each = sum(r["seconds"] for r in records[-_TIMED:]) / _TIMED if records else 0.0
        fits = step + int(max(0.0, 60 * self.config.max_minutes - self.state["seconds"]) / max(each, 1e-9))
        found = self._processes.same({"total": min(self.state["total_steps"], max(step, fits))})
        self.state |= {"total_steps": found["total"], "fixed": True}
        return True

    def _over_time(self) -> bool:
        if self.config.max_minutes is None:
            return False
        return bool(self._processes.same({"over": self.state["seconds"] > 60 * self.config.max_minutes * 1.05})["over"])

    def _every(self) -> int:
        return validation_every(self.config, self.state["total_steps"])

    def _rate(self, step: int) -> float:
        """Linear warm-up, then cosine down to a hundredth of the peak."""
        total = self.state["total_steps"]
        warm = self.config.warmup * total
        if step < warm:
            return self.config.learning_rate * (step + 1) / math.ceil(warm)
        left = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, total - warm)))
        return self.config.learning_rate * (0.01 + 0.99 * left)

    def _resume(self) -> int | None:
        found = checkpoints(self._folder)
        if not found:
            return None
        state = load_checkpoint(found[-1], self.student, self.optimiser)
        if state.get("rows", self.state["rows"]) != self.state["rows"]:
            raise ConfigError(
                "the rows are not those that this training was begun with: what chose them (an encoder's candidates) "
                "came out otherwise here",
                where=str(self.out),
                remedy="go on where it was begun, with its cache and number of threads, or begin anew",
            )
        self.state |= {name: state[name] for name in state if name != "step"}
        return int(state["step"])

    def _checkpoint(self, step: int, keep: bool = False) -> None:
        if keep:
            self.state.setdefault("kept", []).append(f"step-{step:07d}")
        if self.accelerator.is_main_process:
            save_checkpoint(self._folder, self.student, self.optimiser, step, self.state)
            best = f"step-{self.state['best_step']:07d}"
            prune(self._folder, {best, *self.state.get("kept", [])})
        self.accelerator.wait_for_everyone()

    def _require_numbers(self, step: int) -> None:
        """Guard: of weights that are no numbers nothing is measured, and nothing kept."""
        bad = [name for name, p in self.student.trainable().items() if not bool(torch.isfinite(p).all())]
        bad = self._processes.same({"bad": bad})["bad"]
        if bad:
            self._stop_not_finite(f"{len(bad)} weights are no numbers after step {step}, such as {bad[0]}")

    def _stop_not_finite(self, what: str) -> NoReturn:
        state, here = self.state, self._folder / f"step-{self.step:07d}"
        state["stopped"] = "non-finite loss"
        # A checkpoint of these very weights is none to go on from, but where a validation found them the best.
        measured = state["best"] is not None and not math.isnan(worth(state["best"]))
        proved = self.step == 0 or (measured and state["best_step"] == self.step)
        good = [path for path in checkpoints(self._folder) if proved or path != here]
        if not measured:  # then the best is the newest, and these it can't be
            newest = int(good[-1].name[5:]) if good else 0
            state |= {"best_step": newest, "best": state["best"] if newest else None}
        if good and not proved and here.name not in state.get("kept", []) and self.accelerator.is_main_process:
            shutil.rmtree(here, ignore_errors=True)
        raise NotFiniteLossError(
            what,
            where="training",
            remedy="lower learning_rate or use float32, in a new folder; "
            f"the last good checkpoint is {good[-1] if good else 'none'}",
        )

    def warn(self, text: str) -> None:
        """Say it aloud, and in the outcome."""
        self.state["warnings"].append(text)
        if self.accelerator.is_main_process:
            warnings.warn(text, PenchantWarning, stacklevel=2)

    def _record(self, record: dict[str, Any]) -> None:
        if self._journal is None:
            return
        self._journal.write(record)
        self._on_record(record)
        if self.config.report_to:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            self.accelerator.log({f"{record['kind']}/{k}": v for k, v in numbers.items()}, step=record["step"])
