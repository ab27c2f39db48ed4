"""The example models with real kernels, on small random weights: what each kernel backend computes is what the xla backend does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

sys.path[:0] = [str(Path(__file__).parents[2])]

from gemma_tiny import CACHES, check_decode, relative, tiny_params  # noqa: E402

from examples.gemma import comparison  # noqa: E402
from examples.gemma import model as gemma  # noqa: E402
from examples.gemma.generate import Generator  # noqa: E402
from examples.minilm import model as minilm  # noqa: E402

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
# The heads of Gemma 3 270M on a narrow model: local and global blocks, a window that the text leaves.
SMALL = gemma.Config(
    vocab=1000, width=128, layers=7, heads=4, kv_heads=1, head_dim=256, mlp_width=192, context=160, window=24
)  # fmt: skip
WHOLE_BLOCK = ["qk_norm_rope_cache", "KVCache.gather", "rmsnorm", "add_rmsnorm", "rmsnorm", "add_rmsnorm"]


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@backends
@pytest.mark.parametrize(("kind", "decode", "rounding"), CACHES)
def test_gemma_decode_of_64_tokens_equals_prefill(kind, decode, rounding, backend):
    """Through the same cache, within the bounds of a CPU, and the prefill as the xla backend's."""
    with jaxnorm.use_backend(backend):
        got = check_decode(SMALL, kind, decode, rounding)
    with jaxnorm.use_backend("xla"):
        tokens = jnp.asarray(np.random.default_rng(2).integers(4, SMALL.vocab, 64), jnp.int32)
        table = gemma.rope_tables(SMALL, 64)
        want = comparison.all_logits(tiny_params(SMALL), SMALL, tokens, table, kind)
    assert relative(got, want) < decode


@backends
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
def test_gemma_generates(kind, backend):
    """Prompt and decode loop of the demo: kernels alone, the cache in place, each token the best of a prefill up to it."""
    params = tiny_params(SMALL)
    with jaxnorm.use_backend(backend):
        generator = Generator(params, SMALL, prompt_tokens=40, max_tokens=24, kv_cache=kind)
        choices = jaxnorm.explain(generator.decode_function, *generator.decode_arguments)
        prompt = np.random.default_rng(3).integers(4, SMALL.vocab, 40).tolist()
        steps = list(generator(prompt))
        text = [*prompt, *(s.token for s in steps)]
        again = comparison.all_logits(params, SMALL, jnp.asarray(text), gemma.rope_tables(SMALL, 64), kind)
    assert [c.op for c in choices] == ["rmsnorm", *WHOLE_BLOCK]
    assert {c.backend for c in choices} == {backend}
    shape = ",".join(map(str, generator.decode_arguments[3].k.shape))
    made = re.findall(rf" = \w+\[{shape}\]\S* ([\w-]+)\(", generator._decode.as_text())
    assert made and not {"copy", "fusion", "scatter"} & set(made), made
    assert len(steps) == 24
    for i, step in enumerate(steps):
        row = np.asarray(again[39 + i])
        assert int(np.argmax(step.logits)) == step.token
        assert row[step.token] >= row.max() - 0.1 * row.std(), f"token {i}"
        assert relative(step.logits, again[39 + i]) < 0.05


@backends
def test_gemma_comparison_of_caches(backend):
    """The lines that the demo prints. Only roundings of keys and values are between the two."""
    tokens = np.random.default_rng(4).integers(4, SMALL.vocab, 137).tolist()
    with jaxnorm.use_backend(backend):
        found = comparison.compare_caches(tiny_params(SMALL), SMALL, tokens)
    for kind, (top1, rms) in {"bf16": (0.97, 0.01), "fp8": (0.7, 0.1), "int8": (0.85, 0.03)}.items():
        c = found[kind]
        print(f"{backend} {kind}: {c}")
        assert c.positions == 137 and 0 < c.rms_error < rms * c.rms_logit and c.top1 >= top1
        assert f"top-1 agreement {c.top1:.1%}" in str(c)


def bert(layers: int = 2, width: int = 96, words: int = 200) -> dict[str, np.ndarray]:
    """Tensors of a BertModel."""
    g = np.random.default_rng(5)
    embeddings = {"word": words, "position": 64, "token_type": 2}
    found = {f"embeddings.{n}_embeddings.weight": g.normal(0, 0.5, (k, width)) for n, k in embeddings.items()}
    norms = ["embeddings.LayerNorm"]
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for name in minilm._LINEAR.values():
            wide = {"intermediate.dense": (4 * width, width), "output.dense": (width, 4 * width)}.get(
                name, (width, width)
            )
            found[f"{at}{name}.weight"] = g.normal(0, wide[1] ** -0.5, wide)
            found[f"{at}{name}.bias"] = g.normal(0, 0.2, wide[0])
        norms += [at + name for name in minilm._NORMS.values()]
    for name in norms:
        found[f"{name}.weight"], found[f"{name}.bias"] = g.normal(1, 0.3, width), g.normal(0, 0.3, width)
    return {name: a.astype(np.float32) for name, a in found.items()}


@backends
@pytest.mark.parametrize(("dtype", "least"), [("float32", 1 - 1e-5), ("bfloat16", 0.999)])
def test_minilm(dtype, least, backend):
    """Sentences of three lengths in one batch; cosine with the vectors of the xla backend in float32."""
    config = minilm.Config(layers=2, heads=4, width=96, eps=1e-12)
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 200, (3, 33)), jnp.int32)
    mask = jnp.arange(33) < jnp.asarray([[33], [7], [20]])

    def run(dtype: str, name: str) -> np.ndarray:
        with jaxnorm.use_backend(name):
            params = minilm.load(bert(), config, jnp.dtype(dtype))
            vectors = jax.jit(lambda p: minilm.sentence_vectors(p, config, tokens, mask))
            chosen = jaxnorm.explain(vectors, params)
            assert [(c.op, c.backend) for c in chosen] == [("add_layernorm", name)] * 3
            return np.asarray(vectors(params))

    cosines = (run(dtype, backend) * run("float32", "xla")).sum(1)
    print(f"{backend} {dtype}: least cosine {cosines.min():.7f}")
    assert cosines.min() > least


@backends
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_unet_block(dtype, rtol, backend):
    """Output and every gradient of a block as with the xla backend's norms."""
    pytest.importorskip("flax", reason="needs flax: pip install 'jaxnorm[unet]'")
    from examples.unet_block import comparison as unet
    from examples.unet_block.model import ResidualBlock

    shape = unet.Shape(2, 17, 12, 96, 64)
    params = unet.parameters(shape)
    x, step, dy = unet.inputs(shape, jnp.dtype(dtype))

    def run(name: str) -> list[np.ndarray]:
        block = ResidualBlock(64, 32, "jaxnorm", jnp.dtype(dtype), backend=name)

        @jax.jit
        def both(params, x):
            y, pull = jax.vjp(lambda p, a: block.apply({"params": p}, a, step), params, x)
            return y, pull(dy)

        chosen = jaxnorm.explain(both, params, x)
        assert [(c.op, c.backend) for c in chosen] == [("groupnorm", name)] * 2 + [("groupnorm backward", name)] * 2
        return [np.asarray(a).astype(np.float32) for a in jax.tree.leaves(both(params, x))]

    for got, want in zip(run(backend), run("xla"), strict=True):
        assert np.sqrt(np.mean((got - want) ** 2)) < rtol * np.sqrt(np.mean(want**2))
