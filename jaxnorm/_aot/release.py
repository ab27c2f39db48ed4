"""The calls behind a bundle for no model in particular: every op, dtype and quantisation, sizes that fill a tile and odd ones."""

from __future__ import annotations

from typing import Any

from .spec import Call, operators, parse

BF16, F16, F32 = "bfloat16", "float16", "float32"
ROWS = [3, 8192]
"""A plan for few rows and one for many."""
SPECS: tuple[dict[str, Any], ...] = (
    {"dtype": "int8"},
    {"dtype": "float8_e4m3fn"},
    {"dtype": "float8_e4m3fnuz"},
    {"dtype": "float8_e5m2"},
    {"dtype": "float8_e5m2fnuz"},
    {"dtype": "int8", "group_size": 128, "scale_layout": "column"},
    {"dtype": "fp8", "group_size": 128, "scale_ub": 2.0},
    {"dtype": "fp8", "group_size": 32, "scale_dtype": "e8m0", "scale_layout": "shuffled"},
    {"dtype": "fp4", "group_size": 32, "scale_dtype": "e8m0"},
    {"dtype": "fp4", "group_size": 32, "scale_dtype": "e8m0", "scale_layout": "shuffled", "e8m0_rounding": "even"},
)


def _norms() -> list[dict[str, Any]]:
    found = []
    for n, x, w, options in (
        (1024, BF16, BF16, {}),
        (4096, BF16, F32, {"weight_offset": 1.0}),
        (4096, F16, F16, {"cast": "before_weight"}),
        (769, F32, F32, {}),
        (1000, BF16, F16, {"pad_to_multiple": 256}),
        (128, BF16, BF16, {}),
        (40960, BF16, BF16, {}),
    ):
        args = {"x": f"{x}[..., {n}]", "weight": f"{w}[{n}]"}
        found.append({"op": "rmsnorm", "args": args, "options": options, "grad": n <= 4096})
        added = args | {"residual": f"{F32 if n == 4096 else x}[..., {n}]"}
        rounding = {"residual_rounding": "input"} if n == 1000 else {}
        found.append({"op": "add_rmsnorm", "args": added, "options": options | rounding, "grad": n in (769, 4096)})
    return found


def _quantised() -> list[dict[str, Any]]:
    found = []
    for i, spec in enumerate(SPECS):
        n = (4096, 1024)[i % 2]
        x = (BF16, F16, F32)[i % 3]
        args: dict[str, Any] = {"x": f"{x}[..., {n}]", "weight": f"{BF16}[{n}]"}
        smooth = {"smooth_scale": f"{F32}[{n}]"} if i % 3 == 0 else {}
        found.append(
            {"op": "rmsnorm_quant", "args": args | smooth, "options": {"spec": spec, "keep_unquantized": i % 4 == 1}}
        )
        found.append({"op": "add_rmsnorm_quant", "args": args | {"residual": args["x"]}, "options": {"spec": spec}})
        found.append({"op": "quantize", "args": {"x": args["x"]}, "options": {"spec": spec}})
    odd = {"x": f"{BF16}[..., 769]", "weight": f"{F32}[769]"}
    found.append({"op": "rmsnorm_quant", "args": odd, "options": {"spec": {"dtype": "int8"}}})
    static = {"x": f"{BF16}[..., 2880]", "weight": f"{BF16}[2880]", "static_scale": f"{F32}[]"}
    found.append({"op": "rmsnorm_quant", "args": static, "options": {"spec": {"dtype": "fp8"}, "pad_to_multiple": 256}})
    return found


FAMILIES = (_norms, _quantised)
"""Each gives the entries of its ops; an op that is not registered is left out."""


def calls() -> list[Call]:
    """All of them, on both kernel backends."""
    known = operators()
    entries = [e for family in FAMILIES for e in family() if e["op"] in known]
    return parse([e | {"backend": backend, "rows": ROWS} for e in entries for backend in ("hip", "triton")])
