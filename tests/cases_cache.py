"""Calls of ``qk_norm_rope_cache``: data, the op, the kernels' view of it, and the comparison with the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import cases
import numpy as np
import oracle_cache as oracle

LAYOUTS = ("shuffled", "paged", "slots")
BUFFERS = ("k_cache", "v_cache", "k_scale", "v_scale")
FN, FNUZ = "float8_e4m3fn", "float8_e4m3fnuz"


@dataclass(frozen=True)
class Case:
    """One call. Slots are a random choice without repetition; ``skip`` of them are -1, one lies beyond the cache."""

    layout: str = "shuffled"
    dtype: str = "bfloat16"
    quant: str | None = None
    tokens: int = 9
    q_heads: int = 4
    kv_heads: int = 2
    features: int = 32
    pages: int = 3
    page: int = 16
    rotary: int | None = None
    """None: all features."""
    x_dtype: str = "bfloat16"
    packed: bool = False
    weight_dtype: str | None = "float32"
    table_dtype: str = "float32"
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    return_kv: bool = True
    index: str = "int32"
    skip: int = 2
    run: int | None = None
    """Slots that follow one another from this one on, instead of random ones."""
    scales: tuple[float, float] = (0.02, 0.015)
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        parts = [self.layout, self.dtype, str(self.quant), f"{self.tokens}x{self.q_heads}:{self.kv_heads}x{self.features}",
                 f"p{self.page}", self.x_dtype]  # fmt: skip
        parts += [f"r{self.rotary}"] if self.rotary else []
        parts += ["packed"] if self.packed else []
        parts += ["mrope"] if self.sections else []
        parts += [f"run{self.run}"] if self.run is not None else []
        parts += [self.index] if self.index != "int32" else []
        return "-".join([*parts, *map(str, self.options.values())])

    @property
    def slots(self) -> int:
        return self.pages * self.page

    @property
    def x(self) -> int:
        return 16 // oracle.dtype(self.dtype).itemsize

    def geometry(self) -> tuple[str, int, int, int, int, int]:
        return self.layout, self.pages, self.page, self.kv_heads, self.features, self.x

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the cache's arrays, from the table of section 7.1."""
        b, p, h, d, x = self.pages, self.page, self.kv_heads, self.features, self.x
        k = {"shuffled": (b, h, d // x, p, x), "paged": (b, p, h, d), "slots": (b * p, h, d)}[self.layout]
        v = (b, h, p // x, d, x) if self.layout == "shuffled" else k
        scale = {"shuffled": (b, h, p), "paged": (b, p, h), "slots": (b * p, h)}[self.layout]
        found = {"k": k, "v": v}
        return found | ({"k_scale": scale, "v_scale": scale} if self.quant == "per_token" else {})

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The operands by name, cache buffers full of random bytes included."""
        g = cases.rng(seed + 7 * self.tokens + self.features)
        t, d = self.tokens, self.features
        out = {n: cases.normal(g, (t, h, d), self.x_dtype, std=2.0)
               for n, h in (("q", self.q_heads), ("k", self.kv_heads), ("v", self.kv_heads))}  # fmt: skip
        if t > 2:
            out["k"][1, 0], out["v"][2, -1] = 0, 0  # vectors of zeros have scale 1
        width = self.rotary or d
        table = g.uniform(-1, 1, (40, width))  # no pair of cos and sin: a swap of the two shows
        out |= {n: w for n in ("q_weight", "k_weight") if (w := cases.weight(g, d, self.weight_dtype)) is not None}
        positions = g.integers(0, 40, (3, t) if self.sections else (t,))
        if t > 3:
            positions[..., 3] = 39
        out["positions"] = positions.astype(self.index)
        out["cos_sin"] = table.astype(oracle.dtype(self.table_dtype))
        out["slots"] = self.picked(g).astype(self.index)
        for name, shape in self.shapes().items():
            kind = oracle.dtype("float32" if "scale" in name else self.dtype)
            raw = g.integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
            out[f"cache.{name}"] = raw.view(kind).reshape(shape)
        if self.quant == "per_tensor":
            out |= {f"cache.{n}": np.float32(s) for n, s in zip(("k_scale", "v_scale"), self.scales, strict=True)}
        return out

    def picked(self, g: np.random.Generator) -> np.ndarray:
        if self.run is not None:
            slots = self.run + np.arange(self.tokens)
        else:
            slots = g.permutation(self.slots)[: self.tokens]
            if self.tokens > 2 and self.slots - 1 not in slots:
                slots[0] = self.slots - 1
        if self.tokens > self.skip + 1:
            skipped = g.permutation(np.arange(1, self.tokens))
            slots[skipped[: self.skip]] = -1
            if self.skip:
                slots[skipped[-1]] = self.slots + 3
        return slots

    # ---- the op

    def cache(self, arrays: dict[str, Any]) -> Any:
        import jaxnorm

        parts = [arrays.get(f"cache.{n}") for n in ("k", "v", "k_scale", "v_scale")]
        return jaxnorm.KVCache(*parts, page_size=self.page, layout=self.layout, quant=self.quant)

    def qkv(self, arrays: dict[str, Any]) -> Any:
        if not self.packed:
            return tuple(arrays[n] for n in "qkv")
        return np.concatenate([arrays[n].reshape(self.tokens, -1) for n in "qkv"], -1)

    @property
    def norm(self) -> dict[str, Any]:
        return {"eps": 1e-6, "weight_offset": 0.0, "style": "neox"} | self.options

    def op(self, qkv: Any, arrays: dict[str, Any], cache: Any, backend: str | None = None) -> Any:
        import jaxnorm

        return jaxnorm.qk_norm_rope_cache(
            qkv, arrays.get("q_weight"), arrays.get("k_weight"), arrays["positions"], arrays["cos_sin"], cache, arrays["slots"],
            num_q_heads=self.q_heads, num_kv_heads=self.kv_heads, return_kv=self.return_kv, mrope_sections=self.sections,
            mrope_interleaved=self.interleaved, backend=backend, **self.norm,
        )  # fmt: skip

    def run_op(self, arrays: dict[str, np.ndarray], backend: str | None = None) -> dict[str, np.ndarray]:
        """Jitted, with a donated cache; results by name, those of the cache as ``cache.k`` and so on."""
        import jax
        import jax.numpy as jnp

        rest = {n: jnp.asarray(a) for n, a in arrays.items() if not n.startswith("cache.") and n not in ("q", "k", "v")}
        qkv = jax.tree.map(jnp.asarray, self.qkv(arrays))
        cache = jax.tree.map(lambda a: jnp.array(a, copy=True), self.cache(arrays))
        return self.named(_jitted(self, backend)(qkv, rest, cache))

    def named(self, out: Any) -> dict[str, np.ndarray]:
        *heads, cache = out
        names = ("q", "k", "v") if self.return_kv else ("q",)
        found = {n: np.asarray(a) for n, a in zip(names, heads, strict=True)}
        for n in ("k", "v", "k_scale", "v_scale"):
            if getattr(cache, n) is not None:
                found[f"cache.{n}"] = np.asarray(getattr(cache, n))
        return found

    # ---- the kernels' view

    def problem(self, arrays: dict[str, np.ndarray], target: str = "sm_90") -> Any:
        from jaxnorm.kernels.configs import Problem

        t, d = self.tokens, self.features
        operands = self.operands(arrays)
        buffers = [(n, a.shape, a.dtype.name) for n, a in operands.items()]
        buffers += [("q_out", (t, self.q_heads, d), self.x_dtype)] if self.q_heads else []
        buffers += [(f"{n}_out", (t, self.kv_heads, d), self.x_dtype) for n in "kv"] if self.return_kv else []
        buffers += [(f"{n}_out", s, k) for n, s, k in buffers if n in BUFFERS and len(s)]
        options = self.norm | {"sections": self.sections, "interleaved": self.interleaved, "geometry": self.shape()}
        return Problem(
            "qk_norm_rope_cache_fwd", t, d, tuple((n, tuple(s)) for n, s, _ in buffers), tuple((n, k) for n, _, k in buffers),
            tuple(options.items()), target,
        )  # fmt: skip

    def shape(self) -> Any:
        from jaxnorm._cache import Geometry

        return Geometry(self.layout, self.quant, self.dtype, self.pages, self.page, self.kv_heads, self.features)

    def operands(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        qkv = self.qkv(arrays)
        found = {"qkv": qkv} if self.packed else dict(zip("qkv", qkv, strict=True))
        if not self.q_heads:
            del found["q"]
        found |= {n: arrays[n] for n in ("q_weight", "k_weight") if n in arrays}
        positions = arrays["positions"]
        found |= {"positions": positions}
        found |= {n: arrays[n] for n in ("cos_sin", "slots")}
        return found | self.buffers(arrays)

    def buffers(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = dict(zip(BUFFERS, ("k", "v", "k_scale", "v_scale"), strict=True))
        return {b: np.asarray(arrays[f"cache.{n}"]) for b, n in names.items() if f"cache.{n}" in arrays}

    def gather_problem(self, arrays: dict[str, np.ndarray], slots: np.ndarray, target: str = "sm_90") -> Any:
        from jaxnorm.kernels.configs import Problem

        buffers = [(n, a.shape, a.dtype.name) for n, a in ({"slots": slots} | self.buffers(arrays)).items()]
        buffers += [
            (f"{n}_out", (len(slots), self.kv_heads, self.features), "float32" if self.quant else self.dtype)
            for n in "kv"
        ]
        return Problem(
            "kv_cache_gather", len(slots), self.features, tuple((n, tuple(s)) for n, s, _ in buffers),
            tuple((n, k) for n, _, k in buffers), (("geometry", self.shape()),), target,
        )  # fmt: skip

    def renamed(self, results: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Results of a plan under the names of :meth:`check`."""
        out = {n: results[f"{n}_out"] for n in ("q", "k", "v") if f"{n}_out" in results}
        for b, n in zip(BUFFERS, ("k", "v", "k_scale", "v_scale"), strict=True):
            if f"cache.{n}" in arrays:
                out[f"cache.{n}"] = results.get(f"{b}_out", arrays[f"cache.{n}"])
        return out

    # ---- the comparison

    def check(
        self, arrays: dict[str, np.ndarray], got: dict[str, np.ndarray], what: str = "", exact: bool = True
    ) -> None:
        """q and k against float64; v as it came; what the cache holds against the k that was returned; all else untouched."""
        cos, sin = oracle.angles(arrays["cos_sin"], arrays["positions"], self.sections, self.interleaved)
        what = f"{what} {self}"
        if self.q_heads:
            oracle.assert_heads(got["q"], arrays["q"], arrays.get("q_weight"), cos, sin, f"{what} q", **self.norm)
        k = got.get("k")
        if k is not None:
            oracle.assert_heads(k, arrays["k"], arrays.get("k_weight"), cos, sin, f"{what} k", **self.norm)
            assert got["v"].tobytes() == arrays["v"].tobytes(), f"{what} v"
            self.check_cache(arrays, {"k": k, "v": arrays["v"]}, got, what, exact)

    def check_cache(self, arrays, heads, got, what: str, exact: bool) -> None:
        """Every byte of the buffers. Not exact: one code in a thousand may be the next one."""
        slots = arrays["slots"].astype(np.int64)
        live = np.flatnonzero((slots >= 0) & (slots < self.slots))
        for n in "kv":
            codes, scales = oracle.stored(heads[n], self.dtype, self.quant, arrays.get(f"cache.{n}_scale"))
            parts = [(n, n, codes)] + ([("scale", f"{n}_scale", scales[..., None])] if scales is not None else [])
            for which, name, values in parts:
                before, after = arrays[f"cache.{name}"], got[f"cache.{name}"]
                assert after.shape == before.shape and after.dtype == before.dtype, (
                    f"{what} {name}: {after.dtype}{after.shape}"
                )
                at = oracle.places(which, *self.geometry(), slots[live])
                want = before.reshape(-1).copy()
                want[at.reshape(-1)] = values[live].reshape(-1)
                flat = after.reshape(-1)
                same = want.view(f"u{want.itemsize}") == flat.view(f"u{flat.itemsize}")
                if exact or same.all():
                    assert same.all(), f"{what} {name}: {(~same).sum()} of {same.size} differ"
                    continue
                untouched = np.ones(flat.size, bool)
                untouched[at.reshape(-1)] = False
                assert same[untouched].all(), f"{what} {name}: bytes outside of the slots were written"
                if which == "scale":
                    np.testing.assert_allclose(flat, want, rtol=2.0**-20)
                else:
                    apart = np.abs(oracle.steps(want) - oracle.steps(flat))[~untouched]
                    assert apart.max() <= 1 and (apart > 0).sum() <= apart.size / 1000 + 2, (
                        f"{what} {name}: {apart.max()}"
                    )

    def gathered(self, cache: dict[str, np.ndarray], slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(k, v) of the buffers ``cache.k`` ... by the formulas; zeros where there is no such slot."""
        live = (slots >= 0) & (slots < self.slots)
        out = []
        for n in "kv":
            at = oracle.places(n, *self.geometry(), np.where(live, slots, 0))
            values = cache[f"cache.{n}"].reshape(-1)[at]
            if self.quant is not None:
                scale = np.float32(cache[f"cache.{n}_scale"])
                if self.quant == "per_token":
                    scale = scale.reshape(-1)[oracle.places("scale", *self.geometry(), np.where(live, slots, 0))]
                with np.errstate(all="ignore"):
                    values = values.astype(np.float32) * scale
            out.append(np.where(live[:, None, None], values, np.zeros((), values.dtype)))
        return out[0], out[1]

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@functools.cache
def _jitted(case: Case, backend: str | None) -> Any:
    import jax

    return jax.jit(lambda qkv, a, cache: case.op(qkv, a, cache, backend), donate_argnums=2)


def bytes_of(a: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(a)).reshape(-1).view(np.uint8)
