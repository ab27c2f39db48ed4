"""Sentences to vectors: the tokenizer, batches of few different shapes, one compiled function for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import model, weights

PAD_TO = 16  # token counts are padded to multiples of it, so that few programs are compiled


class Encoder:
    """A loaded model: ``Encoder()(["a sentence", ...])`` is float32 [len, N], unit vectors."""

    def __init__(self, path: Path | None = None, dtype: Any = jnp.float32) -> None:
        from tokenizers import Tokenizer

        path = weights.folder(path)
        settings = weights.settings(path)
        self.config = model.Config.from_settings(settings)
        self.params = model.load(weights.tensors(path), self.config, dtype)
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.enable_truncation(settings["max_seq_length"])
        self.tokenizer.enable_padding(pad_id=settings["pad_token_id"], pad_to_multiple_of=PAD_TO)
        self.function = jax.jit(functools.partial(model.sentence_vectors, config=self.config))

    def tokens(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [B, T], mask bool [B, T])"""
        found = self.tokenizer.encode_batch(list(sentences))
        ids, mask = (np.array([getattr(e, name) for e in found]) for name in ("ids", "attention_mask"))
        return ids.astype(np.int32), mask.astype(bool)

    def __call__(
        self, sentences: Sequence[str], batch: int = 32, progress: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        found = []
        for start in range(0, len(sentences), batch):
            part = sentences[start : start + batch]
            ids, mask = self.tokens(part)
            found.append(np.asarray(self.function(self.params, tokens=ids, mask=mask)))
            progress(len(part))
        return np.concatenate(found) if found else np.zeros((0, self.config.width), np.float32)


def ranked(vectors: np.ndarray, query: np.ndarray) -> list[tuple[int, float]]:
    """(index, cosine) of unit vectors [n, N] by falling similarity to the unit vector ``query`` [N]."""
    cosines = vectors @ query
    return [(int(i), float(cosines[i])) for i in np.argsort(-cosines, kind="stable")]
