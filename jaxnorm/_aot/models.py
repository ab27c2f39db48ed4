"""The norms of well-known models, as calls. Figures are recalled from the models' public configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import value_error
from .spec import Call, operators, parse

BF16, F32 = "bfloat16", "float32"


@dataclass(frozen=True)
class Model:
    """What of a model's configuration decides its norms."""

    features: int
    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: str = "output"
    weight: str = BF16
    pad_to_multiple: int | None = None
    others: tuple[int, ...] = ()
    """Features of further norms without a residual, of low-rank projections."""
    heads: tuple[int, int, int] = (0, 0, 0)
    """Heads of q, of k, and their features; zeros: no rotary embedding of this kind."""
    head_norm: bool = False
    """q and k are normed before they are turned."""


MODELS = {
    "llama3-8b": Model(4096, eps=1e-5, heads=(32, 8, 128)),
    "llama3-70b": Model(8192, eps=1e-5, heads=(64, 8, 128)),
    "qwen3-0.6b": Model(1024, heads=(16, 8, 128), head_norm=True),
    "qwen3-8b": Model(4096, heads=(32, 8, 128), head_norm=True),
    "qwen3-32b": Model(5120, heads=(64, 8, 128), head_norm=True),
    "deepseek-v3": Model(7168, others=(1536, 512)),
    "gpt-oss": Model(2880, eps=1e-5, pad_to_multiple=256, heads=(64, 8, 64)),
    "gemma3-1b": Model(1152, weight_offset=1.0, weight=F32, heads=(4, 1, 256), head_norm=True),
    "gemma3-4b": Model(2560, weight_offset=1.0, weight=F32, heads=(8, 4, 256), head_norm=True),
    "gemma3-12b": Model(3840, weight_offset=1.0, weight=F32, heads=(16, 8, 256), head_norm=True),
    "gemma3-27b": Model(5376, weight_offset=1.0, weight=F32, heads=(32, 16, 128), head_norm=True),
    "t5-small": Model(512, cast="before_weight"),
    "t5-base": Model(768, cast="before_weight"),
    "t5-xxl": Model(4096, cast="before_weight"),
}


def calls(name: str, quant: tuple[str, ...] = (), grad: bool = False) -> list[Call]:
    """The norms of a model in bfloat16, with and without a residual, and its rotary embedding of q and k; ``quant`` adds norms with
    per-token codes of these dtypes.

    Raises:
      ValueError: no such model.
    """
    if name not in MODELS:
        raise value_error("aot", "--model", repr(name), f"one of {', '.join(MODELS)}")
    model = MODELS[name]
    options: dict[str, Any] = {"eps": model.eps, "weight_offset": model.weight_offset, "cast": model.cast}
    padded = options | ({"pad_to_multiple": model.pad_to_multiple} if model.pad_to_multiple else {})
    x, weight = f"{BF16}[..., {model.features}]", f"{model.weight}[{model.features}]"
    found = [
        {"op": "rmsnorm", "args": {"x": x, "weight": weight}, "options": padded, "grad": grad},
        {"op": "add_rmsnorm", "args": {"x": x, "residual": x, "weight": weight}, "options": padded, "grad": grad},
    ]
    for n in model.others:
        args = {"x": f"{BF16}[..., {n}]", "weight": f"{model.weight}[{n}]"}
        found.append({"op": "rmsnorm", "args": args, "options": options, "grad": grad})
    if model.heads[0]:
        found += [_heads(model, shared) | {"grad": grad} for shared in (False, True)]
    for dtype in quant:
        spec = {"spec": {"dtype": dtype} | ({"group_size": 32, "scale_dtype": "e8m0"} if dtype == "fp4" else {})}
        found.append({"op": "rmsnorm_quant", "args": {"x": x, "weight": weight}, "options": padded | spec})
        args = {"x": x, "residual": x, "weight": weight}
        found.append({"op": "add_rmsnorm_quant", "args": args, "options": padded | spec})
    known = operators()
    return parse([f for f in found if f["op"] in known])


def _heads(model: Model, shared: bool) -> dict[str, Any]:
    """Rotary embedding of q and k, with their norm where the model has one. ``shared``: sequences in a batch have one array of
    positions, which the kernels read differently; the length of a sequence does not matter to them."""
    q, k, d = model.heads
    tokens, positions = ("..., 64", "64") if shared else ("...", "...")
    arrays = [f"{BF16}[{tokens}, {n}, {d}]" for n in (q, k)]
    where = {"positions": f"int32[{positions}]", "cos_sin": f"{F32}[8192, {d}]"}
    if not model.head_norm:
        return {"op": "rope", "args": {"x": arrays, **where}}
    weights = {f"{n}_weight": f"{model.weight}[{d}]" for n in "qk"}
    args = {"q": arrays[0], "k": arrays[1], **weights, **where}
    return {"op": "qk_norm_rope", "args": args, "options": {"eps": model.eps, "weight_offset": model.weight_offset}}
