"""The wheel `meterfall-client` works in a host application with packages of our names, and brings nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from config.settings import Settings
from distributions.client import build
from tests.client.speech_service import UNITS
from tests.support.host import files_of_the_guide, run_suite
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.streams import drain
from tests.support.web import web_service
from worker.client import Billing

pytestmark = [pytest.mark.wheel, pytest.mark.once, pytest.mark.timeout(600)]

# What a host application may have of its own, in the folder into which pip installs.
HOST_PACKAGES = ("benchmarks", "config", "schemas", "worker")
HOST_CODE = 'raise ImportError("the client imported a package of the host")\n'
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
# As on Windows: only a spool needs `fcntl`.
WITHOUT_FCNTL = "import sys; sys.modules['fcntl'] = None\n"
# Pythons that this machine has besides the one that runs the tests.
OTHER_PYTHONS = (*Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3"),)
# The lowest release of each range that the wheel states.
ABOUT = tomllib.loads((build.HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOWEST_PYTHON = tuple(map(int, ABOUT["requires-python"].removeprefix(">=").split(".")))
PYTHON_COMMANDS = [f"python3.{minor}" for minor in range(LOWEST_PYTHON[1], 20)]
LOWEST = [needed.replace(">=", "==") for needed in ABOUT["dependencies"]]
EXTRAS = {
    extra: [*LOWEST, *(each.replace(">=", "==") for each in needed)]
    for extra, needed in ABOUT["optional-dependencies"].items()
}


@dataclass(frozen=True)
class Host:
    """An application in an environment of its own, with the wheel installed."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, cwd=self.folder, check=True)

    def run(self, code: str, settings: Settings) -> subprocess.CompletedProcess[str]:
        """Run code as the host does: in its folder, with the two URLs as the only settings."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("METERFALL_", "PYTHON"))}
        environ |= {"REDIS_URL": settings.redis_url, "DATABASE_URL": str(settings.database_url)}
        command = [self.python, "-W", "error", "-c", code]
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False)

    @property
    def packages(self) -> dict[str, str]:
        """The host's own packages, and their code."""
        (site,) = self.folder.glob("lib/python3*/site-packages")
        files = [site / name / "__init__.py" for name in HOST_PACKAGES]
        return {str(file): file.read_text(encoding="utf-8") for file in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `make client` builds it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, build.__file__, folder], check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def pythons() -> list[str]:
    """The Pythons of this machine that the wheel supports, oldest first."""
    candidates = [sys.executable, *map(str, OTHER_PYTHONS), *filter(None, map(shutil.which, PYTHON_COMMANDS))]
    versions: dict[tuple[int, ...], str] = {}
    for candidate in candidates:
        command = [candidate, "-c", "import sys; print(*sys.version_info[:2])"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode == 0:  # pyenv has commands that only tell what to do
            versions[tuple(map(int, asked.stdout.split()))] = candidate
    return [versions[version] for version in sorted(versions) if version >= LOWEST_PYTHON]


@pytest.fixture(scope="module", params=[[], LOWEST], ids=["newest", "lowest"])
def host(
    request: pytest.FixtureRequest, wheel: Path, pythons: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    """A host that installed the wheel without its extra: all at its newest, or all at its lowest."""
    python = pythons[0] if request.param else pythons[-1]
    return make_host(tmp_path_factory.mktemp("host"), str(wheel), request.param, python)


@pytest.fixture(scope="module", params=[[], EXTRAS["ledger"]], ids=["newest", "lowest"])
def ledger_host(
    request: pytest.FixtureRequest, wheel: Path, pythons: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    """A host that installed the wheel with the extra `ledger`: all at its newest, or all at its lowest."""
    python = pythons[0] if request.param else pythons[-1]
    return make_host(tmp_path_factory.mktemp("ledger-host"), f"{wheel}[ledger]", request.param, python)


@pytest.fixture(scope="module", params=[[], EXTRAS["fastapi"]], ids=["newest", "lowest"])
def fastapi_host(
    request: pytest.FixtureRequest, wheel: Path, pythons: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    """A host that installed the wheel with the extra `fastapi`: all at its newest, or all at its lowest."""
    python = pythons[0] if request.param else pythons[-1]
    made = make_host(tmp_path_factory.mktemp("fastapi-host"), f"{wheel}[fastapi]", request.param, python)
    made.pip("install", "uvicorn")
    return made


@pytest.fixture(scope="module", params=[[], EXTRAS["testing"]], ids=["newest", "lowest"])
def testing_host(
    request: pytest.FixtureRequest, wheel: Path, pythons: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    """A host that installed the wheel with the extra `testing`: all at its newest, or all at its lowest."""
    python = pythons[0] if request.param else pythons[-1]
    return make_host(tmp_path_factory.mktemp("testing-host"), f"{wheel}[testing]", request.param, python)


@pytest.fixture(scope="module", params=[[], EXTRAS["testing-servers"]], ids=["newest", "lowest"])
def servers_host(
    request: pytest.FixtureRequest, wheel: Path, pythons: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Host:
    """A host that installed the wheel with the extra `testing-servers`: all at its newest, or all at its lowest."""
    python = pythons[0] if request.param else pythons[-1]
    return make_host(tmp_path_factory.mktemp("servers-host"), f"{wheel}[testing-servers]", request.param, python)


def make_host(folder: Path, wheel: str, releases: list[str], python: str = sys.executable) -> Host:
    """An environment with the host's packages, then the wheel and the given releases of what it needs."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in HOST_PACKAGES:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(HOST_CODE, encoding="utf-8")
    made = Host(folder)
    made.pip("install", wheel, *releases)
    return made


def example(code: str = EXAMPLE) -> str:
    """The example of the README, as a whole program."""
    return f"synthesize, text = str.upper, 'x' * 1_800\n{code}billing.close()\n"


def cache_balance(settings: Settings, user_id: str) -> None:
    """Have the application of this tree bring a user's balance into Redis."""
    with Billing.connect(settings) as billing:
        billing.remaining(user_id, "premium_voice")


def test_the_example_of_the_readme_runs_without_the_extra(host: Host, settings: Settings) -> None:
    give_account(settings, "user-42", "basic")
    cache_balance(settings, "user-42")
    done = host.run(WITHOUT_FCNTL + example(), settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    drain(settings, "user-42")
    query = "SELECT event_id, amount, from_subscription FROM usage_log"
    assert rows(settings, query) == [("job-7f3", 1_800, 1_800)]
    refused = host.run(example(EXAMPLE.replace("1_840", "98_201").replace("job-7f3", "job-7f4")), settings)
    assert (refused.stdout, refused.stderr) == ("limit_exceeded: 98200 of 100000 characters left\n", "")


def test_a_balance_that_is_not_cached_needs_the_extra(host: Host, settings: Settings) -> None:
    give_account(settings, "user-42", "basic")
    done = host.run(example(), settings)
    assert done.returncode == 1
    assert "meterfall.errors.LedgerUnavailable: " in done.stderr
    assert done.stderr.endswith(": pip install 'meterfall-client[ledger]'\n")


def test_with_the_extra_the_ledger_answers(ledger_host: Host, settings: Settings) -> None:
    give_account(settings, "user-42", "basic")
    done = ledger_host.run(example(), settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    drain(settings, "user-42")
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("job-7f3", 1_800)]


ACCOUNTS = """
import asyncio
from meterfall import AccountError, Accounts, AsyncAccounts

with Accounts.connect() as accounts:
    accounts.open("user-42", "basic", actor="shop", reason="checkout cs-1")
    accounts.grant("user-42", "premium_voice", 5_000, "order-9", actor="shop")
    print(accounts.show("user-42").balances["premium_voice"].purchased)
    print(accounts.timeline("user-42").changes[0].actor)
    try:
        accounts.grant("user-42", "premium_voice", 5_001, "order-9")
    except AccountError as error:
        print(error)

async def main():
    async with AsyncAccounts.connect() as accounts:
        print((await accounts.grant("user-42", "premium_voice", 5_000, "order-9")).repeated)

asyncio.run(main())
"""


def test_with_the_extra_a_host_changes_accounts(ledger_host: Host, settings: Settings) -> None:
    done = ledger_host.run(ACCOUNTS, settings)
    said = ["5000", "shop", "key: order-9 was used for 5000 of premium_voice", "True"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, said, "")


def test_without_the_extra_accounts_say_what_to_install(host: Host, settings: Settings) -> None:
    done = host.run(ACCOUNTS, settings)
    assert done.returncode == 1
    assert "ImportError: Accounts needs Postgres, and a package for that is missing" in done.stderr
    assert done.stderr.endswith(": pip install 'meterfall-client[ledger]'\n")
    light = "import sys, meterfall; print({'sqlalchemy', 'psycopg', 'meterfall.admin'} & set(sys.modules))"
    assert host.run(light, settings).stdout == "set()\n"


def test_asyncio_services_use_it_likewise(host: Host, settings: Settings) -> None:
    give_account(settings, "user-42", "basic")
    cache_balance(settings, "user-42")
    code = """
import asyncio
from meterfall import AsyncBilling

async def main():
    async with AsyncBilling.connect() as billing, billing.reserve("user-42", "premium_voice", 5, key="job-1") as hold:
        await hold.settle(3)

asyncio.run(main())
"""
    done = host.run(code, settings)
    assert (done.returncode, done.stderr) == (0, "")
    drain(settings, "user-42")
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("job-1", 3)]


def test_fastapi_services_use_it_likewise(fastapi_host: Host, settings: Settings, tmp_path: Path) -> None:
    give_account(settings, "user-42", "basic")
    cache_balance(settings, "user-42")
    service = (ROOT / "tests/client/speech_service.py").read_text(encoding="utf-8")
    (fastapi_host.folder / "speech_service.py").write_text(build.renamed(service), encoding="utf-8")
    with web_service(
        "speech_service:app", settings, tmp_path, python=fastapi_host.python, code=fastapi_host.folder
    ) as running:
        assert len(running.ask("GET", "/billed/user-42/speech-1").body) == UNITS
        listener = running.call("GET", "/billed/user-42/speech-2")
        listener.getresponse().read(1)
        listener.hang_up()
        assert running.ask("GET", "/lines/user-42/lines-1").status == 200
        assert running.ask("GET", "/lost/user-42/lost-1").status == 500
        assert running.ask("POST", "/pages/user-42/page-1", {"text": "five "}).status == 200
        assert running.ask("POST", "/pages/user-42/page-2", {"text": "five ", "fail": True}).status == 418
        assert running.ask("POST", "/pages/user-42/page-1", {"text": "five "}).problem["title"] == "Hold closed"
        refused = running.ask("GET", "/billed/user-43/speech-3")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1"), "it needs the extra `ledger`"
    drain(settings, "user-42")
    whole = rows(settings, "SELECT amount, event_id FROM usage_log WHERE event_id <> 'speech-2' ORDER BY 1, 2")
    assert whole == [(4, "page-1"), (4, "page-2"), (30, "lines-1"), (UNITS, "speech-1")]
    ((amount,),) = rows(settings, "SELECT amount FROM usage_log WHERE event_id = 'speech-2'")
    assert isinstance(amount, int)
    assert 0 < amount < UNITS
    with Billing.connect(settings) as billing:
        assert billing.remaining("user-42", "premium_voice").pending == 0, "no hold is open"


def test_without_the_extra_fastapi_stays_away(host: Host, settings: Settings) -> None:
    light = "import sys, meterfall; print({'fastapi', 'starlette', 'meterfall.contrib'} & set(sys.modules))"
    assert host.run(light, settings).stdout == "set()\n"


def test_a_spool_works(host: Host, settings: Settings, tmp_path: Path) -> None:
    code = f"""
import os
os.environ |= {{"METERFALL_SPOOL_PATH": {str(tmp_path)!r}, "REDIS_URL": "unix:///nowhere/redis.sock"}}
from meterfall import Billing
with Billing.connect() as billing:
    print(billing.emit("user-42", "premium_voice", 3, event_id="job-1").spooled)
"""
    done = host.run(code, settings)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


EVERY_MODULE = """
import importlib, pkgutil, sys
import meterfall
assert all(hasattr(meterfall, name) for name in meterfall.__all__)
for module in pkgutil.walk_packages(meterfall.__path__, "meterfall."):
    if not module.name.startswith(("meterfall.contrib.fastapi", "meterfall.ledger.migrations.", *WITHOUT)):
        importlib.import_module(module.name)
"""


def test_every_public_name_and_every_module_can_be_imported(ledger_host: Host, settings: Settings) -> None:
    # What only tests of hosts need.
    code = EVERY_MODULE.replace("*WITHOUT", "'meterfall.consumer.', 'meterfall.testing'")
    done = ledger_host.run(code, settings)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_host_tests_without_servers(testing_host: Host) -> None:
    files = files_of_the_guide()
    del files["test_servers.py"]
    assert "5 passed" in (said := run_suite(testing_host.folder, files, testing_host.python)), said


def test_a_host_tests_with_servers_of_its_own(servers_host: Host) -> None:
    files = files_of_the_guide()
    chosen = {name: files[name] for name in ("conftest.py", "test_servers.py")}
    assert "1 passed" in (said := run_suite(servers_host.folder, chosen, servers_host.python)), said


def test_with_all_that_tests_need_every_module_can_be_imported(servers_host: Host, settings: Settings) -> None:
    done = servers_host.run(EVERY_MODULE.replace("*WITHOUT", ""), settings)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_client_does_not_import_what_tests_need(servers_host: Host, settings: Settings) -> None:
    unwanted = {"fakeredis", "loguru", "msgspec", "pytest", "meterfall.testing"}
    light = f"import sys, meterfall; print({unwanted} & set(sys.modules))"
    assert servers_host.run(light, settings).stdout == "set()\n"


def test_without_the_extra_testing_says_what_to_install(host: Host, settings: Settings) -> None:
    done = host.run("import meterfall.testing", settings)
    assert done.returncode == 1
    assert done.stderr.endswith(": pip install 'meterfall-client[testing]'\n")


def test_pip_takes_away_what_it_brought_and_no_more(wheel: Path, tmp_path: Path) -> None:
    host = make_host(tmp_path, str(wheel), ["--no-deps"])
    before = host.packages
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    assert (site / "meterfall").is_dir()
    host.pip("uninstall", "--yes", "meterfall-client")
    assert host.packages == before == dict.fromkeys(before, HOST_CODE)
    assert not list(site.glob("meterfall*"))
