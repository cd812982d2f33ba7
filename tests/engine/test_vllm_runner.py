"""What is read from vLLM's outputs and log, in the shapes of both its model runners; the CPU one is run for real in
tests/contract."""

from __future__ import annotations

import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests import tiny

from penchant.engine import vllm_runner
from penchant.engine.asking import Ask
from penchant.engine.loading import load_engine
from penchant.engine.vllm_options import VllmOptions
from penchant.errors import ModelError

NAN = float("nan")


def output(cached: int | None, path_ids: list[int], path: list[float]) -> Any:
    """As vLLM's flat log-probabilities: of prompt tokens, and of one position with the sampled token first."""
    last = SimpleNamespace(start_indices=[0], end_indices=[3], token_ids=[99, 7, 8], logprobs=[-0.1, -7.0, -8.0])
    return SimpleNamespace(
        num_cached_tokens=cached,
        prompt_logprobs=SimpleNamespace(token_ids=path_ids, logprobs=path),
        outputs=[SimpleNamespace(logprobs=last)],
    )


ASK = Ask(ids=[1, 2, 3, 4, 5, 6], tokens=[7, 8], path=3, salt=None, node=0, first=0)  # the path is 4, 5, 6


@pytest.mark.parametrize(
    ("cached", "ids", "values", "path"),
    [
        (0, [2, 3, 4, 5, 6], [-2.0, -3.0, -4.0, -5.0, -6.0], [-4.0, -5.0, -6.0]),
        (2, [17, 0, 4, 5, 6], [NAN, 3e30, -4.0, -5.0, -6.0], [-4.0, -5.0, -6.0]),  # CPU: what lay in memory
        (2, [4, 5, 6], [-4.0, -5.0, -6.0], [-4.0, -5.0, -6.0]),  # GPU: a shorter list
        (3, [17, 0, 4, 5, 6], [NAN, 3e30, -9.0, -5.0, -6.0], [-5.0, -6.0]),  # token 4 came out of a cached state
        (3, [5, 6], [-5.0, -6.0], [-5.0, -6.0]),
        (5, [2, 3, 4, 5, 6], [-2.0, -3.0, -4.0, -5.0, -6.0], []),
        (None, [2, 3, 4, 5, 6], [-2.0, -3.0, -4.0, -5.0, -6.0], []),  # it doesn't say: nothing is believed
        (0, [2, 3, 4, 9, 6], [-2.0, -3.0, -4.0, -5.0, -6.0], []),  # of other tokens
        (0, [2, 3, 4, 5, 6], [-2.0, -3.0, -4.0, NAN, -6.0], []),
    ],
)
def test_only_what_was_run_is_believed(
    cached: int | None, ids: list[int], values: list[float], path: list[float]
) -> None:
    answer = vllm_runner._answer(ASK, output(cached, ids, values))
    assert list(answer.tokens) == [-7.0, -8.0]
    assert list(answer.path) == path


def test_answers_of_other_tokens_are_an_error() -> None:
    with pytest.raises(ModelError, match="of other tokens than asked for"):
        vllm_runner._answer(Ask([1, 2], [7, 9], 0, None, 0, 0), output(0, [], []))


def test_the_first_cause_is_told_and_no_hearsay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("Traceback\nValueError: of the start before\n")
    start = log.stat().st_size
    with log.open("a") as handle:
        handle.write(
            "2026 ERROR vllm: WorkerProc hit an exception.\nTraceback (most recent call last):\n  File x\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
            "RuntimeError: Worker failed with error 'CUDA out of memory'\n"
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
        )
    monkeypatch.setattr(vllm_runner._LOG, "path", log)
    assert vllm_runner._cause(start) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert vllm_runner._cause(log.stat().st_size) is None


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        ("StopIteration", "StopIteration"),
        ("AssertionError", "AssertionError"),
        ("jax.exceptions.Gone: away: for good", "Gone: away: for good"),
        ("ValueError: of two\nlines", "ValueError: of two"),
    ],
)
def test_a_cause_of_any_name_is_told_also_without_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: str, cause: str
) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "2026 ERROR vllm: EngineCore hit an exception.\nTraceback (most recent call last):\n"
        f'  File "x.py", line 3, in step\n    next(it)\n    ~~~~^^^^\n{last}\n'
        "2026 INFO vllm: shutting down: bye\n"
        "Traceback (most recent call last):\n  File y\nRuntimeError: Engine core initialization failed.\n"
    )
    monkeypatch.setattr(vllm_runner._LOG, "path", log)
    assert vllm_runner._cause(0) == cause


