"""Flower mods for uploads that hold a part of the model: what ``fedsparse.client.client_app`` takes as ``mods``.

Flower's own mods clip and perturb whatever ArrayRecord a client sends, as an update of the one that it got; that fits
whole models alone. Here the update is taken over the coordinates that are sent, against what the client received there;
index sets, bitmaps and names are not floats and stay as they are. docs/privacy.md says what that promises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedsparse.aggregation import Aggregation
from fedsparse.client import FederatedClient, Memory, check_positive, load_memory, read_words
from fedsparse.errors import UserError
from fedsparse.packet import Packet, decode, encode, run_words
from fedsparse.task import Task

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp.typing import ClientAppCallable, Mod


def sparse_dp_mod(task: Task, clip: float, noise_multiplier: float, *, secret: str = "") -> Mod:
    """A mod that clips a client's update to an L2 norm of ``clip`` and adds Gaussian noise to every value it sends.

    noise_multiplier: standard deviation of the noise, over ``clip``; 0 = clip only. The noise is drawn by (seed, round,
    client, secret, "dp"): without a ``secret`` of the client's own a server that knows the seed can take it off again,
    which is fit for experiments only. A reply that holds other floats than values of the model (scores, gradients,
    statistics) is refused: they would leave the client as they are.
    """
    check_positive(clip=clip)
    rule = Aggregation(clip=clip, noise=noise_multiplier)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        from flwr.app import Message as FlowerMessage

        from fedsparse.lent import LentRecords

        packet, memory = decode(message.content), load_memory(context)
        words, half = read_words(run_words(message.content))
        reply = call_next(message, context)
        if reply.has_error() or decode(reply.content).kind == "error":
            return reply
        path = (words.seed, words.round, int(context.node_config["partition-id"]), secret)
        try:
            answer = _perturbed(rule, task, half, packet, memory, decode(reply.content), path)
        except UserError as error:  # the server is told, and gets nothing else
            answer = Packet("error", scalars={"message": str(error)})
        lend = getattr(context, "lend", False)
        return FlowerMessage(LentRecords(answer) if lend else encode(answer), reply_to=message)

    return mod


def _perturbed(
    rule: Aggregation,
    task: Task,
    half: FederatedClient,
    packet: Packet,
    memory: Memory,
    reply: Packet,
    path: tuple[int | str, ...],
) -> Packet:
    """The reply with its values clipped and noisy. Raises UserError where that would not be all that it tells."""
    floats = {name for name, t in reply.tensors.items() if t.is_floating_point()}
    sent = half.received(task, packet, memory, reply) if reply.kind == "update" else {}
    if bare := sorted(floats - sent.keys()):
        raise UserError(f"sparse_dp_mod covers the model alone, and a reply {reply.kind!r} holds {bare[0]!r}: refused")
    values = {name: reply.tensors[name] for name in sent}
    noisy = rule.noised(rule.clipped(values, sent), values.keys(), 1, *path)
    return replace(reply, tensors={**reply.tensors, **{name: t.float() for name, t in noisy.items()}})


def clipping_norm_mod(norm: float) -> Mod:
    """A mod that tells Flower's ``fixedclipping_mod`` and ``adaptiveclipping_mod``, after it, which norm to clip to.

    With Flower's own server halves their server-side wrappers do so.
    """
    check_positive(norm=norm)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        from flwr.app import ConfigRecord, RecordDict
        from flwr.app import Message as FlowerMessage
        from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

        records = RecordDict(dict(message.content.items()))
        records["config"] = ConfigRecord({**records.config_records["config"], KEY_CLIPPING_NORM: norm})
        about = message.metadata
        told = FlowerMessage(records, about.dst_node_id, about.message_type, group_id=about.group_id)
        return call_next(told, context)

    return mod
