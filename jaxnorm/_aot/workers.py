"""Many code objects at once. A clang or hipcc is a process of its own, so threads do; NVRTC, hipRTC and Triton compile one kernel
at a time in a process, so beyond a few kernels there are several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

from .. import _launch
from .._compile import hip
from .._compile.code_object import CodeObject
from ..kernels.configs import Launch, Problem
from .instances import Instance

FEW = 24
"""Kernels that are compiled sooner than another process has imported jax and its compiler."""


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(instances: Sequence[Instance]) -> Iterator[CodeObject]:
    """Their code objects, in order, each as soon as it and those before it are there.

    Raises:
      CompileError: a kernel did not compile; what has not begun is given up.
    """
    inside = [i for i in instances if _in_process(i)]
    count = min(cpus(), len(inside) // FEW)
    threads = ThreadPoolExecutor(cpus())
    others: Executor = threads
    if count > 1:
        others = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    try:
        futures = [
            (others if _in_process(i) else threads).submit(_compile, i.launch, i.problem, i.stage.backend)
            for i in instances
        ]
        for future in futures:
            yield future.result()
    finally:
        for pool in {threads, others}:
            pool.shutdown(cancel_futures=True)


def _in_process(instance: Instance) -> bool:
    """Whether its compiler is a library."""
    if instance.stage.backend == "triton":
        return True
    found = hip.find(instance.stage.target)
    return found is not None and found.kind in ("nvrtc", "hiprtc")


def _compile(launch: Launch, problem: Problem, backend: str) -> CodeObject:
    return _launch.compile_launch(launch, problem, backend)
