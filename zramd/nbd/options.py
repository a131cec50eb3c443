"""The data of options that have any: parsing, and the refusals that are their client's fault."""

from zramd.nbd.protocol import MAX_STRING, U16, U32, OptionReply

MAX_QUERIES = 1024
"""Metadata contexts that a client asks for at once."""


class RefusedError(Exception):
    """An option that is answered with an error; the handshake goes on."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


def _invalid(text: str) -> RefusedError:
    return RefusedError(OptionReply.ERR_INVALID, text)


class _Cursor:
    """Reads the parts of an option one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _take(self, length: int) -> bytes:
        if length > self.left():
            raise _invalid("a part of the option is longer than the option")
        self._position += length
        return self._data[self._position - length : self._position]

    def u16(self) -> int:
        return int.from_bytes(self._take(U16.size))

    def u32(self) -> int:
        return int.from_bytes(self._take(U32.size))

    def string(self, limit: int) -> str:
        """Take a length and a string of at most `limit` bytes."""
        length = self.u32()
        return decode(self._take(length), limit)

    def left(self) -> int:
        return len(self._data) - self._position

    def end(self) -> None:
        if self.left():
            raise _invalid("the option is longer than its parts")


def decode(data: bytes, limit: int) -> str:
    """Return a string of at most `limit` bytes.

    Raises:
        RefusedError: it is longer, or no UTF-8, or has a NUL in it.
    """
    if len(data) > limit:
        raise _invalid(f"a string is longer than {limit} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _invalid("a string is not UTF-8") from error
    if "\0" in text:
        raise _invalid("a string has a NUL in it")
    return text


def require_empty(data: bytes) -> None:
    """Check that an option that takes no data has none.

    Raises:
        RefusedError: it has.
    """
    if data:
        raise _invalid("the option takes no data")


def parse_info(data: bytes, name_limit: int) -> tuple[str, set[int]]:
    """Return the name of the export and the information types in the data of INFO or GO.

    Raises:
        RefusedError: the data contradict themselves.
    """
    cursor = _Cursor(data)
    name = cursor.string(name_limit)
    wanted = {cursor.u16() for _ in range(cursor.u16())}
    cursor.end()
    return name, wanted


def parse_meta_context(data: bytes, name_limit: int) -> tuple[str, list[str]]:
    """Return the name of the export and the queries in the data of LIST_META_CONTEXT or SET_META_CONTEXT.

    Raises:
        RefusedError: the data contradict themselves, or there are too many queries.
    """
    cursor = _Cursor(data)
    name = cursor.string(name_limit)
    count = cursor.u32()
    if MAX_QUERIES < count <= cursor.left() // U32.size:
        raise RefusedError(OptionReply.ERR_TOO_BIG, f"more than {MAX_QUERIES} queries")
    queries = [cursor.string(MAX_STRING) for _ in range(count)]
    cursor.end()
    return name, queries
