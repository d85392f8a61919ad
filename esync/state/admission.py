"""Which key may say what: a worker's key speaks for its own ids, and the servers' key alone for a parameter server."""

from __future__ import annotations

from collections.abc import Container

from esync.keys import SERVER, AllowList
from esync.messages import Join, Lost, Members, Message, MessageError, Reset, worker_of


def check_key(
    allowed: AllowList, servers: Container[str], peer: bytes, message: Message, key: str
) -> None:
    """Refuse a message that came by a key which may not send it.

    Args:
        allowed: whose keys these are.
        servers: ids of the parameter servers that joined.
        peer: the sender's identity; handlers check that the message's `worker` is of that name.
        key: the public key of the connection that the message came by.

    Raises:
        MessageError: `unknown-key`: it has been revoked since; `wrong-key`: the id, or the role, is another key's.
    """
    name = allowed.name_of(key)
    if name is None:
        raise MessageError("unknown-key", "this key is not let in any more: it was revoked")
    if name == SERVER:
        return
    worker = worker_of(peer)
    if allowed.owner(worker) != name:
        raise MessageError(
            "wrong-key",
            f"the key of {name!r} does not speak for {worker!r:.80}, only for {name!r} and for ids that begin "
            f"with '{name}-' and are not another key's; choose such a --name",
        )
    serves = isinstance(message, (Reset, Lost, Members)) or worker in servers
    if serves or (isinstance(message, Join) and message.role == "ps"):
        raise MessageError(
            "wrong-key",
            f"the key of {name!r} is a worker's; a parameter server needs the servers' own: --keys DIR, with "
            "server.key in it",
        )
