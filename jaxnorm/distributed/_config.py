"""Everything static about one distributed call."""

from __future__ import annotations

from dataclasses import dataclass

from .._types import QuantSpec

Axis = str | tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """Hashable: the parameter of the fused primitive, and what the composite is traced from."""

    op: str
    axis: Axis
    ranks: int
    """W"""
    rows: int
    """M"""
    features: int
    """N"""
    dtype: str
    """Of the partial sums, hence of an unquantised result."""
    spec: QuantSpec | None
    """Resolved."""
    norm: str
    eps: float
    weight_offset: float
    cast: str
    scatter: bool
    """The residual is this rank's rows and so is residual_out; else both are replicated."""
    gather: bool
    reduce: str
    timeout_s: float
    native_fp8: bool = False
    """The spec said "fp8"."""

    @property
    def share(self) -> int:
        """Rows of a rank, ``ceil(M / W)``; the last ranks may miss some."""
        return -(-self.rows // self.ranks)

    @property
    def ragged(self) -> bool:
        return self.rows % self.ranks != 0
