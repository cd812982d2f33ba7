"""The transformers engine against plain full forwards of transformers itself."""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.conftest import SHARED_DATA
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from penchant.catalog_trie import CatalogTrie
from penchant.engine import transformers as module
from penchant.engine import tree
from penchant.engine.loading import describe_model, load_engine
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, DataError, ModelError, NotFiniteError

titles = st.one_of(
    st.sampled_from([*tiny.TITLES, "M", "Heat", "Heat (1995) II", "🎬", "七"]),
    st.text(alphabet="abHe七🎬 (1)", min_size=1, max_size=8).filter(lambda t: t.strip()),
)


def brute_force(folder: Path, prompt: list[int], continuation: tuple[int, ...]) -> float:
    """One full forward in float32, summed log-softmax: nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    return sum(float(logp[len(prompt) - 1 + j, t]) for j, t in enumerate(continuation))


def plainly(engine: TransformersEngine, ids: list[int], sequences: list[tuple[int, ...]]) -> np.ndarray:
    """A full forward for each sequence, by the engine's own model."""
    return np.array([engine._tree.plain(ids, sequence).sum() for sequence in sequences])


def plainly_each(engine: TransformersEngine, ids: list[int], sequence: tuple[int, ...]) -> np.ndarray:
    return engine._tree.plain(ids, sequence)


def test_scores_equal_full_forwards(tiny_folder: Path, tiny_engine: TransformersEngine) -> None:
    items = tiny_engine.codec.encode_items(tiny.TITLES, "\n")
    prompts = ["Heat (1995)", "a b c d e f g " * 5]
    got = tiny_engine.score(prompts, [items, items[:5]])
    for prompt, row in zip(prompts, got, strict=True):
        ids = tiny_engine.codec.encode(prompt)
        expected = [brute_force(tiny_folder, ids, item) for item in items[: len(row)]]
        np.testing.assert_allclose(row, expected, atol=1e-4)


