"""One parameter server, as a worker sees it: updates go to it, its shard of the model comes from it. Everything here
happens in the thread of the worker's link.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from esync import messages, transport
from esync.compression import Compressor, Payload
from esync.device_memory import Array, on_host, opened, pinned, put
from esync.fault_log import FaultLog
from esync.handshake import Token
from esync.keys import ClientKeys
from esync.messages import (
    NO_SHARED_MEMORY,
    Error,
    Fetch,
    Have,
    Message,
    MessageError,
    Model,
    Offer,
    Update,
    Want,
)
from esync.seal import TO_SERVER, TO_WORKERS, Envelope
from esync.shared_memory import MODEL_SLOTS, WRITING, Region, SharedMemoryError
from esync.tensors import Vector
from esync.worker.assembly import Assembly

log = logging.getLogger("esync.worker")
RETRY_S = 1.0
"""After so long without progress what was asked for is asked for again."""
HAVE_S = 0.5
"""On a slow link what has arrived is said so often."""
RECV_BURST = 64


@dataclass(frozen=True, slots=True)
class Address:
    """Where a parameter server is.

    Attributes:
        push, model: the endpoints to which updates go, and from which models come.
        keys: by which it lets us in; None: it lets everybody in.
    """

    push: str
    model: str
    keys: ClientKeys | Token | None


@dataclass(slots=True)
class Push:
    """An update to be sent.

    Attributes:
        flat: of all shards, in memory of the host or of a device.
        rounds: of each shard the version that it was computed from, or `INITIAL`.
        lives: of each shard the incarnation of the parameter server whose version that was.
        payloads: (shard, chunk) -> its encoding and bytes, once they have been sent: what is lost is sent again as it
            was.
    """

    flat: Vector | Array
    rounds: tuple[int, ...]
    lives: tuple[str, ...]
    steps: int
    samples: int
    payloads: dict[tuple[int, int], tuple[str, Payload]] = field(default_factory=dict)


class Channel:
    """The connections to one parameter server.

    Args:
        shard: which of the model's shards it keeps.
        role: `worker` or `evaluator`.
        envelope: seals what is sent and opens what comes, if the run does.
        memories: gives the memory in which this worker's updates can be put for this server if it is on this machine,
            the best first; none if there is none.
        cuda: gives the CUDA device on which models are to be, as this process counts, or None.
        on_complete: a version of the shard is complete.
        on_error: the server refused something.
        on_want: the server wants chunks (none named: all) of an update again.
    """

    def __init__(
        self,
        shard: int,
        address: Address,
        assembly: Assembly,
        compressor: Compressor,
        chunks: range,
        *,
        worker: str,
        role: str,
        memories: Callable[[], list[Region]],
        cuda: Callable[[], int | None],
        on_complete: Callable[[], None],
        on_error: Callable[[Error], None],
        on_want: Callable[[Channel, int, list[int]], None],
        envelope: Envelope,
        context: zmq.Context[Any],
        poller: zmq.Poller,
    ) -> None:
        self.shard, self.assembly, self.chunks = shard, assembly, chunks
        self.puts = False  # updates into memory: the server has mapped it
        self.progress_at = time.monotonic()
        self._worker, self._compressor = worker, compressor
        self._memories, self._cuda = memories, cuda
        self._untried: list[Region] = []  # of those, what the server has not been offered
        self.whole: Region | None = None  # what it was offered last
        self._memory: Region | None = None  # this shard's part of it
        self._on_complete, self._on_error, self._on_want = on_complete, on_error, on_want
        self._poller, self._envelope = poller, envelope
        self._outgoing: deque[list[Any]] = deque()
        self._offered_to = ""  # the incarnation of the server
        self._offered_at: float | None = None  # until there is an answer
        self._faults = FaultLog(log)
        self._received = 0  # bytes since we said what has arrived, and chunks
        self._chunks_received = 0
        self._evaluator = role == "evaluator"
        self._topic = f"{'e' if self._evaluator else 'w'}/{worker}/".encode()
        self._said_at = 0.0  # what we have
        self._context = context
        self._address = address
        self._open()

    def _open(self) -> None:
        address = self._address
        self._push = transport.push(self._context, address.push, address.keys)
        # By another connection, which no update is ahead of.
        self._word = transport.push(self._context, address.push, address.keys)
        most = transport.max_chunk_bytes(self.assembly.layout.chunk_mib)
        self.sub = transport.sub(self._context, address.model, self._topic, address.keys, most)
        self._poller.register(self.sub, zmq.POLLIN)

    def connect(self, address: Address, envelope: Envelope) -> None:
        """From now on the server is there, and messages are sealed so; nothing happens where that is so already."""
        if envelope.key != self._envelope.key:
            self._envelope = envelope
        if address != self._address:
            self._address = address
            self.connect_again()

    def connect_again(self) -> None:
        """Have new connections; what was on its way by the old ones is asked for again."""
        for socket in (self._push, self._word, self.sub):
            if socket in self._poller:
                self._poller.unregister(socket)
            socket.close(0)
        self._outgoing.clear()
        self._open()

    def close(self) -> None:
        self._push.close()
        self._word.close(0)
        self.sub.close()
        self._faults.close()

    # To the server

    @property
    def blocked(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outgoing)

    def post(self, message: Message) -> None:
        """Send a message without a payload."""
        self._outgoing.append(self._envelope.pack(messages.encode(message), None, TO_SERVER))
        self.flush()

    def push_chunk(self, update: Push, chunk: int, part: Vector | Array, *, in_place: bool) -> None:
        """Send a chunk of this shard: itself, or word that it lies in shared memory.

        Args:
            in_place: `part` is in that memory already.
        """
        header = Update(
            self._worker,
            update.rounds[self.shard],
            chunk,
            self.assembly.layout.digest,
            update.steps,
            update.samples,
            incarnation=update.lives[self.shard],
        )
        if self.puts and self._memory is not None:
            if self._memory.stamps[0, chunk] != header.round:
                if not in_place:
                    put(part, self._memory.begin(0, chunk))
                self._memory.finish(0, chunk, header.round)
            header.slot, payload = 0, None
        else:
            key = self.shard, chunk
            if key not in update.payloads:
                update.payloads[key] = self._compressor.encode(chunk, on_host(part), header.round)
            header.encoding, payload = update.payloads[key]
        self._outgoing.append(self._envelope.pack(messages.encode(header), payload, TO_SERVER))
        self.flush()

    def has_put(self, round: int) -> bool:
        """Whether an update of this round lies in the memory that the server reads. It counts once, and stays as it is:
        of several parameter servers one may be in a round still for which it has this worker's."""
        return self._memory is not None and bool((self._memory.stamps[0] == round).any())

    def flush(self) -> None:
        """Send what the socket takes; it says when it takes more."""
        while self._outgoing:
            try:
                self._push.send_multipart(self._outgoing[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._poller.register(self._push, zmq.POLLOUT)
                return
            self._outgoing.popleft()
        self._poller.register(self._push, 0)

    def fetch(self, awaited: int, pushed: int) -> None:
        """Ask for a version newer than the `awaited` one; `pushed` is the round of the update whose effect that is."""
        version, missing = self.assembly.missing()
        self.post(Fetch(self._worker, awaited, pushed, version, missing, self._evaluator))

    def on_time(self, now: float) -> None:
        """Time has passed."""
        if self._offered_at is not None and now - self._offered_at > RETRY_S:
            self._offer()

    # From the server

    def receive(self) -> None:
        """Take what has arrived."""
        for _ in range(RECV_BURST):
            try:
                frames = self.sub.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._on_data(frames)
            except MessageError as error:
                text = f"parameter server {self.shard} sent something unusable: {error.code}: {error.text}"
                self._faults.say(self._worker, error.code, text)
                if error.code == "version-mismatch":
                    self._on_error(Error(error.code, error.text))

    def _on_data(self, frames: list[zmq.Frame]) -> None:
        if len(frames) < 2:
            raise MessageError("bad-frames", "a model message has a topic and a header")
        message = messages.decode(frames[1].buffer)
        # What is for us alone is sealed with our topic: it is nobody else's.
        about = () if isinstance(message, Model) else (frames[0].buffer,)
        _, payload, _ = self._envelope.unpack([f.buffer for f in frames[1:]], TO_WORKERS, *about)
        if isinstance(message, Model):
            if len(payload) != (1 if message.slot < 0 else 0):
                raise MessageError("bad-frames", "a model message has one payload or a slot")
            self._on_model(message, payload[0] if payload else None)
        elif isinstance(message, Want):
            self._meet(message.incarnation)
            count = len(self.assembly.layout.chunks)
            self.assembly.served_by(message.incarnation)
            chunks = [i for i in message.chunks if type(i) is int and 0 <= i < count]
            self._on_want(self, message.round, chunks)
        elif isinstance(message, Offer):
            self._on_offer(message)
        elif isinstance(message, Error) and message.code == NO_SHARED_MEMORY:
            self._say_why(message.text)
            again, offered = self.puts, self._offered_at is not None
            self._share(None)
            if again:  # it had been mapped: offer it once more, with the next model
                self._offered_to = ""
            elif offered:
                self._offer_next()
        elif isinstance(message, Error):
            self._on_error(message)

    def _on_model(self, header: Model, payload: memoryview | None) -> None:
        self.progress_at = time.monotonic()
        self._meet(header.incarnation)
        self._received += 0 if payload is None else payload.nbytes
        self._chunks_received += 1
        complete = False
        try:
            complete = self.assembly.add(header, payload)  # no lock: only this thread adds
        finally:
            many = (
                self._chunks_received >= transport.HAVE_CHUNKS
                or self._received >= transport.HAVE_BYTES
                or self.progress_at - self._said_at >= HAVE_S
            )
            if complete or many:
                self._have(header.version, header.chunk, complete)
        if complete:
            self._on_complete()

    def _have(self, version: int, chunk: int, whole: bool) -> None:
        """Say what has arrived."""
        self._received = self._chunks_received = 0
        self._said_at = self.progress_at
        have = Have(self._worker, version, chunk, whole, self._evaluator)
        frames = self._envelope.pack(messages.encode(have), None, TO_SERVER)
        try:
            self._word.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            pass  # the connection is gone: what is missed then is asked for

    # Shared memory

    def _meet(self, incarnation: str) -> None:
        """Offer memory to a parameter server that we have not met yet; until it takes it, sockets carry everything."""
        if incarnation in ("", self._offered_to):
            return
        self._offered_to = incarnation
        self._share(None)
        self._untried = self._memories()
        self._offer_next()

    def _offer_next(self) -> bool:
        """Offer the best memory that the server has not been offered; False if there is none."""
        if not self._untried:
            return False
        self.whole = self._untried.pop(0)
        self._memory = self.whole.part(self.chunks)
        self._memory.stamps[:] = (
            WRITING  # what an earlier life of the server was given is nothing for this one
        )
        self._offer()
        return True

    def _offer(self) -> None:
        assert self._memory is not None
        self._offered_at = time.monotonic()
        self.post(self._memory.offer(self._worker, self._offered_to))

    def _on_offer(self, offer: Offer) -> None:
        """The parameter server has mapped our memory, and offers its own."""
        if offer.incarnation != self._offered_to:
            return
        self._offered_at = None
        try:
            if offer.fd >= 0:  # else only updates go through shared memory
                index = self._cuda() if offer.device else None
                region = opened(self.assembly.layout, MODEL_SLOTS, offer, index)
                self._share(pinned(region, self._cuda()))
            self.puts = True
        except SharedMemoryError as error:
            self._say_why(str(error))
            if not self._offer_next():
                self.post(Offer(self._worker, "", 0, -1, "", offer.incarnation))

    def _say_why(self, why: str) -> None:
        """Say why the memory that was offered is not used."""
        way = "over sockets" if self.puts or not self._untried else "through memory of the host"
        text = f"the exchange with parameter server {self.shard} goes {way}: {why}"
        self._faults.say(self._worker, NO_SHARED_MEMORY, text, level=logging.INFO)

    def _share(self, region: Region | None) -> None:
        """Have models in this memory of the parameter server from now on; None: over the socket, and updates too."""
        self.puts, self._offered_at = False, None
        self.assembly.share(region)
