"""QuantSpec says how to quantise, Quantized holds the outcome."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export

from .errors import value_error

FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
DTYPES = ("int8", "fp8", *FP8, "fp4")
LAYOUTS = ("row", "column", "shuffled")
ROUNDINGS = ("up", "down", "even")


def dtype_max(name: str) -> float:
    """Largest finite code of a resolved format, from the format itself: 127, 448, 240, 57344 or 6."""
    if name == "int8":
        return 127.0
    if name == "fp4":
        return float(ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).max)
    return float(ml_dtypes.finfo(np.dtype(name)).max)


@dataclass(frozen=True)
class QuantSpec:
    """How values are quantised; hashable, fixed when tracing.

    Args:
      dtype:          ``"int8"``, ``"fp8"`` (the target's native e4m3: fnuz on gfx94x, fn elsewhere), one of the four fp8 formats by
                      name, ``"fp4"`` (e2m1, two a byte), or a jnp dtype.
      group_size:     None = one scale a row (per token); else one for each group of this many features along N.
      scale_dtype:    ``"float32"``, or ``"e8m0"``: powers of two as uint8 exponents, with a group_size (MX formats: 32).
      scale_layout:   ``"row"`` [..., G]; ``"column"`` [G, M]; ``"shuffled"`` the MX tile layout (e8m0, group 32).
      scale_ub:       upper bound of the row's or group's maximum; larger values saturate.
      e8m0_rounding:  ``"up"`` (never saturates), ``"down"`` or ``"even"``.

    Raises:
      ValueError: an unknown name, or a combination no format has.
    """

    dtype: Any
    group_size: int | None = None
    scale_dtype: str = "float32"
    scale_layout: str = "row"
    scale_ub: float | None = None
    e8m0_rounding: str = "up"

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  a frozen dataclass normalises itself
        set_("dtype", _dtype_name(self.dtype))
        self._one_of("scale_dtype", ("float32", "e8m0"))
        self._one_of("scale_layout", LAYOUTS)
        self._one_of("e8m0_rounding", ROUNDINGS)
        if self.group_size is not None:
            if (
                isinstance(self.group_size, bool)
                or not isinstance(self.group_size, int | np.integer)
                or self.group_size < 1
            ):
                raise value_error("QuantSpec", "group_size", repr(self.group_size), "a positive integer or None")
            set_("group_size", int(self.group_size))
        if self.scale_ub is not None:
            if (
                isinstance(self.scale_ub, bool)
                or not isinstance(self.scale_ub, int | float | np.number)
                or not self.scale_ub > 0
            ):
                raise value_error("QuantSpec", "scale_ub", repr(self.scale_ub), "a positive number or None")
            set_("scale_ub", float(self.scale_ub))
        self._combination()

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise value_error("QuantSpec", name, repr(getattr(self, name)), " or ".join(map(repr, allowed)))

    def _combination(self) -> None:
        e8m0 = self.scale_dtype == "e8m0"
        if self.dtype == "int8" and e8m0:
            raise value_error(
                "QuantSpec", "scale_dtype", "'e8m0' with int8", "'float32'", "No MX format has int8 elements here."
            )
        if e8m0 and self.group_size is None:
            raise value_error("QuantSpec", "group_size", "None with scale_dtype='e8m0'", "a group size such as 32")
        if self.dtype == "fp4" and not (e8m0 and self.group_size == 32):
            got = f"group_size={self.group_size}, scale_dtype={self.scale_dtype!r} with fp4"
            raise value_error("QuantSpec", "dtype", got, "group_size=32 and scale_dtype='e8m0'", "That is MXFP4.")
        if self.scale_layout == "shuffled" and not (e8m0 and self.group_size == 32):
            got = f"'shuffled' with group_size={self.group_size}, scale_dtype={self.scale_dtype!r}"
            raise value_error(
                "QuantSpec", "scale_layout", got, "group_size=32 and scale_dtype='e8m0'", "Use 'row' or 'column'."
            )

    @property
    def value_dtype(self) -> str:
        """dtype of ``Quantized.values``; the spec must be resolved."""
        return "uint8" if self.dtype == "fp4" else self.dtype

    def groups(self, features: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size is None else features // self.group_size


def _dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    name = None
    if not isinstance(dtype, str):
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = None
    name = {"float4_e2m1fn": "fp4"}.get(name or "", name)
    if name not in DTYPES:
        raise value_error(
            "QuantSpec", "dtype", repr(dtype), f"one of {', '.join(map(repr, DTYPES))}, or a jnp dtype among them"
        )
    return name


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes and their scales.

    Attributes:
      values: int8 or fp8 [..., N]; uint8 [..., N // 2] for fp4, element 2i in the low nibble.
      scale:  what a code is multiplied with: float32 [..., 1] per token, [..., G] per group ("column": [G, M]), () static; uint8
              exponents E for e8m0, the scale being 2**(E - 127).
      spec:   the QuantSpec, with the dtype resolved.
    """

    values: jax.Array
    scale: jax.Array
    spec: QuantSpec

    def tree_flatten(self) -> tuple[tuple[Any, Any], QuantSpec]:
        return (self.values, self.scale), self.spec

    @classmethod
    def tree_unflatten(cls, spec: QuantSpec, children: Any) -> Quantized:
        values, scale = children
        return cls(values, scale, spec)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """``cast(f32(code) * scale)`` [..., N], in any layout, also with batch dims in front of values and scale (after vmap)."""
        from ._ref import quant

        return quant.dequantize(self.values, self.scale, self.spec).astype(dtype)

    def replace(self, **changes: Any) -> Quantized:
        return dataclasses.replace(self, **changes)


export.register_pytree_node_serialization(  # a Quantized among the results of an exported program
    Quantized,
    serialized_name="jaxnorm.Quantized",
    serialize_auxdata=lambda spec: json.dumps(dataclasses.asdict(spec)).encode(),
    deserialize_auxdata=lambda data: QuantSpec(**json.loads(bytes(data))),
)
