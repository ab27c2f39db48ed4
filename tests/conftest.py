"""What must hold before jax is imported, and the rule that a skip named in ``JAXNORM_REQUIRE`` is a failure."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile

import pytest

sys.path[:0] = [os.path.dirname(__file__)]  # for `import cases` from tests/gpu, and under --import-mode=importlib

import needs  # noqa: E402

CPU_DEVICES = 8
_NEED = re.compile(r"\bneeds (\w+):")
_cache_dir: str | None = None


def wants_gpu(config: pytest.Config) -> bool:
    """Asked for by JAXNORM_TEST_PLATFORM=gpu, or by a marker expression that selects gpu or multigpu."""
    platform = os.environ.get("JAXNORM_TEST_PLATFORM", "")
    if platform:
        return platform in ("gpu", "cuda", "rocm")
    expression = config.getoption("markexpr", "") or ""
    return bool(re.search(r"\b(multi)?gpu\b", re.sub(r"not\s+(multi)?gpu\b", "", expression)))


def pytest_configure(config: pytest.Config) -> None:
    global _cache_dir
    if wants_gpu(config):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        if "jax" in sys.modules:
            raise pytest.UsageError("jax was imported before conftest.py could force the CPU devices")
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        if "--xla_backend_optimization_level" not in flags:
            # 0 compiles faster still, but rounds GroupNorm's y another way from sharding to sharding
            flags += " --xla_backend_optimization_level=1"  # many small programs: a tenth of the time
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={CPU_DEVICES}".strip()
    if "JAXNORM_CACHE_DIR" not in os.environ:
        _cache_dir = os.environ["JAXNORM_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxnorm-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache_dir:
        shutil.rmtree(_cache_dir, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multigpu")]
    if not marked:
        return
    if not wants_gpu(config):
        reason = "needs gpu: run with JAXNORM_TEST_PLATFORM=gpu on a machine that has one"
    else:
        import jax

        reason = "" if jax.default_backend() == "gpu" else f"needs gpu: jax found {jax.devices()[0]}"
    for item in marked if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip for the want of something that JAXNORM_REQUIRE names becomes a failure."""
    if report.outcome != "skipped" or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2]
    match = _NEED.search(reason)
    if match and match.group(1) in needs.required():
        report.outcome = "failed"
        report.longrepr = f"JAXNORM_REQUIRE names {match.group(1)!r}, but this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    _fail_if_required(report)
    return report
