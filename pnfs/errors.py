"""The one exception type that users see: what is wrong, where, and what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PnfsError(ValueError):
    """A problem that the user can fix.

    The message is a single line: *what* is wrong, *where* (file, field, tensor), *what to do*. The
    command line prints it without a traceback and exits with status 2.

    Attributes:
        rank: of several processes that torchrun started, the one that prints it; None for what any
            of them finds before they have joined, which the first of each machine prints.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.rank = rank


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `allowed`, else an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
