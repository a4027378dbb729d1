"""Rooms and the messages about them. The table of what each does to which state is docs/protocol.md.

A room is one attempt (`epoch`) at one request. Every message names its room, so one of an older epoch can be
told from one of this epoch. Messages are frozen structs, tagged, and carry no behaviour.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from protocol.phases import Phase
from protocol.sampling import FinishReason, SamplingParams
from protocol.scoring import PositionScores, Scoring

PROTOCOL_VERSION = 4

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
"""Token ids, positions, page numbers and numbers of pages: what is outside is no message."""

Checksum = Annotated[int, msgspec.Meta(ge=0)]
"""64 bits, which is also the most that a message can say."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything sent over a link; subclasses are told apart by their tag."""


class Room(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One attempt at one request. Hashable; ordered by (request_id, epoch)."""

    request_id: str
    epoch: int


class PeerAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a replica listens, and which life of it: a restarted replica has another `boot`."""

    replica_id: str
    boot: int
    host: str
    port: int


class Job(msgspec.Struct, frozen=True, array_like=True):
    """What is to be generated: the same in every half and every epoch but for `logged`."""

    prompt: Annotated[list[Count], msgspec.Meta(min_length=1)]
    """Token ids, at least one."""
    sampling: SamplingParams
    choice: Count = 0
    """Index among the choices of one HTTP request; part of the sampling randomness."""
    logged: list[Count] = []
    """Tokens generated in earlier epochs that the router has logged: generation goes on after them."""
    namespace: str = ""
    """Prefix-cache namespace: nothing is shared between two of them."""
    timeline: bool = False
    """Whether the halves are to tell the router their `Phases`."""
    scoring: Scoring | None = None
    """Which of the prompt's tokens are to be scored: by whoever computes the prompt, before its first token."""
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] = 0
    """Of waiting jobs those with the highest go first."""


# ---- router -> replica: opening rooms -------------------------------------------------------------------------


class OpenPrefill(Message, frozen=True, tag="open_prefill"):
    """Compute the prompt, send the first token to the router, hand the KV to `decode`.

    `decode` is None when the request can only generate one more token: no decode half exists then.
    """

    room: Room
    job: Job
    ttl_ms: int
    """Time left until the request's deadline when this was sent."""
    decode: PeerAddress | None = None


class OpenDecode(Message, frozen=True, tag="open_decode"):
    """Reserve pages for the prompt, take the KV from `prefill`, and stream from the second token on."""

    room: Room
    job: Job
    ttl_ms: int
    prefill: PeerAddress
    prefill_page_size: Count = 0
    """Tokens in a page there; 0 when it is the same here."""


class OpenGenerate(Message, frozen=True, tag="open_generate"):
    """Do both halves here: aggregated mode, recompute after a failed handover, resume after a death."""

    room: Room
    job: Job
    ttl_ms: int


# ---- any direction --------------------------------------------------------------------------------------------


class AbortReason(enum.Enum):
    CLIENT_GONE = "client_gone"
    DEADLINE = "deadline"
    SUPERSEDED = "superseded"
    """A newer epoch of the same request exists."""
    FINISHED_EARLY = "finished_early"
    """Prefill's first token already ended the sequence."""
    PEER_FAILED = "peer_failed"
    TRANSFER_FAILED = "transfer_failed"
    DRAINING = "draining"
    NEVER_OPENED = "never_opened"
    """Prefill heard a `Join` but no open for it in time: the only abort of a peer that the router does not know of."""


class Abort(Message, frozen=True, tag="abort"):
    """End the room, whatever its state; leaves a tombstone, so that an open arriving later is refused."""

    room: Room
    reason: AbortReason


class Closed(Message, frozen=True, tag="closed"):
    """The acknowledgement of `Abort`: the sender's half of the room holds nothing any more."""

    room: Room


# ---- decode <-> prefill: the bootstrap handshake --------------------------------------------------------------


class Join(Message, frozen=True, tag="join"):
    """Decode -> prefill, as soon as its half is open: this connection takes the room's offers."""

    room: Room
    grain: Count = 0
    """Offers are to have a checksum for every so many tokens, which divide prefill's pages; 0 is one for each page."""


class Reservation(Message, frozen=True, tag="reservation"):
    """Decode -> prefill: pages for the whole prompt are reserved; the first `held_pages` of prefill's need no
    transfer."""

    room: Room
    held_pages: Count


