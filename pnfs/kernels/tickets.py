"""Counters by which the last program of a launch knows that it is the last.

Programs that leave sums each take a ticket when theirs are written; the one that takes the last
adds all of them up, in a fixed order, which spares a launch. It also sets the counter to zero
again: so counters are zero whenever a launch begins, and may be used by one launch after another,
as those of a stream are. A captured launch may be replayed beside any other, and has counters that
nothing else uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 1024  # of a stream; a launch that needs more has its own
CAPTURED = 65536  # of a device, for all launches that are captured
UNIT = 4  # of them, 16 bytes: Triton compiles a kernel anew for an address that is no multiple

_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_for_captures: dict[torch.device, list[Tensor]] = {}  # what is left, in one piece or none


def counters(count: int, device: torch.device) -> Tensor:
    """`count` zeros, int32, for the next launch on the current stream, which leaves them so."""
    if device.type != "cuda" or count > COUNTERS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(count, device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    found = _of_streams.get(key)
    if found is None:
        # What a capture takes has to be there before it: its own memory is zero at no replay.
        if device not in _for_captures:
            _for_captures[device] = [torch.zeros(CAPTURED, dtype=torch.int32, device=device)]
            torch.cuda.current_stream(device).synchronize()
        found = _of_streams[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return found


def _of_capture(count: int, device: torch.device) -> Tensor:
    left = _for_captures.get(device, [])
    size = -(-count // UNIT) * UNIT
    if not left or len(left[0]) < size:  # zeroed by the graph itself, a node more
        return torch.zeros(count, dtype=torch.int32, device=device)
    taken, left[0] = left[0][:size], left[0][size:]
    return taken
