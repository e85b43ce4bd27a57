"""Build the wheel `meterfall-client` from the sources of this project: `make client`.

The wheel holds the modules that the client imports, below the package `meterfall`. So a host application may have
packages `config`, `schemas` and `worker` of its own:

    worker.client.billing  →  meterfall.client.billing
    config.settings        →  meterfall.config.settings
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OURS = ("config", "schemas", "worker")
# Becomes `meterfall/__init__.py`; the public names, and by their imports all modules of the wheel but the next.
PUBLIC = HERE / "public.py"
# Public by themselves. No module imports them, because each needs packages that a service does without.
ROOMS = ("worker/contrib", "worker/testing")
# Alembic reads these from their folder.
MIGRATIONS = "worker/ledger/migrations"
WORKER = Path("worker/__init__.py")
DATA = ("config/catalogue.toml", "worker/keyspace/lua/*.lua", "worker/testing/*.lua")


def main() -> int:
    """Build the wheel into the folder that the command line names. A repeat replaces it.

    With `--sources` before the folder, the folder becomes the sources of the wheel, for type checkers.
    """
    *options, folder = sys.argv[1:]
    if options == ["--sources"]:
        shutil.rmtree(folder, ignore_errors=True)
        lay_out(Path(folder))
        return 0
    with tempfile.TemporaryDirectory() as stage:
        lay_out(Path(stage))
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(Path(folder).resolve()), "."]
        return subprocess.run(command, cwd=stage, check=False).returncode


def lay_out(stage: Path) -> None:
    """Write the sources of the wheel into the empty folder `stage`."""
    for source in sorted(modules()):
        target = stage / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")
    for source in (path for pattern in DATA for path in sorted(ROOT.glob(pattern))):
        target = stage / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (stage / "meterfall" / "py.typed").touch()
    (stage / "VERSION").write_text(project_version(), encoding="utf-8")
    shutil.copy(HERE / "pyproject.toml", stage)


def modules() -> set[Path]:
    """Return `PUBLIC`, `ROOMS`, `MIGRATIONS` and all files that they import, at once or later, or for types."""
    found: set[Path] = set()
    left = [
        PUBLIC,
        *(ROOT / MIGRATIONS).rglob("*.py"),
        *(path for room in ROOMS for path in (ROOT / room).glob("*.py")),
    ]
    while left:
        source = left.pop()
        if source not in found:
            found.add(source)
            left.extend(imported(source))
    return found


def imported(source: Path) -> Iterator[Path]:
    """Yield the files of this project that one file imports, and those of the packages around them."""
    for statement in our_imports(source.read_text(encoding="utf-8")):
        module = Path(*str(statement.module).split("."))
        for path in (module, *(module / alias.name for alias in statement.names)):
            files = [path.with_suffix(".py"), *(folder / "__init__.py" for folder in (path, *path.parents))]
            # `worker/__init__.py` is the map of the rooms; in the wheel `PUBLIC` stands for it.
            yield from (ROOT / file for file in files if file != WORKER and (ROOT / file).is_file())


def our_imports(text: str) -> Iterator[ast.ImportFrom]:
    """Yield the statements that import from this project.

    Raises:
        SystemExit: one of them is `import config.settings` or the like, which binds a name that moves.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in OURS for alias in node.names):
            raise SystemExit(f"{ast.unparse(node)}: the client imports from its own packages by `from … import …` only")
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
            yield node


def renamed(text: str) -> str:
    """Return a module's text with its imports from this project turned to `meterfall`. Line numbers stay."""
    lines = text.splitlines(keepends=True)
    for statement in our_imports(text):
        module = str(statement.module)
        line = lines[statement.lineno - 1]
        lines[statement.lineno - 1] = line.replace(f"from {module} ", f"from {below_meterfall(module)} ", 1)
    return "".join(lines)


def below_meterfall(module: str) -> str:
    """Return a module's name in the wheel: the room `worker` is `meterfall` itself."""
    return "meterfall" + module.removeprefix("worker") if module.startswith("worker") else f"meterfall.{module}"


def place(source: Path) -> Path:
    """Return where a file of this project lies in the wheel."""
    if source == PUBLIC:
        return Path("meterfall/__init__.py")
    inside = source.relative_to(ROOT)
    return Path("meterfall", *inside.parts[inside.parts[0] == "worker" :])


def project_version() -> str:
    """Return the version of this project, which is the wheel's also."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(about["project"]["version"])


if __name__ == "__main__":
    sys.exit(main())
