"""The state of a stream of server-sent events: between events or within one, ended or not.

https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end by CR, LF or both; an
empty line ends an event; its data are the values of its lines "data: ...".
"""

from __future__ import annotations

END_MARK = b"[DONE]"
"""Data of the event that ends a stream of OpenAI's API."""
_FIELD = b"data:"
_KEPT_BYTES = 32  # of an incomplete line: longer ones are no end mark


class EventStream:
    """Follows the pieces of a stream, however they are cut. Mutable."""

    def __init__(self) -> None:
        self.is_ended = False  # the event [DONE] is complete
        self.n_events = 0
        self._line = b""  # the start of the incomplete line
        self._has_lines = False  # of the incomplete event
        self._is_after_return = False  # the last byte was CR: an LF now belongs to it
        self._data = b""  # the last value of the incomplete event
        self._n_data = 0

    def is_between_events(self) -> bool:
        """Return whether an event or a comment may be inserted here."""
        return not self._line and not self._has_lines

    def may_end(self) -> bool:
        """Return whether the stream is complete if it ends here.

        It is after [DONE]; some servers leave out the empty line, or the end of the line.
        """
        last = [self._line.removeprefix(_FIELD).removeprefix(b" ")] if self._line else []
        incomplete = [self._data] * self._n_data + last
        return self.is_ended or incomplete == [END_MARK]

    def feed(self, piece: bytes) -> None:
        """Follow the next piece."""
        if self._is_after_return and piece.startswith(b"\n"):
            piece = piece[1:]
            self._is_after_return = False
        if not piece:
            return
        self._is_after_return = piece.endswith(b"\r")
        lines = (self._line + piece).splitlines(keepends=True)
        self._line = b""
        if not lines[-1].endswith((b"\r", b"\n")):
            self._line = lines.pop()[:_KEPT_BYTES]
        for line in lines:
            self._end_line(line.rstrip(b"\r\n"))

    def _end_line(self, line: bytes) -> None:
        if line:
            self._has_lines = True
            if line.startswith(_FIELD):
                self._n_data += 1
                self._data = line.removeprefix(_FIELD).removeprefix(b" ")
            return
        if self._n_data:
            self.n_events += 1
            self.is_ended = self.is_ended or (self._n_data == 1 and self._data == END_MARK)
        self._has_lines, self._n_data, self._data = False, 0, b""
