"""What a platform does with the tree: it installs `requirements.txt` and runs the lines of the `Procfile`."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.processes import kill
from tests.support.proxy import Proxy
from tests.support.resources import settings_for
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from worker.demo.servers import FOLDER_ROOT, Server, find_postgres, find_redis, postgres_server, redis_server
from worker.process import on_launcher_death

USER, METER = "user-42", "premium_voice"
# Patience with a slow machine; a dyno that is told to stop has 25 s, after which a platform kills it.
START_SECONDS, STOP_SECONDS = 30, 25

# From the least to the most: each file holds the one before it.
REQUIREMENTS = ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt")
SERVICE = "requirements-serve.txt"


# ---------------------------------------------------------------------------------------------------------------------
# What is pinned


def pins_of(file: str) -> dict[str, str]:
    """Each distribution that a file pins, by name and marker, with its pin as it stands there."""
    text = (ROOT / file).read_text(encoding="utf-8").replace(" \\\n    ", " ")
    return {re.sub(r"==\S+| --hash=\S+", "", line): line for line in text.splitlines()}


@pytest.mark.parametrize("file", [*REQUIREMENTS, SERVICE])
def test_every_line_is_one_release_with_its_hashes_and_names_no_index(file: str) -> None:
    pin = re.compile(r"[a-z0-9-]+==[0-9][a-z0-9.]*( ; [a-z_]+ (<|>=|!=|==) '[\w.]+')?( --hash=sha256:[0-9a-f]{64})+")
    assert [line for line in pins_of(file).values() if not pin.fullmatch(line)] == []


def test_the_demo_and_the_tests_use_the_releases_that_a_dyno_runs() -> None:
    dyno, demo, dev = map(pins_of, REQUIREMENTS)
    assert dyno.items() < demo.items() < dev.items()


def test_the_http_service_runs_on_the_releases_that_the_tests_use() -> None:
    dyno, service, dev = map(pins_of, ("requirements.txt", SERVICE, "requirements-dev.txt"))
    assert dyno.items() < service.items() < dev.items()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras["serve"]) <= {line.split()[0] for line in service.values()}
    assert set(extras["serve"]) <= set(extras["dev"])


def test_a_dyno_needs_no_server_and_no_tool_of_the_demo_and_the_tests() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.sub(r"\[.*\]", "", requirement) for requirement in project["dependencies"]}
    unwanted = {name.partition("==")[0] for extra in project["optional-dependencies"].values() for name in extra}
    pinned = {line.split()[0] for line in pins_of("requirements.txt").values()}
    assert wanted <= pinned
    assert unwanted & {pin.partition("==")[0] for pin in pinned} == set()


# ---------------------------------------------------------------------------------------------------------------------
# What runs


@dataclass(frozen=True)
class Platform:
    """A tree that its processes may not write to, what is installed for it, and the ordinary user that they run as."""

    tree: Path
    environment: Path
    user: pwd.struct_passwd | None

    @contextmanager
    def running(self, line: str, log: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """A line of the Procfile as a process, killed with its children at the end of the block if it still runs."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {line}"],
                cwd=self.tree,
                env={"PATH": f"{self.environment / 'bin'}:{os.defpath}", **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                preexec_fn=on_launcher_death(signal.SIGKILL),
                **identity(self.user),
            )
        try:
            yield process
        finally:
            kill(process)
            print(f"--- {line}: {process.returncode}\n{log.read_text(errors='replace')}")


@pytest.fixture
def platform() -> Iterator[Platform]:
    """A copy of the tree, for which a platform has installed `requirements.txt`, and nothing else."""
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    # Not below the folder that pytest gives: another user could not enter that.
    with tempfile.TemporaryDirectory(dir=FOLDER_ROOT) as folder:
        Path(folder).chmod(0o755)
        made = Platform(Path(folder, "tree"), Path(folder, "environment"), user)
        copy_tree(made.tree)
        run(python_for(user), "-m", "venv", "--without-pip", str(made.environment))
        # Our pip, as to install another one there takes longer than all the rest.
        pip = (sys.executable, "-m", "pip", "--python", str(made.environment / "bin/python"))
        run(*pip, "install", "-r", "requirements.txt", cwd=made.tree)
        make_read_only(made.tree)
        yield made


