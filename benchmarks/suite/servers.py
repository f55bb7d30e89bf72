"""The stub and the children, as the driver sees them: processes that it starts and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from .place import Place

DIRECTORY: Final = Path(__file__).resolve().parent.parent
ANSWER_SECONDS: Final = 60


class ChildError(Exception):
    """A child failed; the message is what it said."""


class AbsentError(Exception):
    """A contender cannot run here; the message says why."""


def _environment() -> dict[str, str]:
    """Return the environment of a child: no proxy, no profile, no other signer."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("AWS_", "BOTO"))}
    paths = [str(DIRECTORY), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **{k: v for k, v in kept.items() if not k.lower().endswith("_proxy")},
        "PYTHONPATH": os.pathsep.join(paths),
        "AWS_EC2_METADATA_DISABLED": "true",
        "BOTO_DISABLE_CRT": "true",
    }


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own modules
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        **options,
    )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process with its input; kill it where it does not listen."""
    with process:
        try:
            yield
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclasses.dataclass(frozen=True, slots=True)
class Stub:
    """The S3 server, running."""

    url: str
    ca_file: Path | None

    def configure(self, *, latency_ms: float, megabytes_per_second: float) -> None:
        """Set latency and throughput."""
        self._post(f"__config?latency_ms={latency_ms}&megabytes_per_second={megabytes_per_second}")

    def cpu_seconds(self) -> float:
        """Return what it has used."""
        return float(self._post("__stats")["cpu_seconds"])

    def forget(self) -> dict[str, Any]:
        """Drop all objects; return what it counted."""
        return self._post("__forget")

    def _post(self, target: str) -> dict[str, Any]:
        context = None
        if self.ca_file is not None:
            context = ssl.create_default_context(cafile=str(self.ca_file))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(f"{self.url}/{target}", timeout=ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextlib.contextmanager
def running_stub(
    *, certificate: Path | None, ca_file: Path | None, verify: bool, cpu: int | None
) -> Iterator[Stub]:
    """Run the stub, over https if there is a certificate."""
    command = [sys.executable, "-m", "suite.stub"]
    if certificate is not None:
        command.append(f"--certificate={certificate}")
    if verify:
        command.append("--verify")
    process = _start(command)
    with _ended(process):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise ChildError("the stub did not start")
        if cpu is not None:
            os.sched_setaffinity(process.pid, {cpu})
        yield Stub(url, ca_file)


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate for the stub and what a client has to trust.

    Raises:
        ModuleNotFoundError: trustme is not installed.
    """
    import trustme  # type: ignore[import-not-found, unused-ignore] # noqa: PLC0415 - of the bench extra

    authority = trustme.CA()
    ca_file, certificate = directory / "ca.pem", directory / "server.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    return certificate, ca_file


@dataclasses.dataclass(frozen=True, slots=True)
class Child:
    """A process in which contenders run, one after another."""

    process: subprocess.Popen[str]
    log: Path

    @contextlib.contextmanager
    def opened(self, act: str, place: Place) -> Iterator[None]:
        """Let a contender run in it; `ask` for its turns.

        Raises:
            AbsentError: it cannot run here.
            ChildError: it failed.
        """
        self.ask(open=act, place=place.to_values())
        yield
        self.ask(close=True)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask for one thing, and wait for the answer.

        Raises:
            AbsentError: the contender cannot run here; it is closed.
            ChildError: it failed; it is closed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ChildError(f"it ended without an answer\n{self.log.read_text()}")
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise AbsentError(answer["absent"])
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self.process.poll() is not None


@contextlib.contextmanager
def running_child(directory: Path, *, python: str, cpu: int | None) -> Iterator[Child]:
    """Run a child, and end it; what it complains of goes to a file in the directory."""
    command = [python, "-m", "suite.child"]
    if cpu is not None:
        command.append(f"--cpu={cpu}")
    log = directory / "stderr"
    with log.open("w") as stderr:
        process = _start(command, stderr=stderr)
        with _ended(process):
            yield Child(process, log)
