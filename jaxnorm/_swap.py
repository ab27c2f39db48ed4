"""Turning the norm layers of an existing Flax NNX model into jaxnorm's, in place. flax is imported when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import type_error


@dataclass(frozen=True)
class Swap:
    """One norm layer that :func:`swap` met.

    Attributes:
      path:    where it is in the model, e.g. ``layers.0.norm``; ``.`` for the model itself.
      module:  its class, e.g. ``flax.nnx.RMSNorm``.
      swapped: whether it is jaxnorm's now.
      note:    why not, or what to know.
    """

    path: str
    module: str
    swapped: bool
    note: str = ""

    def __str__(self) -> str:
        arrow = "-> jaxnorm.nnx." + self.module.rpartition(".")[2] if self.swapped else "left as it is"
        return f"{self.path}: {self.module} {arrow}" + (f" ({self.note})" if self.note else "")


class _Swaps(list[Swap]):
    """The layers met, one a line when printed."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no norm layer of flax.nnx found"


def swap(model: Any) -> list[Swap]:
    """Makes the norm layers of a Flax NNX model jaxnorm's own, in place, and says which.

    Parameters, their metadata, shared layers and everything else in the model stay the objects they are. Swapped are
    ``flax.nnx.RMSNorm``, ``LayerNorm`` and ``GroupNorm``; subclasses of these that are not jaxnorm's are left and named, as they
    may compute something else.

    Args:
      model: a ``flax.nnx.Module``.

    Returns:
      A printable list with a ``Swap(path, module, swapped, note)`` for each norm layer met.

    Raises:
      TypeError: no ``flax.nnx.Module``.
    """
    from . import nnx  # says what to install where flax is missing

    if not isinstance(model, nnx.flax_nnx.Module):
        raise type_error(
            "swap", "model", type(model).__name__, "a flax.nnx.Module", "Linen models change their import."
        )
    twins = {cls.__mro__[1]: cls for cls in (nnx.RMSNorm, nnx.LayerNorm, nnx.GroupNorm)}
    found = _Swaps()
    for path, module in nnx.flax_nnx.iter_modules(model):
        base = next((b for b in twins if isinstance(module, b)), None)
        if base is not None and not isinstance(module, tuple(twins.values())):
            found.append(_swapped(".".join(map(str, path)) or ".", module, base, twins[base]))
    return found


def _swapped(path: str, module: Any, base: type, twin: type) -> Swap:
    if type(module) is not base:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return Swap(path, name, False, f"a subclass of flax.nnx.{base.__name__}")
    module.__class__ = twin  # the twin adds to the attributes, and keeps those there are
    module.quant = None
    if base.__name__ == "RMSNorm":
        module.weight_offset, module.cast = 0.0, "output"
    return Swap(path, f"flax.nnx.{base.__name__}", True, _note(module))


def _note(module: Any) -> str:
    if module.axis_name is not None:
        return "statistics over a device axis: plain JAX"
    if getattr(module, "num_groups", None) and module.reduction_axes is not None:
        return "its own reduction_axes: results are flax.linen.GroupNorm's"
    return ""
