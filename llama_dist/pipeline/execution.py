"""One pass of micro-batches through a rank's program: forwards, backwards and transfers, one action after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_dist.model.llama import Cache, Documents
from llama_dist.pipeline.deferred import Terms
from llama_dist.pipeline.engine import Root, StageEngine
from llama_dist.pipeline.schedule import Action, Kind
from llama_dist.pipeline.transport import Message, Transport


@dataclass(frozen=True)
class Microbatch:
    """What a rank computes on: its positions [start, start + length) of some sequences.

    `tokens` (batch, length) int64; `targets` the same, or None where logits are wanted. `counted` bool (batch, length):
    which targets count in the loss; None: all.
    """

    tokens: Tensor
    targets: Tensor | None
    start: int = 0
    documents: Documents | None = None
    cache: Cache | None = None
    counted: Tensor | None = None


class Execution:
    """The state of a pass: what has arrived and not been used, what has been computed and not been sent.

    Keys are (micro-batch, chunk): of hidden states, the chunk that they go into; of gradients, the chunk whose output
    they belong to.
    """

    def __init__(
        self,
        engine: StageEngine,
        transport: Transport,
        microbatches: Sequence[Microbatch],
        *,
        num_chunks: int,
        loss_weight: float | Tensor | None = None,
    ) -> None:
        """`loss_weight`: what the loss of a token that counts is worth in the gradient, a tensor () on the device where
        micro-batches say what counts; None: no backward, outputs are kept.
        """
        self._engine = engine
        self._transport = transport
        self._microbatches = microbatches
        self._last_chunk = num_chunks - 1
        self._loss_weight = loss_weight
        self._hidden: dict[tuple[int, int], Tensor | Message] = {}
        self._gradients: dict[tuple[int, int], Tensor | Message] = {}
        self._open: dict[tuple[int, int], tuple[Tensor, Root]] = {}  # input and graph of what waits for a backward
        self._deferred: dict[tuple[int, int], Terms] = {}
        self.outputs: dict[int, Tensor] = {}  # of the last chunk, by micro-batch: token losses or logits

    def run(self, actions: Sequence[Action], *, split_backward: bool) -> None:
        """Execute the program; with `split_backward`, B is the gradient of the input only and W those of the weights."""
        backward = self._backward_input if split_backward else self._backward
        accumulates = "W" if split_backward else "B"
        remaining = sum(action.kind == accumulates for action in actions)
        handlers: dict[Kind, Callable[..., None]] = {
            "F": self._forward,
            "B": backward,
            "W": self._backward_weights,
            "RECV_F": self._receive_hidden,
            "RECV_B": self._receive_gradient,
            "SEND_F": self._send_hidden,
            "SEND_B": self._send_gradient,
        }
        for action in actions:
            extra: dict[str, Any] = {}
            if action.kind == accumulates:
                remaining -= 1
                extra = {"is_last": remaining == 0}
            handlers[action.kind](action, **extra)
        self._transport.finish()

    def _forward(self, action: Action) -> None:
        _, number, chunk = action
        batch = self._microbatches[number]
        x = batch.tokens if chunk == 0 else _arrived(self._hidden.pop((number, chunk)))
        if self._loss_weight is not None and chunk > 0:
            x.requires_grad_()
        y = self._engine.forward(
            x,
            batch.targets,
            chunk=chunk,
            start=batch.start,
            length=batch.tokens.shape[1],
            documents=batch.documents,
            cache=batch.cache,
        )
        if chunk == self._last_chunk:
            self.outputs[number] = y.detach()
        else:
            self._hidden[number, chunk + 1] = y.detach()
        if self._loss_weight is not None:
            self._open[number, chunk] = (x, Root(y))

    def _backward(self, action: Action, *, is_last: bool) -> None:
        x, root, gradient = self._take(action)
        self._engine.backward(root, gradient, is_last=is_last)
        self._keep_gradient(action, x)

    def _backward_input(self, action: Action) -> None:
        x, root, gradient = self._take(action)
        self._deferred[action.microbatch, action.chunk] = self._engine.backward_input(root, gradient)
        self._keep_gradient(action, x)

    def _backward_weights(self, action: Action, *, is_last: bool) -> None:
        self._engine.backward_weights(self._deferred.pop((action.microbatch, action.chunk)), is_last=is_last)

    def _take(self, action: Action) -> tuple[Tensor, Root, Tensor]:
        """Input, graph and the output's gradient of the forward that `action` is the backward of."""
        _, number, chunk = action
        x, root = self._open.pop((number, chunk))
        if chunk == self._last_chunk:
            return x, root, self._loss_gradient(number)
        return x, root, _arrived(self._gradients.pop((number, chunk)))

    def _loss_gradient(self, number: int) -> Tensor:
        counted = self._microbatches[number].counted
        if counted is None:
            return torch.full_like(self.outputs[number], self._loss_weight)
        return counted * self._loss_weight

    def _keep_gradient(self, action: Action, x: Tensor) -> None:
        if action.chunk > 0:
            self._gradients[action.microbatch, action.chunk - 1] = x.grad

    def _receive_hidden(self, action: Action) -> None:
        self._hidden[action.microbatch, action.chunk] = self._transport.receive(action)

    def _receive_gradient(self, action: Action) -> None:
        self._gradients[action.microbatch, action.chunk] = self._transport.receive(action)

    def _send_hidden(self, action: Action) -> None:
        self._transport.send(action, self._hidden.pop((action.microbatch, action.chunk + 1)))

    def _send_gradient(self, action: Action) -> None:
        self._transport.send(action, self._gradients.pop((action.microbatch, action.chunk - 1)))


def _arrived(data: Tensor | Message) -> Tensor:
    """A message is waited for where it is used, not where the program has it come in on an ideal clock."""
    return data.wait() if isinstance(data, Message) else data
