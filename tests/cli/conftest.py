"""The command on the servers of a test, and without any."""

from __future__ import annotations

import subprocess

import pytest

from config.settings import Settings
from tests.support.commands import Meterfall


@pytest.fixture
def bare(command_server: subprocess.Popen[str]) -> Meterfall:
    """The command, with nothing in its environment."""
    return Meterfall(command_server)


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], settings: Settings) -> Meterfall:
    return Meterfall(command_server, settings)