class Offer(Message, frozen=True, tag="offer"):
    """Prefill -> decode: pages of the prompt whose KV is complete and may be taken.

    Prompt page `first + i` lies in prefill's pool at page `pages[i]` and has xxh3-64 checksum `checksums[i]`, or as
    many as decode asked for when it joined (0 when verification is off). Pages arrive in prompt order but an offer may
    arrive twice.
    """

    room: Room
    first: Count
    pages: list[Count]
    checksums: list[Checksum]


class Handoff(Message, frozen=True, tag="handoff"):
    """Prefill -> decode: the prompt is computed; `token` was sampled at `position` (0 = first generated)."""

    room: Room
    token: Count
    position: Count
    num_pages: Count
    """Pages of the whole prompt, the last maybe part-filled: decode admits when it holds them all."""
    computed_at: float = 0.0
    """Unix time (seconds) at which prefill's computation ended; read by the handover metric only."""


class Delivered(Message, frozen=True, tag="delivered"):
    """Decode -> prefill: every page was taken and verified; prefill may release its own."""

    room: Room


# ---- replica -> router ----------------------------------------------------------------------------------------


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `position` counts generated tokens of the request from 0, over all epochs."""

    request_id: str
    epoch: int
    choice: int
    position: int
    token: int
    logprob: float | None = None
    top: list[TopLogprob] | None = None
    finish: FinishReason | None = None
    matched: str | int | None = None
    """The stop string or stop token id that ended the sequence."""
    cached_tokens: int | None = None
    """On the first event of a half: prompt tokens found in that replica's prefix cache."""
    named: list[float] | None = None
    """The logprobs of `SamplingParams.logprob_tokens` in this token's place."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What a replica is doing now; rides on every step frame, and alone twice a second when idle."""

    waiting_requests: int
    waiting_tokens: int
    """Prompt tokens not computed yet, of every request here."""
    running_requests: int
    free_pages: int
    cached_pages: int
    total_pages: int
    draining: bool = False


class StepFrame(Message, frozen=True, tag="step"):
    """Everything one engine step produced for one router."""

    tokens: list[TokenEvent]
    load: Load


class Phases(Message, frozen=True, tag="phases"):
    """Replica -> router, about a room whose job asked for its timeline: phases that are over and were not told before.

    Those of a half that ends come before its last token or its `RoomFailed`, over the same link.
    """

    room: Room
    phases: list[Phase]


class PromptScores(Message, frozen=True, tag="scores"):
    """Replica -> router: the next scores of the prompt, in order of position and as they are computed.

    Those of a room all come before its first token, over the same link.
    """

    room: Room
    scores: PositionScores


class FailureCode(enum.Enum):
    """Why a replica gave a room up. `RETRYABLE` says which of these another epoch can mend."""

    PEER_LOST = "peer_lost"
    TRANSFER_FAILED = "transfer_failed"
    LEASE_EXPIRED = "lease_expired"
    DRAINING = "draining"
    OVERLOADED = "overloaded"
    REFUSED = "refused"
    """A tombstone or a newer epoch was there already: for the router's newest epoch, the other half failed first."""
    DEADLINE = "deadline"
    TOO_LONG = "too_long"
    """The prompt and its tokens can never fit this replica's pool."""
    BAD_GRAMMAR = "bad_grammar"
    """The request's grammar cannot be compiled or followed, is too large or takes too long."""
    NO_GRAMMARS = "no_grammars"
    """This replica can follow no grammar at all."""
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        FailureCode.PEER_LOST,
        FailureCode.TRANSFER_FAILED,
        FailureCode.LEASE_EXPIRED,
        FailureCode.DRAINING,
        FailureCode.OVERLOADED,
        FailureCode.REFUSED,
        FailureCode.INTERNAL,
    }
)


class RoomFailed(Message, frozen=True, tag="failed"):
    """Replica -> router: this half gave up and holds nothing any more; the router decides what follows."""

    room: Room
    code: FailureCode
    detail: str


RouterToReplica = OpenPrefill | OpenDecode | OpenGenerate | Abort
ReplicaToRouter = StepFrame | Phases | PromptScores | RoomFailed | Closed
DecodeToPrefill = Join | Reservation | Delivered | Abort | Closed
PrefillToDecode = Offer | Handoff | Abort | Closed
