"""Cases of the operators on heads, and what they must give: float64 numpy written from the contract, bounds of section 1.7.

It shares no code with the library; the component rule of mrope is a loop over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import oracle
import tolerances
from oracle import f64

BF16, F16, F32 = cases.FLOATS
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One call of rope (no weights) or qk_norm_rope. Entries of ``heads``, ``dtypes`` and ``weights`` are one for each array."""

    heads: tuple[int, ...] = (4, 2)
    features: int = 64
    lead: tuple[int, ...] = (6,)
    rotary: int | None = None
    style: str = "neox"
    dtypes: tuple[str, ...] = (BF16, BF16)
    weights: tuple[str | None, ...] | None = None
    table: str = F32
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    shared: bool = False
    """Positions ``[T]`` for several leading dims."""
    outside: bool = True
    """Some positions lie beyond the table."""
    index: str = "int32"
    offset: float = 0.0
    eps: float = 1e-6

    def __str__(self) -> str:
        short = {BF16: "b", F16: "h", F32: "f", None: "-"}
        parts = ["rope" if self.weights is None else "qk", "x".join(map(str, self.lead)), "+".join(map(str, self.heads)),
                 f"{self.features}:{self.rotary or self.features}", self.style, "".join(short[d] for d in self.dtypes)]  # fmt: skip
        parts += ["".join(short[w] for w in self.weights)] if self.weights else []
        parts += [short[self.table]] if self.table != F32 else []
        parts += ["i" * self.interleaved + ",".join(map(str, self.sections))] if self.sections else []
        parts += ["shared"] if self.shared else []
        parts += [self.index] if self.index != "int32" else []
        return "-".join(parts)

    @property
    def width(self) -> int:
        return self.rotary or self.features

    @property
    def rows(self) -> int:
        return 29

    def arrays(self, seed: int = 0) -> Arrays:
        """x0, x1, ..., w0, ..., positions as the public function takes them, cos_sin, and cotangents g0, g1, ..."""
        g = cases.rng(seed + self.features + 31 * sum(self.heads))
        out: Arrays = {}
        for i, (h, d) in enumerate(zip(self.heads, self.dtypes, strict=True)):
            out[f"x{i}"] = cases.normal(g, (*self.lead, h, self.features), d, std=1.5)
            out[f"g{i}"] = cases.normal(g, (*self.lead, h, self.features), d)
        for i, w in enumerate(self.weights or ()):
            if w is not None:
                out[f"w{i}"] = cases.weight(g, self.features, w)
        tokens = self.lead[-1:] if self.shared else self.lead
        low, high = (-3, self.rows + 3) if self.outside else (0, self.rows)
        out["positions"] = g.integers(low, high, ((3, *tokens) if self.sections else tokens)).astype(self.index)
        angle = g.uniform(-4, 4, (self.rows, self.width // 2))
        out["cos_sin"] = np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(cases.dtype(self.table))
        return out

    # ---- the operator

    def call(self, a: dict[str, Any], backend: str | None = None) -> tuple[Any, ...]:
        import jaxnorm as jn

        xs = tuple(a[f"x{i}"] for i in range(len(self.heads)))
        where = (a["positions"], a["cos_sin"])
        if self.weights is None:
            if self.sections:
                more = {"sections": self.sections, "interleaved": self.interleaved}
                return jn.mrope(xs, *where, **more, style=self.style, backend=backend)
            return jn.rope(xs, *where, style=self.style, backend=backend)
        return jn.qk_norm_rope(
            *xs, a.get("w0"), a.get("w1"), *where, eps=self.eps, style=self.style, weight_offset=self.offset,
            mrope_sections=self.sections, mrope_interleaved=self.interleaved, backend=backend)  # fmt: skip

    # ---- the definition

    def angles(self, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) float64 ``[*lead, 1, h]``."""
        positions, table = a["positions"].astype(np.int64), f64(a["cos_sin"])
        if self.shared:
            front = positions.shape[:-1]
            ones = (1,) * (len(self.lead) - 1)
            positions = np.broadcast_to(positions.reshape(*front, *ones, self.lead[-1]), (*front, *self.lead))
        half = self.width // 2
        cos, sin = np.ones((*self.lead, 1, half)), np.zeros((*self.lead, 1, half))
        for token in np.ndindex(*self.lead):
            for j in range(half):
                p = int(
                    positions[(component(j, self.sections, self.interleaved), *token)]
                    if self.sections
                    else positions[token]
                )
                if 0 <= p < table.shape[0]:
                    cos[(*token, 0, j)], sin[(*token, 0, j)] = table[p, j], table[p, half + j]
        return cos, sin

    def expected(self, a: Arrays) -> list[Turned]:
        cos, sin = self.angles(a)
        out = []
        for i, dtype in enumerate(self.dtypes):
            x = f64(a[f"x{i}"])
            if self.weights is not None:
                y = oracle.rmsnorm(a[f"x{i}"], a.get(f"w{i}"), eps=self.eps, weight_offset=self.offset).y
                x = f64(oracle.round_to(y, dtype))
            out.append(turn(x, cos, sin, self.style, dtype, normed=self.weights is not None))
        return out

    def check(self, a: Arrays, results: Any, what: str = "") -> None:
        for i, want in enumerate(self.expected(a)):
            want.check(results[i], f"{what} {self} y{i}")

    def turned_back(self, a: Arrays, i: int) -> Turned:
        """The i-th cotangent through the rotation."""
        cos, sin = self.angles(a)
        return turn(f64(a[f"g{i}"]), cos, -sin, self.style, self.dtypes[i])

    def backward(self, a: Arrays, i: int) -> oracle.Backward:
        """Gradients of the i-th array and its weight."""
        forward = oracle.rmsnorm(a[f"x{i}"], a.get(f"w{i}"), eps=self.eps, weight_offset=self.offset)
        g = self.turned_back(a, i).value
        return oracle.rmsnorm_backward(forward, a.get(f"w{i}"), g, weight_offset=self.offset)

    def check_gradients(self, a: Arrays, gradients: dict[str, Any], what: str = "") -> None:
        """``gradients`` of ``sum(y_i * g_i)`` by argument name."""
        for i in range(len(self.heads)):
            got = np.asarray(gradients[f"x{i}"])
            assert got.dtype == a[f"x{i}"].dtype, f"{what} dx{i}: {got.dtype}"
            if self.weights is None:
                self.turned_back(a, i).check(got, f"{what} {self} dx{i}")
                continue
            want = self.backward(a, i)
            tolerances.assert_dx(got, want, f"{what} {self} dx{i}")
            if f"w{i}" in a:
                dw = np.asarray(gradients[f"w{i}"])
                assert dw.dtype in (a[f"w{i}"].dtype, np.float32), f"{what} dw{i}: {dw.dtype}"
                tolerances.assert_dweight(dw, want, f"{what} {self} dw{i}")

    # ---- as the kernels see it

    def problem(self, a: Arrays, backward: bool, target: str = "sm_90"):
        """(Problem, operands) of the stage on folded operands."""
        from jaxnorm.kernels.configs import Problem

        fold = (-1, self.lead[-1]) if self.shared else (int(np.prod(self.lead)),)
        norm = self.weights is not None
        each = range(len(self.heads))
        operands: Arrays = {}
        for i in each:
            x = a[f"g{i}" if backward and not norm else f"x{i}"]
            operands[f"x{i}"] = x.reshape(*fold, *x.shape[-2:])
        operands |= {f"w{i}": a[f"w{i}"] for i in each if f"w{i}" in a}
        front = (3,) if self.sections else ()
        tokens = self.lead[-1:] if self.shared else fold
        operands["positions"] = a["positions"].reshape(*front, *tokens)
        operands["cos_sin"] = a["cos_sin"]
        if norm and backward:
            operands |= {f"dy{i}": a[f"g{i}"].reshape(operands[f"x{i}"].shape) for i in each}
        prefix = "dx" if norm and backward else "y"
        results = [(f"{prefix}{i}", operands[f"x{i}"].shape, operands[f"x{i}"].dtype.name) for i in each]
        if norm and backward:
            results += [(f"dw{i}", (self.features,), F32) for i in each if f"w{i}" in a]
        options: dict[str, Any] = {"style": self.style, "sections": self.sections, "interleaved": self.interleaved}
        options |= {"eps": self.eps, "weight_offset": self.offset} if norm else {"inverse": backward}
        buffers = [*((n, v.shape, v.dtype.name) for n, v in operands.items()), *results]
        stage = f"{'qk_norm_rope' if norm else 'rope'}_{'bwd' if backward else 'fwd'}"
        p = Problem(stage, operands["x0"].shape[0], self.features, tuple((n, s) for n, s, _ in buffers),
                    tuple((n, d) for n, _, d in buffers), tuple(options.items()), target)  # fmt: skip
        return p, operands

    def check_stage(self, a: Arrays, out: dict[str, np.ndarray], backward: bool, what: str = "") -> None:
        """Results of the stage by name."""
        each = range(len(self.heads))
        prefix = "dx" if backward and self.weights is not None else "y"
        shaped = [np.asarray(out[f"{prefix}{i}"]).reshape(a[f"x{i}"].shape) for i in each]
        if not backward:
            return self.check(a, shaped, what)
        gradients = {f"x{i}": v for i, v in enumerate(shaped)} | {
            f"w{i}": out[f"dw{i}"] for i in each if f"dw{i}" in out
        }
        return self.check_gradients(a, gradients, what)


def run(
    case: Case | TwoStream, a: dict[str, Any], backend: str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(results, gradients of ``sum(y_i * g_i)`` by name) in one jitted program."""
    import jax
    import jax.numpy as jnp

    two = isinstance(case, TwoStream)
    names = [n for n in a if n[0] in ("qk" if two else "xw")]
    cotangents = [f"g{n}" for n in ("qk" if two else range(len(case.heads)))]

    def both(a: dict[str, Any]) -> Any:
        f = lambda *v: case.call(a | dict(zip(names, v, strict=True)), backend)  # noqa: E731
        results, pull = jax.vjp(f, *(a[n] for n in names))
        return results, dict(zip(names, pull(tuple(a[n] for n in cotangents)), strict=True))

    return jax.jit(both)(jax.tree.map(jnp.asarray, a))


def component(j: int, sections: tuple[int, int, int] | None, interleaved: bool) -> int:
    if sections is None:
        return 0
    if interleaved:
        return j % 3 if j % 3 in (1, 2) and j < 3 * sections[j % 3] else 0
    return 0 if j < sections[0] else 1 if j < sections[0] + sections[1] else 2


@dataclass(frozen=True)
class Turned:
    """A rotated array in float64 and its bounds."""

    value: np.ndarray
    terms: np.ndarray
    """abs(x1 c) + abs(x2 s)"""
    input_ulps: np.ndarray
    """One ulp of each rounded input, through the rotation."""
    dtype: str
    passed: np.ndarray
    """What is not rotated, as float64."""
    normed: bool

    def check(self, got: Any, what: str) -> None:
        got = np.asarray(got)
        want = oracle.round_to(self.value, self.dtype)
        assert got.dtype == want.dtype and got.shape == want.shape, (
            f"{what}: {got.dtype}{got.shape} is not {want.dtype}{want.shape}"
        )
        with np.errstate(all="ignore"):
            error = np.abs(f64(got) - self.value)
            if self.dtype == F32:
                bound = 2.0**-20 * self.terms
            else:
                bound = tolerances.ulp(self.value, self.dtype) + 2.0**-22 * self.terms
            same = (np.isnan(f64(got)) & np.isnan(self.value)) | (f64(got) == self.value)
            bad = ~((error <= bound) | same)
            far = ~((error <= bound + self.input_ulps) | same)
        outliers = got.size // 1000 if self.normed and self.dtype != F32 else 0
        if far.any() or bad.sum() > outliers:
            tolerances._fail(
                what, got, want, far if far.any() else bad, f"worst {float(np.nanmax(error / bound)):.2f} of the bound"
            )
        if not self.normed and self.passed.shape[-1]:
            rest = self.passed.shape[-1]
            tolerances.assert_same_values(got[..., -rest:], self.passed.astype(got.dtype), f"{what} beyond rotary_dim")


def turn(x: np.ndarray, cos, sin, style: str, dtype: str, normed: bool = False) -> Turned:
    """The pairs of float64 ``x [..., H, D]`` turned by ``cos, sin [..., 1, h]``."""
    half = cos.shape[-1]
    pairs = [(j, j + half) if style == "neox" else (2 * j, 2 * j + 1) for j in range(half)]
    first, second = (np.array(p) for p in zip(*pairs, strict=True))
    value, terms = x.copy(), np.abs(x)
    small = tolerances.ulp(x, dtype)
    ulps = small.copy()
    with np.errstate(all="ignore"):
        a, b = x[..., first], x[..., second]
        value[..., first], value[..., second] = a * cos - b * sin, b * cos + a * sin
        terms[..., first] = np.abs(a * cos) + np.abs(b * sin)
        terms[..., second] = np.abs(b * cos) + np.abs(a * sin)
        c, s = np.abs(cos), np.abs(sin)
        ulps[..., first] = c * small[..., first] + s * small[..., second]
        ulps[..., second] = c * small[..., second] + s * small[..., first]
    return Turned(value, terms, ulps, dtype, x[..., 2 * half :], normed)


# ---- two streams


@dataclass(frozen=True)
class TwoStream:
    """One call of qk_norm_rope_two_stream."""

    batch: int = 2
    tokens: tuple[int, int] = (3, 5)
    heads: tuple[int, int] = (3, 2)
    features: int = 64
    rotary: int | None = None
    style: str = "neox"
    dtypes: tuple[str, str] = (BF16, BF16)
    weights: tuple[str | None, ...] = (BF16, BF16, F32, BF16)
    offset: float = 1.0
    eps: float = 1e-6

    def __str__(self) -> str:
        size = f"{self.batch}x{self.tokens[0]}+{self.tokens[1]}"
        return f"two-{size}-{self.heads[0]}+{self.heads[1]}-{self.features}:{self.rotary or self.features}-{self.style}"

    PARTS = ("q0", "k0", "q1", "k1")

    def part(self, name: str) -> Case:
        """The stream's q or k as a case of its own: one array."""
        i, n = int(name[1]), "qk".index(name[0])
        return Case(
            (self.heads[n],), self.features, (self.batch, self.tokens[i]), self.rotary, self.style, (self.dtypes[n],),
            (self.weights[self.PARTS.index(name)],), offset=self.offset, eps=self.eps, outside=False)  # fmt: skip

    def arrays(self) -> Arrays:
        g = cases.rng(self.features)
        out: Arrays = {}
        for name in self.PARTS:
            case = self.part(name)
            shape = (*case.lead, *case.heads, self.features)
            out[name] = cases.normal(g, shape, case.dtypes[0], std=1.5)
        for name, w in zip(self.PARTS, self.weights, strict=True):
            if w is not None:
                out[f"{name[0]}_weight{name[1]}"] = cases.weight(g, self.features, w)
        for i, t in enumerate(self.tokens):
            angle = g.uniform(-4, 4, (t, (self.rotary or self.features) // 2))
            out[f"cos_sin{i}"] = np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        for i, n in enumerate("qk"):
            out[f"g{n}"] = cases.normal(g, (self.batch, sum(self.tokens), self.heads[i], self.features), self.dtypes[i])
        return out

    def call(self, a: dict[str, Any], backend: str | None = None) -> tuple[Any, Any]:
        import jaxnorm as jn

        weights = [a.get(f"{p[0]}_weight{p[1]}") for p in self.PARTS]
        return jn.qk_norm_rope_two_stream(
            *(a[p] for p in self.PARTS), *weights, a["cos_sin0"], a["cos_sin1"], eps=self.eps, style=self.style,
            weight_offset=self.offset, backend=backend)  # fmt: skip

    def alone(self, a: Arrays, name: str) -> tuple[Case, Arrays]:
        """The part's case and arrays: positions count the tokens of its stream."""
        i, n = int(name[1]), name[0]
        start = 0 if i == 0 else self.tokens[0]
        mine = {
            "x0": a[name],
            "g0": a[f"g{n}"][:, start : start + self.tokens[i]],
            "cos_sin": a[f"cos_sin{i}"],
            "positions": np.broadcast_to(np.arange(self.tokens[i], dtype=np.int32), (self.batch, self.tokens[i])),
        }
        if (weight := f"{n}_weight{i}") in a:
            mine["w0"] = a[weight]
        return self.part(name), mine

    def check(self, a: Arrays, q: Any, k: Any, what: str = "") -> None:
        for name in self.PARTS:
            case, mine = self.alone(a, name)
            joined = np.asarray(q if name[0] == "q" else k)
            assert joined.shape[1] == sum(self.tokens)
            start = 0 if name[1] == "0" else self.tokens[0]
            case.check(mine, (joined[:, start : start + case.lead[1]],), f"{what} {self} {name}")

    def check_gradients(self, a: Arrays, gradients: dict[str, Any], what: str = "") -> None:
        """By argument name: q0, ..., q_weight0, ..."""
        for name in self.PARTS:
            case, mine = self.alone(a, name)
            got = {"x0": gradients[name]}
            if "w0" in mine:
                got["w0"] = gradients[f"{name[0]}_weight{name[1]}"]
            case.check_gradients(mine, got, f"{what} {self} {name}")

    def problem(self, a: Arrays, backward: bool, target: str = "sm_90"):
        """(Problem, operands) of the stage."""
        from jaxnorm.kernels.configs import Problem

        operands = {n: v for n, v in a.items() if n[0] != "g"}
        q, k = (a[f"g{n}"] for n in "qk")
        if backward:
            operands |= {"dq": q, "dk": k}
            results = [(f"d{n}", a[n].shape, a[n].dtype.name) for n in self.PARTS]
            results += [(f"d{n}", (self.features,), F32) for n in a if "weight" in n]
        else:
            results = [("q", q.shape, q.dtype.name), ("k", k.shape, k.dtype.name)]
        buffers = [*((n, v.shape, v.dtype.name) for n, v in operands.items()), *results]
        options = {"eps": self.eps, "weight_offset": self.offset, "style": self.style}
        stage = f"qk_norm_rope_two_stream_{'bwd' if backward else 'fwd'}"
        p = Problem(stage, self.batch, self.features, tuple((n, s) for n, s, _ in buffers),
                    tuple((n, d) for n, _, d in buffers), tuple(options.items()), target)  # fmt: skip
        return p, operands

    def check_stage(self, a: Arrays, out: dict[str, np.ndarray], backward: bool, what: str = "") -> None:
        if not backward:
            return self.check(a, out["q"], out["k"], what)
        return self.check_gradients(a, {n[1:]: v for n, v in out.items() if n[0] == "d"}, what)


# Named shapes of models (heads, D, rotary) with every option somewhere; small numbers of tokens.
ROPE_CASES = [
    Case((32, 8), 128, (5,)),
    Case((64, 4), 128, (3,), style="gptj", dtypes=(F16, F16), index="int64"),
    Case((16, 8), 128, (2, 7), 64, dtypes=(BF16, F32), shared=True),
    Case((4, 1), 256, (2, 3), 64, table=BF16),
    Case((5,), 80, (7,), dtypes=(F32,), style="gptj"),
    Case((3, 1, 2), 96, (4,), 64, dtypes=(F16, BF16, F32), table=F16),
    Case((2, 2), 10, (9,), 6, style="gptj"),
    Case((2, 3), 14, (9,), 6, dtypes=(F32, BF16)),
    Case((16, 2), 128, (6,), sections=(16, 24, 24)),
    Case((4, 2), 128, (2, 3), sections=(24, 20, 20), interleaved=True, dtypes=(BF16, F32)),
    Case((4, 2), 256, (3, 2), 64, sections=(8, 12, 12), interleaved=True, style="gptj", shared=True),
]
QK_CASES = [
    Case((32, 8), 128, (5,), weights=(BF16, BF16)),
    Case((64, 4), 128, (3,), 64, style="gptj", dtypes=(F16, F16), weights=(F16, F32), offset=1.0, index="int64"),
    Case((8, 2), 64, (2, 7), dtypes=(BF16, F32), weights=(F32, BF16), shared=True, offset=0.5),
    Case((4, 1), 256, (2, 3), 64, weights=(F32, F32), offset=1.0, table=BF16),
    Case((5, 2), 80, (7,), weights=(BF16, None), dtypes=(F32, F32), style="gptj"),
    Case((3, 2), 96, (4,), 64, dtypes=(F16, BF16), weights=(None, None)),
    Case((3, 2), 192, (4,), weights=(BF16, BF16), dtypes=(BF16, BF16), table=F16),
    Case((2, 1), 512, (3,), 128, weights=(BF16, BF16), eps=1e-5),
    Case((2, 3), 14, (9,), 6, weights=(F32, BF16), dtypes=(F32, BF16)),
    Case((4, 2), 128, (6,), sections=(16, 24, 24), weights=(BF16, BF16)),
    Case((4, 2), 128, (2, 3), sections=(24, 20, 20), interleaved=True, weights=(F32, BF16), style="gptj"),
    Case((4, 2), 256, (3, 2), 64, sections=(8, 12, 12), interleaved=True, shared=True, weights=(BF16, BF16)),
]
TWO_CASES = [
    TwoStream(),
    TwoStream(3, (5, 2), (24, 25), 128, style="gptj", dtypes=(F16, BF16), weights=(F16, F32, BF16, BF16)),
    TwoStream(1, (4, 3), (2, 1), 256, 64, dtypes=(F32, BF16), weights=(None, BF16, BF16, None), offset=0.0),
]


def quick(found: list[Any], few: tuple[int, ...]) -> list[Any]:
    """The cases as parameters of a test, those beside ``few`` for the slow run."""
    import pytest

    return [c if i in few else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(found)]
