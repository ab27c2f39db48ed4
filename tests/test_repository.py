"""The tree keeps its own rules: build files, import direction, what an import costs, sizes, linters."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from needs import need

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cc", ".h", ".hip")


def files() -> list[str]:
    """Every file of the checkout that git knows or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    need("git", listed.returncode == 0, "these rules are about a git checkout")
    return sorted(f for f in set(listed.stdout.splitlines()) if (ROOT / f).is_file())


def sources() -> list[str]:
    return [f for f in files() if f.endswith(SOURCES)]


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


# Bazel


def _matches(path: str, pattern: str) -> bool:
    regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, path) is not None


class Build:
    """BUILD evaluated: Starlark calls and comprehensions are Python, and the rules just record their arguments."""

    def __init__(self, text: str, tree: list[str]) -> None:
        self.tree, self.targets, self.named, self.labels = tree, {}, set(), set()
        scope = dict.fromkeys(("load", "package", "exports_files"), self._files)
        scope |= dict.fromkeys(("filegroup", "cc_binary", "py_binary", "py_library", "py_test"), self._rule)
        exec(
            compile(text, "BUILD", "exec"),
            {"__builtins__": {"True": True, "False": False}, "glob": self._glob, **scope},
        )

    def _files(self, *args, **_kwargs) -> None:
        self.named |= {f for a in args if isinstance(a, list) for f in a}

    def _glob(
        self, patterns: list[str], exclude: tuple | list = (), allow_empty: bool = False, exclude_directories: int = 1
    ):
        found = [
            f for f in self.tree if any(_matches(f, p) for p in patterns) and not any(_matches(f, p) for p in exclude)
        ]
        assert found or allow_empty, f"BUILD: glob({patterns}) matches nothing"
        return found

    def _rule(self, name: str, srcs: list[str], **kwargs) -> None:
        assert name not in self.targets, f"BUILD: two targets named {name}"
        self.targets[name] = [*srcs, *kwargs.get("data", [])]
        self.labels |= {
            label for label in [*kwargs.get("deps", []), *kwargs.get("data", []), *srcs] if label[:1] in ":@/"
        }
        self.named |= {f for f in [*srcs, *kwargs.get("data", []), kwargs.get("main", srcs[0])] if f[:1] not in ":@/"}


def test_every_source_file_belongs_to_a_bazel_target():
    build = Build((ROOT / "BUILD").read_text(), files())
    covered = {f for srcs in build.targets.values() for f in srcs}
    assert sorted(set(sources()) - covered) == []


def test_every_name_in_build_exists():
    build = Build((ROOT / "BUILD").read_text(), files())
    assert sorted(f for f in build.named if not (ROOT / f).exists()) == []
    assert sorted(label for label in build.labels if label[0] == ":" and label[1:] not in build.targets) == []
    repositories = {label.split("//")[0].lstrip("@") for label in build.labels if label[0] == "@"}
    module = (ROOT / "MODULE.bazel").read_text()
    assert all(f'"{name}"' in module for name in repositories)
    assert all((ROOT / path).is_file() for path in re.findall(r'"//:([^"]+)"', module))


def test_a_file_without_a_target_is_noticed():
    build = Build((ROOT / "BUILD").read_text(), files())
    assert "newfolder/thing.py" not in {f for srcs in build.targets.values() for f in srcs}
    with pytest.raises(AssertionError, match="matches nothing"):
        Build('filegroup(name = "x", srcs = glob(["nowhere/*.py"]))', files())


def test_module_and_package_have_one_version():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "jaxnorm/_version.py").read_text()).group(1)
    assert re.search(r'name = "jaxnorm", version = "(.*?)"', (ROOT / "MODULE.bazel").read_text()).group(1) == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


# Imports

# A module imports only from lines above its own. What a function imports when it runs is not bound by this.
LAYERS = (
    "errors _version _paths _compat kernels _tune _compile.code_object",
    "_types _context",
    "_compile _stage _native",
    "_cache",
    "_ref",
    "_tune.plans",
    "_launch _sharding",
    "_dispatch",
    "_op _explain _export",
    "_api",
    "_modules",
    "nnx linen",
    "_swap",
    "__init__",
    "distributed._api distributed.processes",
    "distributed",
    "aiter._common aiter._distributed aiter._groupnorm aiter._layernorm aiter._qk aiter._rmsnorm",
    "aiter",
    "_bench",
    "_tune.search",
    "doctor",
    "_aot",
    "_cli",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".").removeprefix("jaxnorm.")


def _rank(module: str) -> int:
    module = "__init__" if module in ("jaxnorm", "") else module
    known = [name for name in RANK if module == name or module.startswith(name + ".")]
    assert known, f"{module} has no place in the import order: add it to LAYERS of tests/test_repository.py"
    return RANK[max(known, key=len)]