def arguments(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], pooling: Any = None, *, cpu: bool = False
) -> dict[str, Any]:
    """What vLLM would be started with, on a GPU or not; the module that says which is a stub."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"):
        monkeypatch.setenv(name, "1")
    return vllm_runner._arguments(Path("model"), "bfloat16", VllmOptions.of(options), pooling)


def test_every_option_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {
        "tensor_parallel_size": 2, "pipeline_parallel_size": 3, "quantization": "fp8", "gpu_memory_utilization": 0.8,
        "max_model_len": 2048, "max_num_seqs": 7, "max_num_batched_tokens": 4096, "block_size": 64,
        "enforce_eager": True, "max_loras": 2,
    }  # fmt: skip
    own = {"kv_cache_gib": 1.5, "prefix_caching": False, "max_lora_rank": 9}
    assert same.keys() | own.keys() == VllmOptions.model_fields.keys()
    fixed = {
        "model": "model", "dtype": "bfloat16", "seed": 0, "generation_config": "vllm", "use_tqdm_on_load": False,
        "enable_lora": True, "max_lora_rank": 16, "enable_prefix_caching": False, "kv_cache_memory_bytes": 3 * 2**29,
    }  # fmt: skip
    assert arguments(monkeypatch, same | own) == fixed | same


def test_what_is_left_out_is_vllms_own_choice_but_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = arguments(monkeypatch, {}), arguments(monkeypatch, {}, cpu=True)
    chosen = {"block_size", "kv_cache_memory_bytes"}
    assert not (chosen | {"max_model_len", "quantization", "max_num_seqs", "enable_lora"}) & on_gpu.keys()
    assert on_cpu.keys() - on_gpu.keys() == chosen
    assert (on_gpu["enforce_eager"], on_cpu["enforce_eager"]) == (False, True)
    assert (on_cpu["block_size"], on_cpu["kv_cache_memory_bytes"]) == (32, 2 * 2**30)


def test_a_mean_is_taken_of_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 7}
    mean, last = arguments(monkeypatch, options, "mean"), arguments(monkeypatch, options, "last")
    assert mean["pooler_config"] == {"seq_pooling_type": "MEAN"}
    assert "max_num_batched_tokens" not in mean
    assert (mean["enable_prefix_caching"], mean["enable_chunked_prefill"], mean["max_num_seqs"]) == (False, False, 7)
    assert (last["enable_prefix_caching"], last["max_num_batched_tokens"]) == (True, 64)
    assert (last["runner"], last["convert"], last["pooler_config"]) == (
        "pooling", "embed", {"seq_pooling_type": "LAST"},
    )  # fmt: skip


def test_an_ended_engine_has_no_thread_left() -> None:
    """Its threads are told to end, and may take their time: one that outlives the interpreter can abort it."""
    told = threading.Event()

    def hear() -> None:
        told.wait()
        time.sleep(0.3)

    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    vllm_runner._end(SimpleNamespace(shutdown=told.set), [thread, threading.current_thread()])
    assert not thread.is_alive()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_remedy_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")  # no log is set up for what isn't there
    with pytest.raises(ModelError, match=r"pip install 'penchant\[vllm\]'"):
        load_engine(tiny.save_model(tmp_path / "model", "byte"), backend="vllm")
