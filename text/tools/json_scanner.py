"""JSON that arrives in pieces: how far a text is one valid value, without waiting for its end."""

from __future__ import annotations

import re

_SPACE = " \t\n\r"
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_START = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?)?")
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_WORDS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_NUMBER = 320
"""Characters; more than any double has, and readers refuse much longer ones."""

# What may come next: a value, a value or the end of an array that has just begun, a key, a key or the end of an object,
# a colon, a comma or an end, the rest of a string, of a number, of a word.
_VALUE, _FIRST, _KEY, _FIRST_KEY, _COLON, _NEXT, _STRING, _NUMBER_REST, _WORD_REST = range(9)


class JsonScanner:
    """Takes one value, strictly by the standard. `done` once it is complete, `failed` at what cannot belong to it."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._state = _VALUE
        self._closers: list[str] = []
        self._token = ""
        """What there is of a number or a word, or of an escape in a string."""
        self._in_key = False

    def scan(self, text: str, start: int) -> int:
        """Where the part of `text` from `start` that belongs to the value ends."""
        at = start
        while at < len(text) and not self.done:
            if self._state == _STRING:
                taken = self._string(text, at)
            elif self._state == _NUMBER_REST and text[at] not in _NUMBER_CHARACTERS:
                # The number has ended before this character.
                self.failed = _NUMBER.fullmatch(self._token) is None
                self._value_ended()
                taken = 0
            else:
                taken = int(self._character(text[at]))
                self.failed = not taken
            at += taken
            if self.failed:
                break
        return at

    def _character(self, char: str) -> bool:
        state = self._state
        if state == _NUMBER_REST:
            self._token += char
            return len(self._token) <= _MAX_NUMBER and _NUMBER_START.fullmatch(self._token) is not None
        if state == _WORD_REST:
            self._token += char
            if self._token in _WORDS:
                self._value_ended()
                return True
            return any(word.startswith(self._token) for word in _WORDS)
        if char in _SPACE:
            return True
        if state in (_KEY, _FIRST_KEY):
            if char == "}" and state == _FIRST_KEY:
                return self._close(char)
            self._state, self._in_key = _STRING, True
            return char == '"'
        if state == _COLON:
            self._state = _VALUE
            return char == ":"
        if state == _NEXT:
            if char == ",":
                self._state = _KEY if self._closers[-1] == "}" else _VALUE
                return True
            return self._close(char)
        if char == "]" and state == _FIRST:
            return self._close(char)
        return self._begin(char)

    def _begin(self, char: str) -> bool:
        if char == '"':
            self._state, self._in_key = _STRING, False
        elif char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._state = _FIRST_KEY if char == "{" else _FIRST
        elif char in "-0123456789":
            self._state, self._token = _NUMBER_REST, char
        elif char in "tfn":
            self._state, self._token = _WORD_REST, char
        else:
            return False
        return True

    def _close(self, char: str) -> bool:
        if char != self._closers[-1]:
            return False
        self._closers.pop()
        self._value_ended()
        return True

    def _value_ended(self) -> None:
        self._token = ""
        self._state = _NEXT
        self.done = not self._closers

    def _string(self, text: str, at: int) -> int:
        """Takes a run of plain characters, or one that is special."""
        char = text[at]
        if self._token:
            self._token += char
            if len(self._token) == 2:
                self.failed = char not in '"\\/bfnrtu'
            else:
                self.failed = char not in _HEX
            if self._token[1] != "u" or len(self._token) == 6:
                self._token = ""
            return int(not self.failed)
        if char == '"':
            if self._in_key:
                self._state = _COLON
            else:
                self._value_ended()
            return 1
        if char == "\\":
            self._token = char
            return 1
        run = _STRING_RUN.match(text, at)
        assert run is not None
        self.failed = run.end() == at
        return run.end() - at
