"""The calls behind a bundle for no model in particular: every op, dtype and quantisation, sizes that fill a tile and odd ones."""

from __future__ import annotations

from typing import Any

from .spec import SCATTERED, Call, operators, parse

BF16, F16, F32 = "bfloat16", "float16", "float32"
ROWS = [3, 8192]
"""A plan for few rows and one for many; a case of either has few. Of the other families (:data:`SMALL`) cases are as planned."""
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
        found.append({"op": "rmsnorm", "args": args, "options": options, "grad": n != 1000})
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
    wide = {
        "x": f"{BF16}[..., 40960]",
        "weight": f"{BF16}[40960]",
    }  # in steps over the row, and its backward in tiles of columns
    found.append({"op": "rmsnorm_quant", "args": wide, "options": {"spec": {"dtype": "fp8"}}})
    return found


def _heads() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, (x, style, rotary) in enumerate(
        ((BF16, "neox", 64), (F16, "gptj", 32), (F32, "neox", 32), (BF16, "gptj", 64))
    ):
        heads = lambda n: f"{x}[..., {n}, 64]"  # noqa: B023, E731
        where = {"positions": f"{('int32', 'int64')[i % 2]}[...]", "cos_sin": f"{(F32, BF16)[i % 2]}[32, {rotary}]"}
        found.append(
            {"op": "rope", "args": {"x": [heads(4), heads(1)]} | where, "options": {"style": style}, "grad": i < 2}
        )
        weights = {"q_weight": f"{BF16}[64]", "k_weight": f"{F32}[64]"}
        found.append({"op": "qk_norm_rope", "args": {"q": heads(4), "k": heads(1)} | weights | where,
                      "options": {"style": style, "weight_offset": i % 2}, "grad": True})  # fmt: skip
    mrope = {"x": f"{BF16}[..., 3, 64]", "positions": "int32[3, ...]", "cos_sin": f"{F32}[32, 64]"}
    found += [
        {"op": "mrope", "args": mrope, "options": {"sections": [8, 12, 12], "interleaved": b}} for b in (True, False)
    ]
    stream = lambda k, t, h: {f"{k}{t}": f"{BF16}[..., {5 - 2 * t}, {h}, 128]"}  # noqa: E731
    two = stream("q", 0, 4) | stream("k", 0, 2) | stream("q", 1, 4) | stream("k", 1, 2)
    two |= {f"{k}_weight{t}": f"{BF16}[128]" for k in "qk" for t in (0, 1)} | {
        f"cos_sin{t}": f"{F32}[{5 - 2 * t}, 128]" for t in (0, 1)
    }
    return [*found, {"op": "qk_norm_rope_two_stream", "args": two, "grad": True}]


def _groups() -> list[dict[str, Any]]:
    found = []
    for i, (shape, axis, groups) in enumerate(
        (("8, 8, 64", -1, 8), ("96, 7, 5", 1, 4), ("40, 40, 320", -1, 32), ("64, 64, 64", 1, 2))
    ):
        x, channels = (BF16, F32, BF16, F16)[i], (64, 96, 320, 64)[i]
        args = {"x": f"{x}[..., {shape}]", "weight": f"{BF16}[{channels}]", "bias": f"{F32}[{channels}]"}
        options = {"num_groups": groups, "channel_axis": axis, "activation": "silu" if i % 2 == 0 else None}
        found.append({"op": "groupnorm", "args": args, "options": options, "grad": True})
    return found


def _layernorms() -> list[dict[str, Any]]:
    found = []
    for n, x, w, options in (
        (768, BF16, BF16, {}),
        (4096, F16, F32, {"weight_offset": 1.0}),
        (769, F32, F32, {}),
        (40960, BF16, BF16, {}),
    ):
        args = {"x": f"{x}[..., {n}]", "weight": f"{w}[{n}]", "bias": f"{w}[{n}]"}
        found.append({"op": "layernorm", "args": args, "options": options, "grad": True})
        added = args | {"residual": f"{F32 if n == 4096 else x}[..., {n}]", "x_bias": f"{x}[{n}]"}
        found.append({"op": "add_layernorm", "args": added, "options": options, "grad": n == 769})
    for i, spec in enumerate(SPECS):
        args = {"x": f"{(BF16, F16, F32)[i % 3]}[..., 1024]", "weight": f"{BF16}[1024]", "bias": f"{BF16}[1024]"}
        name = ("layernorm_quant", "add_layernorm_quant")[i % 2]
        found.append({"op": name, "args": args | ({"residual": args["x"]} if i % 2 else {}), "options": {"spec": spec}})
    return found