@settings(max_examples=25)
@given(
    catalogue=st.lists(titles, min_size=1, max_size=12),
    prompts=st.lists(titles, min_size=1, max_size=4),
    k=st.integers(1, 13),
    seed=st.integers(0, 2**16),
)
def test_any_catalogue_scores_as_plain_and_generates_its_exact_top_k(
    tiny_engine: TransformersEngine, catalogue: list[str], prompts: list[str], k: int, seed: int
) -> None:
    """Common prefixes, one title a prefix of another, equal titles, single tokens, CJK and emoji, any filter."""
    items = tiny_engine.codec.encode_items(catalogue, "\n")
    rng = np.random.default_rng(seed)
    masks = [rng.random(len(items)) < rng.random() * 1.3 for _ in prompts]
    with torch.inference_mode():
        plain = [plainly(tiny_engine, tiny_engine.codec.encode(p), items) for p in prompts]
    for got, expected in zip(tiny_engine.score(prompts, [items] * len(prompts)), plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    answers = tiny_engine.generate(prompts, CatalogTrie.build(items), k, allowed=masks)
    for answer, mask, expected in zip(answers, masks, plain, strict=True):
        allowed = np.flatnonzero(mask)
        best = np.sort(expected[allowed])[::-1][:k]
        assert len({g.item for g in answer}) == len(answer) == len(best)
        assert all(mask[g.item] for g in answer)
        np.testing.assert_allclose([g.logprob for g in answer], best, atol=1e-4)
        np.testing.assert_allclose([expected[g.item] for g in answer], best, atol=1e-4)


def test_pieces_batches_and_rows_of_logits_change_nothing(
    tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tiny_engine.codec.encode_items(tiny.TITLES, "\n")
    prompts = ["Heat", "Up (2009) " * 4, "M (1931)"]
    lists = [items, items[:7], items[4:]]
    whole = tiny_engine.score(prompts, lists)
    monkeypatch.setattr(module, "_PIECE", 5)
    monkeypatch.setattr(tree, "LOGIT_ROWS", 3)
    monkeypatch.setattr(tiny_engine, "max_batch_tokens", 40)
    for a, b in zip(whole, tiny_engine.score(prompts, lists), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_thousand_candidates_stay_within_the_budget(
    byte_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward runs more than max_batch_tokens, and no more rows of logits are held than stated."""
    rng = np.random.default_rng(0)
    titles = sorted({" ".join(rng.choice(tiny.TITLES, 2)) + f" {i}" for i in range(1000)})
    items = byte_engine.codec.encode_items(titles, "\n")
    forwards, heads = [], []
    base, head = byte_engine._tree.base, byte_engine._tree.head
    monkeypatch.setattr(byte_engine, "max_batch_tokens", 512)
    monkeypatch.setattr(
        byte_engine._tree, "base", lambda **given: (forwards.append(given["input_ids"].numel()), base(**given))[1]
    )
    monkeypatch.setattr(byte_engine._tree, "head", lambda rows: (heads.append(len(rows)), head(rows))[1])
    out = byte_engine.score(["Heat (1995)", "Up", "M (1931)"], [items] * 3)
    assert [len(row) for row in out] == [1000] * 3
    assert max(forwards) <= 512
    assert max(heads) <= tree.LOGIT_ROWS


def test_ten_thousand_generations_over_a_real_catalogue_are_valid_and_unique(byte_engine: TransformersEngine) -> None:
    path = SHARED_DATA / "ml-100k" / "u.item"
    if not path.is_file():
        pytest.skip(f"{path.name} of MovieLens-100K is not in the shared data")
    titles = [line.split("|")[1] for line in path.read_text(encoding="latin-1").splitlines()]
    trie = CatalogTrie.build(byte_engine.codec.encode_items(titles, "\n"))
    prompts = [f"{titles[i]}\n" for i in range(200)]
    answers = byte_engine.generate(prompts, trie, 50, beams=50)
    assert sum(len(answer) for answer in answers) == 10_000
    for answer in answers:
        assert len({g.item for g in answer}) == 50
        assert all(0 <= g.item < len(titles) for g in answer)


def test_a_continuation_need_not_end_in_the_terminator(tiny_engine: TransformersEngine) -> None:
    """A sequence that is the beginning of another is scored for itself."""
    long = tiny_engine.codec.encode_data("Heathers (1989)")
    (row,) = tiny_engine.score(["x"], [[long, long[:1], long[:2]]])
    with torch.inference_mode():
        plain = plainly(tiny_engine, tiny_engine.codec.encode("x"), [long, long[:1], long[:2]])
    np.testing.assert_allclose(row, plain, atol=1e-4)


def test_the_parts_of_a_generations_logprob_are_its_tokens(tiny_folder: Path, tiny_engine: TransformersEngine) -> None:
    items = tiny_engine.codec.encode_items(tiny.TITLES, "\n")
    (answer,) = tiny_engine.generate(["Heat"], CatalogTrie.build(items), 4)
    for g in answer:
        steps = plainly_each(tiny_engine, tiny_engine.codec.encode("Heat"), items[g.item])
        np.testing.assert_allclose(g.token_logprobs, steps, atol=1e-4)


def test_prompts_that_share_a_beginning_share_it_and_score_the_same(tiny_engine: TransformersEngine) -> None:
    items = tiny_engine.codec.encode_items(tiny.TITLES, "\n")
    start = "One user's history, in the order of time, one title a line and much more of it: "
    prompts = [start + end for end in ("Heat", "Up (2009)", "a longer end of it, to be uneven")]
    before = tiny_engine.tokens_run
    together = tiny_engine.score(prompts, [items] * 3)
    run = tiny_engine.tokens_run - before
    before = tiny_engine.tokens_run
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_allclose(tiny_engine.score([prompt], [items])[0], row, atol=1e-4)
    assert run < tiny_engine.tokens_run - before
    labels = [[item[:1] for item in items]] * 3  # one token each: the prompts alone are run
    for prompt, row in zip(prompts, tiny_engine.score(prompts, labels), strict=True):
        np.testing.assert_allclose(row, plainly(tiny_engine, tiny_engine.codec.encode(prompt), labels[0]), atol=1e-4)


def test_arrays_of_candidates_score_as_lists_do(tiny_engine: TransformersEngine) -> None:
    """Each row that such an array gives is a new object, whose id another may have had before."""
    items = [item[:2] for item in tiny_engine.codec.encode_items(tiny.TITLES, "\n")]
    rows = [[items[(n + i) % len(items)] for i in range(3)] for n in range(12)]
    prompts = [f"user {n}: " for n in range(12)]
    expected = tiny_engine.score(prompts, rows)
    for got, right in zip(tiny_engine.score(prompts, np.array(rows)), expected, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_a_search_out_of_budget_says_it_is_not_exact(tiny_engine: TransformersEngine) -> None:
    trie = CatalogTrie.build(tiny_engine.codec.encode_items(tiny.TITLES, "\n"))
    (cut,) = tiny_engine.generate(["Heat"], trie, 10, max_expansions=12)
    assert not any(g.exact for g in cut)
    best = tiny_engine.generate(["Heat"], trie, 10)[0]
    assert all(g.logprob <= b.logprob + 1e-6 for g, b in zip(cut, best, strict=False))
    if len(cut) == 10:
        assert best[9].logprob <= cut[9].logprob + cut[9].gap + 1e-6
    (full,) = tiny_engine.generate(["Heat"], trie, 10)
    assert all(g.exact for g in full)


def test_embeddings_are_the_models_own_hidden_states(tiny_folder: Path, tiny_engine: TransformersEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    texts = ["Heat (1995)", "七人の侍", "a b"]
    for layer in (0, 1, -1):
        for text, mean, last in zip(
            texts,
            tiny_engine.embed(texts, pooling="mean", layer=layer),
            tiny_engine.embed(texts, pooling="last", layer=layer),
            strict=True,
        ):
            ids = torch.tensor([tiny_engine.codec.encode(text)])
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states[layer][0]
            np.testing.assert_allclose(mean, states.mean(0), atol=1e-4)
            np.testing.assert_allclose(last, states[-1], atol=1e-4)


@pytest.mark.parametrize("beams", [None, 2])
def test_a_model_that_gives_no_numbers_is_an_error_and_no_empty_list(
    byte_engine: TransformersEngine, beams: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = byte_engine._tree.logprobs
    monkeypatch.setattr(byte_engine._tree, "logprobs", lambda *given: np.full_like(real(*given), np.nan))
    with pytest.raises(NotFiniteError, match="is not a number"):
        byte_engine.generate(["Heat"], CatalogTrie.build([[5, 6], [5, 7], [8]]), 2, beams=beams)


def test_a_text_over_the_context_is_refused_with_what_helps_a_text(byte_engine: TransformersEngine) -> None:
    longest = "7" * byte_engine.context_length
    assert len(byte_engine.codec.encode(longest)) == len(longest)
    assert np.isfinite(byte_engine.embed([longest])).all()
    with pytest.raises(DataError, match=r"(?s)1 over the model's context.*remedy: shorten the text"):
        byte_engine.embed(["Up", longest + "7"])


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_the_model_lacks_is_refused(tiny_engine: TransformersEngine, layer: int) -> None:
    with pytest.raises(ConfigError, match="layer"):
        tiny_engine.embed(["x"], layer=layer)


def test_bfloat16_stays_near_float32(byte_folder: Path, byte_engine: TransformersEngine) -> None:
    half = load_engine(byte_folder, dtype="bfloat16", device="cpu")
    items = byte_engine.codec.encode_items(tiny.TITLES, "\n")
    (a,), (b,) = byte_engine.score(["Heat (1995)"], [items]), half.score(["Heat (1995)"], [items])
    assert np.corrcoef(a, b)[0, 1] > 0.99
    assert half.fingerprint != byte_engine.fingerprint


def test_eager_attention_fed_our_mask_is_right(byte_folder: Path, byte_engine: TransformersEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(byte_folder, dtype=torch.float32, attn_implementation="eager")
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(byte_folder), fingerprint="eager")
    items = byte_engine.codec.encode_items(tiny.TITLES, "\n")
    np.testing.assert_allclose(engine.score(["Up"], [items])[0], byte_engine.score(["Up"], [items])[0], atol=1e-4)


def test_a_model_with_capped_logits_is_scored_through_its_own_head(byte_folder: Path) -> None:
    """Gemma 2 caps its logits after the head: hidden state times matrix would be wrong, and is noticed."""
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, final_logit_softcapping=2.0, sliding_window=64,
        max_position_embeddings=256,
    )  # fmt: skip
    engine = TransformersEngine(Gemma2ForCausalLM(config), tokenizer, fingerprint="capped")
    assert engine.context_length == 64
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    with torch.inference_mode():
        plain = plainly(engine, engine.codec.encode("Heat"), items)
    np.testing.assert_allclose(engine.score(["Heat"], [items])[0], plain, atol=1e-4)


def test_absolute_positions_work_too(byte_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.5
    )
    engine = TransformersEngine(GPT2LMHeadModel(config), tokenizer, fingerprint="gpt2")
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    with torch.inference_mode():
        plain = plainly(engine, engine.codec.encode("Heat"), items)
    np.testing.assert_allclose(engine.score(["Heat"], [items])[0], plain, atol=1e-4)


def test_where_packing_is_wrong_it_falls_back_saying_so(byte_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that ignores our mask gives other scores; the self-test at load finds it."""
    model = AutoModelForCausalLM.from_pretrained(byte_folder, dtype=torch.float32)
    forward = model.base_model.forward

    @functools.wraps(forward)
    def deaf(*args: object, **kwargs: object) -> object:
        if getattr(kwargs.get("attention_mask"), "ndim", 0) == 4:
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", deaf)
    with pytest.warns(UserWarning, match="differ by"):
        engine = TransformersEngine(model, AutoTokenizer.from_pretrained(byte_folder), fingerprint="deaf")
    items = engine.codec.encode_items(tiny.TITLES[:6], "\n")
    (row,) = engine.score(["Heat"], [items])
    reference = load_engine(byte_folder, dtype="float32", device="cpu")
    np.testing.assert_allclose(row, reference.score(["Heat"], [items])[0], atol=1e-4)
    trie = CatalogTrie.build(items)
    got, expected = engine.generate(["Heat"], trie, 3)[0], reference.generate(["Heat"], trie, 3)[0]
    assert [g.item for g in got] == [g.item for g in expected]


# -- loading -----------------------------------------------------------------------------------


def adapter(folder: Path, out: Path, *, empty: bool) -> Path:
    """A LoRA adapter as peft saves it; fresh ones have B = 0 and change nothing."""
    return tiny.save_adapter(folder, out, spread=0.0 if empty else 0.5)


def test_an_adapter_changes_scores_as_peft_would(
    byte_folder: Path, byte_engine: TransformersEngine, tmp_path: Path
) -> None:
    lora = adapter(byte_folder, tmp_path / "lora", empty=False)
    engine = load_engine(byte_folder, lora, dtype="float32", device="cpu")
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    (row,), (base,) = engine.score(["Heat"], [items]), byte_engine.score(["Heat"], [items])
    assert np.abs(row - base).max() > 0.1
    with torch.inference_mode():
        plain = plainly(engine, engine.codec.encode("Heat"), items)
    np.testing.assert_allclose(row, plain, atol=1e-4)
    assert engine.fingerprint != byte_engine.fingerprint


def test_an_empty_adapter_is_refused(byte_folder: Path, tmp_path: Path) -> None:
    lora = adapter(byte_folder, tmp_path / "lora", empty=True)
    with pytest.raises(ModelError, match="changes no logit"):
        load_engine(byte_folder, lora, dtype="float32", device="cpu")


def test_an_adapter_of_another_model_is_refused(byte_folder: Path, tmp_path: Path) -> None:
    lora = adapter(byte_folder, tmp_path / "lora", empty=False)
    text = (lora / "adapter_config.json").read_text().replace("q_proj", "c_attn").replace("v_proj", "c_proj")
    (lora / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="does not fit"):
        load_engine(byte_folder, lora, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors weights"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot be loaded"),
    ],
)
def test_a_broken_model_folder_is_one_error(byte_folder: Path, tmp_path: Path, change: object, match: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_folder, folder)
    change(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=match):
        load_engine(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "a b c", "owner/no-such-model"])
def test_a_model_that_is_nowhere_is_one_error(name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_engine(name)


def test_wrong_options_are_refused(byte_folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        load_engine(byte_folder, dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device"):
        load_engine(byte_folder, device="abacus")
    with pytest.raises(ConfigError, match="backend"):
        load_engine(byte_folder, backend="magic")  # type: ignore[arg-type]


def test_the_fingerprint_follows_the_weights(
    byte_folder: Path, byte_engine: TransformersEngine, tmp_path: Path
) -> None:
    same = tmp_path / "same"
    shutil.copytree(byte_folder, same)
    assert load_engine(same, dtype="float32", device="cpu").fingerprint == byte_engine.fingerprint
    other = tiny.save_model(tmp_path / "other", "byte", seed=1)
    assert load_engine(other, dtype="float32", device="cpu").fingerprint != byte_engine.fingerprint


def test_sizes_are_read_without_loading(byte_folder: Path) -> None:
    sizes = describe_model(byte_folder)
    assert sizes["n_layers"] == 2
    assert sizes["hidden"] == 32
    model = AutoModelForCausalLM.from_pretrained(byte_folder)
    assert sizes["weights"] == sum(p.numel() for p in model.parameters())


def test_empty_prompts_and_uneven_arguments_are_refused(byte_engine: TransformersEngine) -> None:
    with pytest.raises(DataError, match="empty prompt"):
        byte_engine.score([""], [["x"]])
    with pytest.raises(ConfigError, match="2 prompts but 1"):
        byte_engine.score(["a", "b"], [["x"]])
    trie = CatalogTrie.build([(1,)])
    with pytest.raises(ConfigError, match="k is 0"):
        byte_engine.generate(["a"], trie, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert byte_engine.score([], []) == []
