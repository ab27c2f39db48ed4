"""What README.md and docs/ say is what the code does: signatures, code blocks, output, tables, commands, links."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from needs import need

import jaxnorm
from jaxnorm import _stage, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, info: str) -> list[str]:
    return [body for kind, body in FENCE.findall((ROOT / page).read_text()) if kind.strip() == info]


def documented() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    (block,) = blocks("docs/contract.md", 'python title="signatures"')
    return {node.name: node for node in ast.parse(block).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _parameters(node: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """(name, kind, default) of a parsed signature."""
    code = compile(ast.Module([node], []), "contract", "exec")
    scope: dict = {"jnp": jax.numpy}
    exec(code, scope)
    return _of(inspect.signature(scope[node.name]))


def _of(signature: inspect.Signature) -> list[tuple[str, str, object]]:
    return [(p.name, p.kind.name, p.default) for p in signature.parameters.values()]


def test_every_public_name_is_in_the_contract():
    assert set(documented()) == set(jaxnorm.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(jaxnorm.__all__) - {"__version__"}))
def test_signature(name):
    node, value = documented()[name], getattr(jaxnorm, name)
    if isinstance(node, ast.FunctionDef):
        assert _of(inspect.signature(value)) == _parameters(node)
    elif dataclasses.is_dataclass(value):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        documented_fields = [
            (f.target.id, ast.literal_eval(f.value) if f.value else dataclasses.MISSING) for f in fields
        ]
        assert [(f.name, f.default) for f in dataclasses.fields(value)] == documented_fields
        for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
            assert _of(inspect.signature(getattr(value, method.name))) == _parameters(method)
    else:
        assert [base.__name__ for base in value.__bases__] == [ast.unparse(b) for b in node.bases]


@pytest.mark.parametrize("name", sorted(jaxnorm.__all__))
def test_docstring(name):
    value = getattr(jaxnorm, name)
    assert name == "__version__" or inspect.getdoc(value)
    if inspect.isfunction(value):
        words = inspect.getdoc(value)
        assert [
            p for p in inspect.signature(value).parameters if p in ("x", "residual", "weight") and p not in words
        ] == []


def test_a_changed_default_is_noticed():
    def rmsnorm(
        x, weight, *, eps=1e-5, weight_offset=0.0, cast="output", out_dtype=None, pad_to_multiple=None, backend=None
    ):
        return x

    assert _of(inspect.signature(rmsnorm)) != _parameters(documented()["rmsnorm"])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_python_blocks_run_and_print_what_they_say(page):
    scope: dict = {"__name__": "__main__"}
    out = io.StringIO()
    source = "\n".join(blocks(page, "python"))
    with contextlib.redirect_stdout(out):
        exec(compile(source, page, "exec"), scope)
    assert jax.device_count() > 1  # else a sharded example shows nothing
    assert out.getvalue().splitlines() == re.findall(r"print\(.*# -> (.*)$", source, re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every call of our command line in a shell block, without what it is piped into."""
    found = []
    for page in PAGES:
        for body in blocks(page, "bash"):
            for line in body.splitlines():
                words = shlex.split(line, comments=True)
                words = words[: words.index("|")] if "|" in words else words
                if words[:3] == ["python", "-m", "jaxnorm"]:
                    found.append((page, words[3:]))
                elif words[:1] == ["jaxnorm"]:
                    found.append((page, words[1:]))
    return found


def test_shell_blocks_call_commands_with_options_that_exist(capsys):
    """A command of a page may need a GPU, so its words are held against the help instead."""
    need("cli", all(importlib.util.find_spec(p) for p in ("typer", "rich")), "pip install 'jaxnorm[cli]'")
    helps: dict[tuple[str, ...], str] = {}
    for page, words in commands():
        assert words[0] in cli.COMMANDS, (page, words)
        own = words[: words.index("--")] if "--" in words else words
        group = (words[0], *[w for w in own[1:2] if words[0] == "cache"])
        if group not in helps:
            with contextlib.suppress(SystemExit):
                cli.main([*group, "--help"])
            helps[group] = capsys.readouterr().out
        for option in (w.partition("=")[0] for w in own if w.startswith("--")):
            assert re.search(rf"{option}\b", helps[group]), (page, words, option)
    assert {group[0] for group in helps} >= {"bench", "tune", "explain", "cache", "doctor"}


def test_the_web_site_has_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^:\n]+: ([\w/.-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(listed) == sorted(pages)


def test_the_reference_has_every_public_name():
    text = "".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {name.rpartition(".")[2] for name in shown} >= set(jaxnorm.__all__) - {"__version__"}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name


def test_doctor_prints_what_the_readme_shows():
    (shown,) = (b for b in blocks("README.md", "text") if "backends" in b)
    done = subprocess.run(
        [sys.executable, "-m", "jaxnorm", "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(shown)


def test_readme_table_is_the_registry():
    done = subprocess.run([sys.executable, "tools/make_readme_table.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python tools/make_readme_table.py"


def test_the_registry_holds_the_public_operators():
    takes_backend = {n for n in jaxnorm.__all__ if "backend" in _names(getattr(jaxnorm, n))}
    assert {name: op.function for name, op in _stage.OPS.items()} == {n: getattr(jaxnorm, n) for n in takes_backend}


def _names(value: object) -> list[str]:
    return list(inspect.signature(value).parameters) if inspect.isfunction(value) else []


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, page
        assert {e for group in re.findall(r"'\.\[([a-z,-]+)\]'", text) for e in group.split(",")} <= set(extras), page


def test_environment_variables_are_documented():
    code = "".join(p.read_text() for p in (ROOT / "jaxnorm").rglob("*.py"))
    used = set(re.findall(r"\bJAXNORM_[A-Z_]+\b", code))
    listed = set(re.findall(r"^\| `(JAXNORM_[A-Z_]+)`", (ROOT / "docs/contract.md").read_text(), re.MULTILINE))
    assert used == listed


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", (ROOT / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in {_anchor(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, link


def test_readme_is_short_and_says_what_it_must():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for needed in ("not run on AMD silicon", "make demo", "make test", "Gemma Terms of Use", "docs/numerics.md"):
        assert needed in text
