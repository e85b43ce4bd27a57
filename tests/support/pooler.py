"""The real PgBouncer in front of a Postgres, pooling transactions, with the least that Postgres needs of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from worker.demo.servers import FOLDER_ROOT
from worker.process import on_launcher_death

# Debian puts it where only root's PATH leads.
_PATHS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def pgbouncer_binary() -> str:
    """The program; skips the test where this machine has none."""
    found = shutil.which("pgbouncer", path=_PATHS)
    if found is None:
        pytest.skip("no pgbouncer here; on Debian: apt-get install pgbouncer")
    return found


class PgBouncer:
    """A pooler that can be killed and started anew at its port."""

    def __init__(self, binary: str, folder: Path, server: str, port: int, logins: Sequence[str], options: str) -> None:
        self._binary, self._folder, self.port = binary, folder, port
        self._process: subprocess.Popen[bytes] | None = None
        users = "".join(f'"{login}" ""\n' for login in logins)
        (folder / "users.txt").write_text(users, encoding="utf-8")
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\npool_mode = transaction\n"
            "default_pool_size = 4\n"
            f"logfile = {folder}/log\nauth_file = {folder}/users.txt\nserver_login_retry = 1\n{options}\n",
            encoding="utf-8",
        )
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)

    def start(self) -> None:
        """Start it and wait until it listens. It refuses to run as root, and becomes nobody there."""
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [self._binary, "-q", *user, str(self._folder / "pgbouncer.ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=on_launcher_death(signal.SIGKILL),
        )
        wait_until(self._listens, "pgbouncer listens", 10)

    def kill(self) -> None:
        """SIGKILL, as a machine that dies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def url(self, login: str, database: str = "meterfall") -> str:
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def pgbouncer(server: str, logins: Sequence[str], options: str = "") -> Iterator[PgBouncer]:
    """A running PgBouncer in front of a Postgres, `server` as it writes it: a host, ` port=` and a port."""
    binary = pgbouncer_binary()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory(dir=FOLDER_ROOT) as folder:
        pooler = PgBouncer(binary, Path(folder), server, port, logins, options)
        try:
            pooler.start()
            yield pooler
        finally:
            pooler.kill()