def _caches() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    kinds = ((BF16, None, "shuffled", BF16), ("int8", "per_token", "shuffled", BF16), ("fp8", "per_tensor", "paged", F16),
             ("fp8", "per_token", "slots", F32), (F32, None, "paged", BF16), ("int8", "per_tensor", "shuffled", BF16))  # fmt: skip
    for i, (dtype, quant, layout, x) in enumerate(kinds):
        cache = {
            "num_pages": 3,
            "page_size": 16,
            "num_kv_heads": 2,
            "head_dim": 64,
            "dtype": dtype,
            "quant": quant,
            "layout": layout,
        }
        kv = {"cache": {"KVCache": cache}, "slots": f"{('int32', 'int64')[i % 2]}[...]"}
        args = {"qkv": f"{x}[..., 512]", "q_weight": f"{BF16}[64]", "k_weight": f"{BF16}[64]", "positions": "int32[...]",
                "cos_sin": f"{F32}[32, {(64, 32)[i % 2]}]"}  # fmt: skip
        options = {"num_q_heads": 4, "num_kv_heads": 2, "style": ("neox", "gptj")[i % 2], "return_kv": i == 1}
        found.append({"op": "qk_norm_rope_cache", "args": args | kv, "options": options})
        found.append({"op": "KVCache.gather", "args": kv})
    return found


def _ranks() -> list[dict[str, Any]]:
    """The fused distributed calls: both schedules by the numbers of rows, every way the rows and the residual may lie."""
    found: list[dict[str, Any]] = []
    mx = {"group_size": 32, "scale_dtype": "e8m0"}
    kinds: tuple[tuple[str, int, str, str | None, dict[str, Any]], ...] = (
        ("allreduce_add_rmsnorm", 4, BF16, BF16, {}),
        ("allreduce_add_rmsnorm", 2, F16, F32, {"spec": {"dtype": "fp8", "group_size": 128}}),
        ("allreduce_add_rmsnorm", 8, F32, F32, {"cast": "before_weight"}),
        (SCATTERED, 4, BF16, None, {"spec": {"dtype": "int8"}, "weight_offset": 1.0}),
        (SCATTERED, 2, BF16, F32, {"spec": {"dtype": "fp4", **mx}}),
        (SCATTERED, 4, F16, F16, {"gather": False}),
        (SCATTERED, 2, F32, BF16, {"spec": {"dtype": "float8_e5m2", **mx}, "gather": False}),
        (SCATTERED, 8, BF16, BF16, {"spec": {"dtype": "fp8"}, "cast": "before_weight"}),
    )  # fmt: skip
    for op, ranks, x, residual, options in kinds:
        args = {"x": f"{x}[..., 2048]", "weight": f"{BF16}[2048]"}
        args |= {"residual": f"{residual}[..., 2048]"} if residual else {}
        found.append({"op": op, "args": args, "options": options, "ranks": ranks})
    return found


FAMILIES = (_norms, _quantised, _layernorms, _ranks)
SMALL = ((_heads, 3), (_groups, 1), (_caches, 5))
"""With the numbers of tokens or images."""
"""Each gives the entries of its ops; an op that is not registered is left out."""


def calls() -> list[Call]:
    """All of them, on both kernel backends."""
    known = operators()
    entries = [e | {"rows": ROWS} for family in FAMILIES for e in family()]
    entries += [e | {"rows": [rows]} for family, rows in SMALL for e in family()]
    served = [(e, b) for e in entries for b in ("hip", "triton") if b in _plans(known, str(e["op"]))]
    return parse([e | {"backend": b} for e, b in served])


def _plans(known: dict[str, Any], op: str) -> dict[str, str]:
    return known[op].forward.plans if op in known else {}
