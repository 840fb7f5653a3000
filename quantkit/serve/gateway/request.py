"""A request: validation of its body, of which a few values are kept, and its body per upstream."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.serve.gateway.admission_policy import PRIORITY_LEVELS
from quantkit.serve.gateway.api_keys import ApiKey
from quantkit.serve.gateway.bodies import HeldBytes
from quantkit.serve.gateway.errors import RequestRejected
from quantkit.serve.gateway.json_scan import (
    InvalidJson,
    ScannedObject,
    scan_between_others,
    scan_object,
    skip_space,
)
from quantkit.serve.gateway.settings import Limits, Upstream

TOKEN_LIMITS: Mapping[str, tuple[str, ...]] = {
    "/completions": ("max_tokens",),
    "/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/responses": ("max_output_tokens",),
    "/embeddings": (),
}
"""Path -> the parameters that limit the generated tokens. If a request has none of them, the
gateway sets the first to its own limit."""
PROMPTS: Mapping[str, tuple[str, ...]] = {
    "/completions": ("prompt", "prompt_embeds"),
    "/embeddings": ("input",),
}
"""Path -> the parameters that may hold several prompts, each a turn of its own at the engine."""
_LIMITED = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_CHOICES = ("n", "best_of")
_FLAGS = ("stream", "background")
_VALUES = (*_LIMITED, *_CHOICES, *_FLAGS, "priority")  # the others are only replaced or counted
_NAMES = frozenset(
    name.encode() for name in (*_VALUES, "model", *(n for names in PROMPTS.values() for n in names))
)
_NUMBER = re.compile(r"-?[0-9]{1,6}")
_VALUE_BYTES = 100  # no valid number or flag is longer
_PIECE_BYTES = 1 << 16  # sent at a time

Changes = Mapping[bytes, bytes | None]
"""Top-level member -> its new value as JSON; None removes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyRequest:
    """A validated request.

    path: after /v1, with its slash. body: as the client sent it, until it is released. scanned:
    offsets of its members. changes: for every upstream. sent_priority: in the body, None without.
    priority: 0 is the most urgent. turns: sequences that the engine generates. timeout: seconds
    from its arrival to its end.
    """

    path: str
    body: HeldBytes
    scanned: ScannedObject
    changes: Changes
    sent_priority: int | None
    stream: bool
    priority: int
    turns: int
    timeout: float

    def body_for(self, upstream: Upstream) -> list[memoryview]:
        """Return the body for an upstream in pieces: the client's own bytes between changes."""
        changes = dict(self.changes)
        priority = (self.priority or None) if upstream.priorities else None
        # An upstream without priorities rejects any, and vLLM rejects null.
        is_rejected = self.sent_priority is None or not upstream.priorities
        is_sent = b"priority" in self.scanned.members
        if (is_sent and is_rejected) or priority != (self.sent_priority or None):
            changes[b"priority"] = None if priority is None else str(priority).encode()
        if upstream.model:
            changes[b"model"] = json.dumps(upstream.model).encode()
        return splice_body(self.body.content, self.scanned, changes)


def splice_body(text: bytes, scanned: ScannedObject, changes: Changes) -> list[memoryview]:
    """Return an object with other top-level members, in pieces; new ones come first."""
    whole = memoryview(text)
    if not changes:
        return [whole]
    removed = [scanned.members[name] for name in changes if name in scanned.members]
    removed.sort(key=lambda member: member.start)
    begin = scanned.start
    while removed and removed[0].start in (begin, skip_space(text, begin)):
        begin = removed.pop(0).end  # the first members; each of the others goes with its comma
    first = skip_space(text, begin)
    has_rest = first != scanned.end
    if has_rest and begin != scanned.start:
        begin = first + 1  # after the comma
    pieces = list[memoryview]()
    for member in removed:
        pieces.append(whole[begin : member.start])
        begin = member.end
    pieces.append(whole[begin : scanned.end])
    added = b", ".join(
        json.dumps(name.decode()).encode() + b": " + value
        for name, value in changes.items()
        if value is not None
    )
    separator = b", " if added and has_rest else b""
    return [memoryview(b"{" + added + separator), *pieces, memoryview(b"}")]


async def iterate_pieces(pieces: Sequence[memoryview]) -> AsyncIterator[bytes]:
    """Yield a body in small pieces, so that sending copies no more than one."""
    for piece in pieces:
        for start in range(0, len(piece), _PIECE_BYTES):
            yield bytes(piece[start : start + _PIECE_BYTES])


async def scan_body(body: HeldBytes) -> ScannedObject:
    """Check the JSON of a body, in steps between which the event loop serves others."""
    try:
        return await scan_between_others(body.content, _NAMES)
    except InvalidJson as fault:
        raise reject_value(f"body: {fault}; repair it") from None


