"""Activations and gradients between neighbouring stages: receives are posted ahead, nothing blocks until it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llama_dist.pipeline.schedule import Action, Kind
from llama_dist.runtime import Channels

# Receives posted on a channel before the program comes to them: one is filled while the one before is computed on.
# Not on GPUs, where whatever waits for the whole device (an allocation, DeepSpeed's reduction under ZeRO-2) would wait
# for messages that this rank's own later work calls for. There a receive is posted where it stands in the program, which
# is before it is needed, and where its send has been posted.
AHEAD = {"cpu": 2, "cuda": 0}
SENT_AHEAD = {"cpu": 4, "cuda": 2**31}  # sends under way at a time; on a GPU a wait would hold up the computation


@dataclass(frozen=True)
class Message:
    """A tensor that is being sent or received; its memory belongs to the backend until `wait` returns."""

    work: dist.Work
    data: Tensor

    def wait(self) -> Tensor:
        self.work.wait()
        return self.data


class Transport:
    """The messages of one pass on one rank; each channel delivers in the order sent.

    `actions` is the rank's program: it says what will be received, and in which order. `shapes` are those of the
    messages, by micro-batch.
    """

    def __init__(
        self,
        channels: Channels | None,
        actions: Sequence[Action],
        *,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._channels = channels
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._to_post = {kind: deque(a for a in actions if a.kind == kind) for kind in ("RECV_F", "RECV_B")}
        self._posted: dict[Kind, deque[tuple[Action, Message]]] = {kind: deque() for kind in self._to_post}
        self._under_way: deque[Message] = deque()
        self._ahead, self._sent_ahead = AHEAD[device.type], SENT_AHEAD[device.type]
        for kind in self._to_post:
            self._post(kind, self._ahead)

    def receive(self, action: Action) -> Message:
        """The message of a RECV action, which may still be under way."""
        self._post(action.kind, max(self._ahead, 1))
        expected, message = self._posted[action.kind].popleft()
        assert expected == action, f"{action} is run where {expected} comes next"
        self._post(action.kind, self._ahead)
        return message

    def send(self, action: Action, data: Tensor) -> None:
        """Start to send the data of a SEND action."""
        expected = self._shapes[action.microbatch]
        assert tuple(data.shape) == expected, f"{action}: message of {tuple(data.shape)}, not of {expected}"
        channel = self._channels.forward_out if action.kind == "SEND_F" else self._channels.backward_out
        data = data.contiguous()
        # The tensor is kept until it has left: the backend only borrows its memory.
        self._under_way.append(Message(dist.isend(data, channel.peer, group=channel.group), data))
        # gloo calls a send completed only once it has been waited for, which is safe for all but the last few: programs
        # do not deadlock even if every send blocks.
        while self._under_way and (self._under_way[0].work.is_completed() or len(self._under_way) > self._sent_ahead):
            self._under_way.popleft().wait()

    def finish(self) -> None:
        """Wait for the sends that are still under way."""
        assert not any(self._posted.values()), "a program must receive all that it posts"
        while self._under_way:
            self._under_way.popleft().wait()

    def _post(self, kind: Kind, count: int) -> None:
        while self._to_post[kind] and len(self._posted[kind]) < count:
            action = self._to_post[kind].popleft()
            channel = self._channels.forward_in if kind == "RECV_F" else self._channels.backward_in
            buffer = torch.empty(self._shapes[action.microbatch], dtype=self._dtype, device=self._device)
            work = dist.irecv(buffer, channel.peer, group=channel.group)
            self._posted[kind].append((action, Message(work, buffer)))