def _imports(path: str, tree: ast.AST) -> list[str]:
    """Absolute names of the modules imported by the nodes of ``tree``; ``.`` stands for jaxnorm."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            members = [f"{module}.{a.name}" for a in node.names if node.level]
            found += [m for m in members if (ROOT / (m.replace(".", "/") + ".py")).is_file()] or [module]
    return found


def _at_import(path: str) -> ast.Module:
    """The module without function bodies and without what only a type checker reads."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def test_imports_go_one_way():
    wrong = []
    for path in (f for f in sources() if f.startswith("jaxnorm/")):
        mine = _module(path)
        for name in _imports(path, _at_import(path)):
            if name.partition(".")[0] != "jaxnorm":
                continue
            other = name.removeprefix("jaxnorm").removeprefix(".")
            same = mine.rpartition(".")[0] and other.startswith(mine.partition(".")[0])
            if not same and _rank(other) >= _rank(mine):
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def _foreign(pattern: str) -> dict[str, set[str]]:
    """Top-level packages outside the standard library that the files import, wherever they do it."""
    return {
        path: {name.partition(".")[0] for name in _imports(path, ast.parse((ROOT / path).read_text()))}
        - sys.stdlib_module_names
        for path in sources()
        if fnmatch.fnmatch(path, pattern)
    }


def test_each_folder_imports_what_it_may():
    allowed = {
        "kernels/*.py": {"triton", "kernels"},
        "kernels/configs/*.py": {"kernels"},
        "jaxnorm/_ref/*.py": {"jax", "numpy", "ml_dtypes", "jaxnorm"},
        "jaxnorm/doctor.py": {"jax", "numpy", "jaxnorm"},  # inside the guarded probes
        "jaxnorm/cli.py": {"jaxnorm"},
    }
    for pattern, may in allowed.items():
        found = _foreign(pattern)
        assert found, pattern
        assert {path: names - may for path, names in found.items() if names - may} == {}
    doctor = _at_import("jaxnorm/doctor.py")
    assert {n.partition(".")[0] for n in _imports("jaxnorm/doctor.py", doctor)} <= sys.stdlib_module_names


IMPORT = """
import os, sys, time
import jax
before, modules, start = dict(os.environ), set(sys.modules), time.process_time()
import jaxnorm
spent = time.process_time() - start
new = {m.partition(".")[0] for m in set(sys.modules) - modules}
assert not new & {"triton", "flax", "jax_triton", "torch"}, new
assert dict(os.environ) == before, "import changed os.environ"
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
assert "_launcher" not in maps, "import loaded the launcher"
assert not jax._src.xla_bridge._backends, "import initialised the devices"
print(spent)
"""


def test_import_is_light():
    seconds = []
    for _ in range(5):
        done = run(sys.executable, "-c", IMPORT)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert sorted(seconds)[2] < 0.050, f"import jaxnorm takes {seconds} s of CPU time beyond import jax"


def test_no_write_to_the_environment_at_import():
    pattern = re.compile(
        r"os\.environ\[[^]]+\]\s*=[^=]|os\.environ\.(update|setdefault|pop|clear)\(|os\.(putenv|unsetenv)\("
    )
    package = [f for f in sources() if f.startswith(("jaxnorm/", "kernels/"))]
    assert [f for f in package if pattern.search(ast.unparse(_at_import(f)))] == []


# Text


def test_no_path_of_a_machine():
    homes = [f"/{name}/" for name in ("home", "root", "work", "Users")] + [str(ROOT), ".." + "/shared"]
    found = []
    for path in files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:4096]:
            found += [f"{path}: {h}" for h in homes if h in data.decode(errors="replace")]
    assert found == []


def test_files_are_short():
    lengths = {f: len((ROOT / f).read_text().splitlines()) for f in sources()}
    assert {f: n for f, n in lengths.items() if n > 500} == {}


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]


def test_every_package_is_typed_and_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(Path(f).parent) for f in sources() if f.startswith(("jaxnorm/", "kernels/")) and f.endswith(".py")}
    installed = {f.replace("/", ".") for f in folders if not f.startswith(("kernels", "jaxnorm/kernels"))}
    installed |= {f"jaxnorm.{f.replace('/', '.')}" for f in folders if f.startswith("kernels")}
    assert installed <= set(config["packages"])
    assert (ROOT / "jaxnorm/py.typed").is_file()


# Linters


def _tool(name: str, *arguments: str) -> None:
    """Runs a tool of this environment; the tree is clean when it exits with 0."""
    path = Path(sys.executable).with_name(name)
    need(name.replace("-", "_"), path.exists(), "pip install -r tests/requirements.txt")
    done = run(str(path), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    _tool("ruff", "check", ".")


def test_ruff_format():
    _tool("ruff", "format", "--check", ".")


def test_pyright():
    _tool("pyright", "--pythonpath", sys.executable)


def test_clang_format():
    code = [f for f in sources() if not f.endswith(".py")]
    _tool("clang-format", "--dry-run", "--Werror", *code)