def parse_request(
    path: str,
    body: HeldBytes,
    scanned: ScannedObject,
    headers: Mapping[bytes, bytes],
    key: ApiKey,
    limits: Limits,
) -> ProxyRequest:
    """Validate a request; RequestRejected names the first invalid parameter."""
    values = {name: read_value(body.content, scanned, name) for name in _VALUES}
    for name in _LIMITED:
        check_limit(values, name, limits.max_tokens)
    for name in _CHOICES:
        check_limit(values, name, limits.max_choices)
    check_flags(values)
    changes = dict[bytes, bytes | None]()
    own_limits = TOKEN_LIMITS[path]
    if limits.max_tokens and own_limits and all(values[name] is None for name in own_limits):
        changes[own_limits[0].encode()] = str(limits.max_tokens).encode()
    sent_priority = check_priority(values["priority"])
    priority = parse_priority(headers, sent_priority)
    return ProxyRequest(
        path=path,
        body=body,
        scanned=scanned,
        changes=changes,
        sent_priority=sent_priority,
        stream=values["stream"] is True,
        priority=max(key.priority, key.priority if priority is None else priority),
        turns=count_turns(path, body.content, scanned, values, key, limits),
        timeout=parse_timeout(headers, limits.deadline),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse the JSON object of a body, for an engine; RequestRejected for anything else."""
    try:
        scan_object(body, frozenset())
    except InvalidJson as fault:
        raise reject_value(f"body: {fault}; repair it") from None
    values: dict[str, Any] = json.loads(body)
    return values


def read_value(text: bytes, scanned: ScannedObject, name: str) -> Any:
    """Return a top-level member; None without. A number that is too long stays text."""
    member = scanned.members.get(name.encode())
    if member is None:
        return None
    value = text[member.value : member.end]
    if len(value) > _VALUE_BYTES:
        return value[:_VALUE_BYTES].decode("utf-8", "replace")
    return json.loads(value)


def reject_value(message: str) -> RequestRejected:
    """Return the error for an invalid value."""
    return RequestRejected(400, "invalid_request_error", message)


def check_limit(values: Mapping[str, Any], name: str, maximum: int) -> None:
    """Raise RequestRejected if a parameter is above `maximum` (0: no limit) or not an integer.

    An engine might accept a float or a string as the number.
    """
    value = values[name]
    if not maximum or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise reject_value(
            f"{name}: expected an integer from 0 to {maximum}, found {repr(value)[:50]}; lower it"
        )


def check_flags(values: Mapping[str, Any]) -> None:
    """Raise RequestRejected for flags that are neither true nor false, and for `background`.

    An engine might take 1 or "yes" for true: the gateway would wait for a whole response, and the
    engine would send a stream. A background request leaves its slot while the engine works on it.
    """
    for name in _FLAGS:
        value = values[name]
        if value is not None and not isinstance(value, bool):
            raise reject_value(f"{name}: expected true or false, found {repr(value)[:50]}")
    if values["background"]:
        raise reject_value("background: expected false, found true; wait for the response")


def count_turns(
    path: str,
    text: bytes,
    scanned: ScannedObject,
    values: Mapping[str, Any],
    key: ApiKey,
    limits: Limits,
) -> int:
    """Return the sequences that a request makes the engine generate: prompts x choices.

    Raises RequestRejected if there are more than the gateway or the key allows at all.
    """
    prompts = 0
    for name in PROMPTS.get(path, ()):
        member = scanned.members.get(name.encode())
        if member and text[member.value : member.value + 1] == b"[":
            prompts += member.n_texts
    prompts = max(1, prompts)  # a text or a list of token ids
    if prompts > limits.max_prompts:
        raise reject_value(
            f"prompts: expected at most {limits.max_prompts}, found {prompts}; send them apart"
        )
    turns = prompts * max(1, *(values[name] or 1 for name in _CHOICES))
    allowed = key.most or limits.per_key
    if allowed and turns > allowed:
        raise reject_value(
            f"prompts x choices: expected at most {allowed} for this key, found {turns}; "
            "send them apart"
        )
    return turns


def check_priority(value: Any) -> int | None:
    """Return the priority in a body (as in vLLM); None without, RequestRejected if invalid."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise reject_value(
            f"priority: expected 0 (first) to {PRIORITY_LEVELS - 1}, found {repr(value)[:50]}"
        )
    return value


def parse_priority(headers: Mapping[bytes, bytes], sent: int | None) -> int | None:
    """Return the priority of the X-Priority header or of the body; None without."""
    text = headers.get(b"x-priority", b"").decode("latin-1").strip()
    if text:
        sent = check_priority(int(text) if _NUMBER.fullmatch(text) else text)
    return None if sent is None else min(max(sent, 0), PRIORITY_LEVELS - 1)


def parse_timeout(headers: Mapping[bytes, bytes], deadline: float) -> float:
    """Return the seconds of the X-Request-Timeout header, at most `deadline`."""
    header = headers.get(b"x-request-timeout")
    if header is None:
        return deadline
    text = header.decode("latin-1")
    try:
        timeout = float(text)
    except ValueError:
        timeout = -1.0
    if not timeout > 0:
        raise reject_value(f"X-Request-Timeout: expected seconds, found {text[:50]!r}")
    return min(timeout, deadline)
