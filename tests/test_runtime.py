"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

from pnfs.runtime import StopSignals


def test_a_signal_is_noted_its_echo_ignored_and_a_later_one_acts() -> None:
    acted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: acted.append(number))
    try:
        with StopSignals() as signals:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert signals.name == "SIGTERM" and acted == []
            signals.ECHO = 0.0  # type: ignore[misc]
            os.kill(os.getpid(), signal.SIGTERM)
            assert acted == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(acted) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
