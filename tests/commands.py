"""`pnfs` commands as real processes that can be killed, without importing torch for each of them.

As a script this is a server: it imports everything, starts no thread, and forks a child for every
line of JSON on stdin. It answers with the child's number, then with its exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "open")


class Commands:
    """The server's other end: one command at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])

    def start(
        self, *arguments: object, die_at: int | None = None, file_limit: int | None = None
    ) -> int:
        """Begin `pnfs arguments`; returns its process id.

        Args:
            die_at: see `die_at`. file_limit: bytes that no file may pass, as on a full disk.
        """
        assert self._server.stdin is not None
        request = {
            "arguments": list(map(str, arguments)),
            "log": str(self._log),
            "die_at": die_at,
            "file_limit": file_limit,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def wait(self) -> tuple[int, str]:
        """Exit status (minus the signal that killed it) and everything the command printed."""
        status = self._answer()
        return status, self._log.read_text(encoding="utf-8")

    def run(self, *arguments: object, **limits: int) -> tuple[int, str]:
        """`start` and `wait`."""
        self.start(*arguments, **limits)
        return self.wait()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()
        self._log.unlink()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def die_at(moment: int) -> None:
    """Let SIGKILL end this process before its `moment`-th operation on files. Where that is the
    writing of tensors, half of them are on the disk."""
    from pnfs import statefile

    done = 0

    def counted(function: Callable[..., Any], torn: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == moment:
                if torn:
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    statefile.save_file = counted(statefile.save_file, torn=True)


def _become(request: dict[str, Any]) -> None:
    """The child: its output goes to the log, and then it is the command."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    if request["file_limit"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    if request["die_at"] is not None:
        die_at(request["die_at"])
    from pnfs.cli import main

    main(request["arguments"])


def _serve() -> None:
    import pnfs.commands  # noqa: F401  what children need is imported once

    answers = os.fdopen(os.dup(1), "w")
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            answers.close()
            _become(json.loads(line))
            return
        answers.write(f"{child}\n")
        answers.flush()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{status}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