@pytest.fixture
def postgres() -> Iterator[Server]:
    with postgres_server(find_postgres(os.environ)) as server:
        yield server


@pytest.fixture
def redis_socket() -> Iterator[Path]:
    with redis_server(find_redis(os.environ)) as server:
        yield server.folder / "redis.sock"


@pytest.fixture
def urls(postgres: Server, redis_socket: Path) -> Iterator[dict[str, str]]:
    """Both servers over the network: another user may not enter the folders of their sockets."""
    with Proxy(postgres.folder / ".s.PGSQL.5432") as to_postgres, Proxy(redis_socket) as to_redis:
        yield {
            "DATABASE_URL": f"postgresql://meterfall@127.0.0.1:{to_postgres.port}/meterfall",
            "REDIS_URL": f"redis://127.0.0.1:{to_redis.port}/0",
        }


@pytest.mark.timeout(300)  # what pip takes depends on its index, and is none of our promises
def test_every_line_of_the_procfile_runs_on_requirements_txt(
    platform: Platform, urls: dict[str, str], tmp_path: Path
) -> None:
    lines = dict(line.split(": ", 1) for line in (platform.tree / "Procfile").read_text("utf-8").splitlines())
    assert set(lines) == {"release", "worker"}, "each line is tried below"
    settings = settings_for(urls["DATABASE_URL"], urls["REDIS_URL"])

    with platform.running("touch written", tmp_path / "touch.log") as process:
        assert process.wait(START_SECONDS) != 0, "the tree is read-only"

    with platform.running("python -m worker --version", tmp_path / "version.log") as process:
        assert process.wait(START_SECONDS) == 0
    assert (tmp_path / "version.log").read_text("utf-8").startswith("meterfall 0.")

    with platform.running(lines["release"], tmp_path / "release.log", **urls) as process:
        assert process.wait(START_SECONDS) == 0
    assert rows(settings, "SELECT to_regclass('usage_log') IS NOT NULL") == [(True,)]

    give_account(settings, USER, "basic")
    event = {"event_id": "job-7f3", "user_id": USER, "meter": METER, "quantity": 1_840}
    with Redis.from_url(settings.redis_url) as redis:
        redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event)})
    with platform.running(lines["worker"], tmp_path / "worker.log", **urls) as process:
        recorded = "SELECT user_id, event_id, amount FROM usage_log"
        wait_until(lambda: rows(settings, recorded) == [(USER, "job-7f3", 1_840)], "it is billed", START_SECONDS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints. Others may read the files that it makes. Fails if it does, with what it complains of."""
    done = subprocess.run(command, cwd=cwd, umask=0o022, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stderr}"
    return done.stdout


def copy_tree(tree: Path) -> None:
    """Copy all files but those that git ignores, as a platform is given them."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists():  # else it was deleted, and that is not in the index yet
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def make_read_only(folder: Path) -> None:
    """Let everybody read all below a folder, and nobody write it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(0o555 if path.is_dir() or mode & 0o100 else 0o444)


def python_for(user: pwd.struct_passwd | None) -> str:
    """A Python that the user may run: ours, or where that is below a folder like /root, another one on the PATH."""
    names = (f"python3.{sys.version_info.minor}", "python3")
    others = (str(Path(folder, name)) for name in names for folder in os.get_exec_path())
    for python in (str(Path(sys.executable).resolve()), *others):
        check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            subprocess.run(check, cwd="/", capture_output=True, check=True, **identity(user))
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.fail(f"no Python 3.11 or newer on the PATH that {user.pw_name if user else 'this user'} may run")


def identity(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """What `subprocess` is told to start a process as another user; None: as ourselves."""
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
