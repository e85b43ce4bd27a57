"""Who may import and write what, and what the distribution holds."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages

from tests.support.paths import ROOT

OURS = ("benchmarks", "config", "schemas", "worker")


def sources(*packages: str) -> list[Path]:
    """The Python files of our packages."""
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names that the import statements in `tree` name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not our style"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_at_once(path: Path) -> set[str]:
    """What importing this file imports: not what its functions import later, nor what only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"})
        and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return imports_of(ast.Module(kept, []))


def packages_behind(module: str) -> set[str]:
    """Top-level packages that importing one of our modules brings in, through our own modules too."""
    by_name = {module_of(path): path for path in sources(*OURS)}
    waiting, seen, packages = [module], set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for imported in imported_at_once(by_name[name]):
            packages.add(imported.partition(".")[0])
            if imported in by_name:
                waiting.append(imported)
    return packages


def texts_in(path: Path) -> Iterator[str]:
    """The string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in docstrings:
            yield node.value if isinstance(node.value, str) else node.value.decode("latin-1")


def test_config_and_schemas_import_nothing_of_the_worker() -> None:
    for path in sources("config", "schemas"):
        imported = {name.partition(".")[0] for name in imports_of(ast.parse(path.read_text(encoding="utf-8")))}
        assert imported.isdisjoint({"worker", "benchmarks", "tests"}), path
        if path.is_relative_to(ROOT / "schemas"):
            assert "config" not in imported, path


def test_what_is_installed_imports_no_tests_and_the_benchmarks_for_their_command_alone() -> None:
    installed = sources("config", "schemas", "worker")
    found = {
        (path.relative_to(ROOT).parent.as_posix(), name.partition(".")[0])
        for path in installed
        for name in imports_of(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert {one for one in found if one[1] in {"tests", "benchmarks"}} == {("worker/cli", "benchmarks")}


def test_the_pure_rules_import_nothing_that_does_io() -> None:
    doing_io = {
        "asyncio", "http", "io", "logging", "os", "pathlib", "random", "secrets", "shutil", "socket", "sqlite3",
        "subprocess", "tempfile", "threading", "time", "urllib",
    }  # fmt: skip
    for name in ("worker.rules.waterfall", "worker.rules.periods"):
        path = ROOT / (name.replace(".", "/") + ".py")
        named = {imported.partition(".")[0] for imported in imports_of(ast.parse(path.read_text(encoding="utf-8")))}
        assert named <= (sys.stdlib_module_names - doing_io) | {"config", "schemas", "worker"}, path
        strange = packages_behind(name) - sys.stdlib_module_names - set(OURS)
        assert strange <= {"pydantic"}, f"{name} brings in {strange}"


def test_a_producer_needs_only_redis_and_pydantic() -> None:
    strange = packages_behind("worker.client") - sys.stdlib_module_names - set(OURS)
    assert strange == {"redis", "pydantic"}


SQL = re.compile(
    r"\b(SELECT\s|INSERT\s+INTO\s|UPDATE\s+\w+\s+SET\s|DELETE\s+FROM\s|TRUNCATE\s|COPY\s+\w+\s|SET\s+TRANSACTION"
    r"|(CREATE|ALTER|DROP)\s+(TABLE|DATABASE|INDEX|FUNCTION|TRIGGER|ROLE)\s)"
)


def test_sql_is_written_in_one_place() -> None:
    # demo/servers.py makes the empty database of a server that it starts, before there is a ledger.
    # client/spool_file.py writes a file on the producer's disk, which is no part of the ledger.
    places = ("ledger", "demo/servers.py", "client/spool_file.py")
    allowed = [*(ROOT / "worker" / place for place in places), ROOT / "benchmarks"]
    assert any(SQL.search(text) for text in texts_in(allowed[0] / "batch.py")), "the pattern finds nothing any more"
    found = [
        f"{path.relative_to(ROOT)}: {text.strip()[:60]}"
        for path in sources(*OURS)
        if not any(path.is_relative_to(place) for place in allowed)
        for text in texts_in(path)
        if SQL.search(text)
    ]
    assert found == []


def test_lua_is_written_in_one_place() -> None:
    scripts = sorted((ROOT / "worker").rglob("*.lua"))
    assert any("redis.call(" in script.read_text(encoding="utf-8") for script in scripts)
    assert [path for path in sources(*OURS) for text in texts_in(path) if re.search(r"redis\.p?call\(", text)] == []
    assert list(ROOT.glob("config/**/*.lua")) + list(ROOT.glob("benchmarks/**/*.lua")) == []


def test_names_of_redis_keys_are_made_in_one_place() -> None:
    home = ROOT / "worker/keyspace/keys.py"
    assert any("mf:" in text for text in texts_in(home))
    found = {
        path.relative_to(ROOT) for path in sources(*OURS) if path != home for text in texts_in(path) if "mf:" in text
    }
    for script in (ROOT / "worker").rglob("*.lua"):
        code = re.sub(r"--.*", "", script.read_text(encoding="utf-8"))
        if re.search(r"""["']mf:""", code):
            found.add(script.relative_to(ROOT))
    assert found == set()


def test_every_package_is_found_for_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included: list[str] = project["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent for path in sources("config", "schemas", "worker")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert {ROOT / name.replace(".", "/") for name in find_packages(str(ROOT), include=included)} == folders
