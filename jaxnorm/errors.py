"""Exceptions of jaxnorm. Everything else that a caller can get wrong is a plain ValueError or TypeError."""

from __future__ import annotations


class UnsupportedError(Exception):
    """A backend cannot serve this call here. Raised only when the caller named the backend; otherwise another one is chosen.

    Attributes:
      op:     the operator, e.g. ``rmsnorm``.
      device: the target or platform it was asked for, e.g. ``gfx942`` or ``cpu``.
      reason: why it cannot.
      remedy: what the caller can do about it.
    """

    def __init__(self, op: str, device: str, reason: str, remedy: str) -> None:
        self.op, self.device, self.reason, self.remedy = op, device, reason, remedy
        super().__init__(f"{op}: {reason} {remedy} `python -m jaxnorm doctor` says more.")


class CompileError(RuntimeError):
    """A kernel did not compile: a defect of jaxnorm or of the compiler, never a reason to fall back in silence."""


def value_error(op: str, argument: str, got: object, expected: object, remedy: str = "") -> ValueError:
    return ValueError(_text(op, argument, got, expected, remedy))


def type_error(op: str, argument: str, got: object, expected: object, remedy: str = "") -> TypeError:
    return TypeError(_text(op, argument, got, expected, remedy))


def _text(op: str, argument: str, got: object, expected: object, remedy: str) -> str:
    return f"{op}: {argument}: got {got}, expected {expected}." + (f" {remedy}" if remedy else "")
