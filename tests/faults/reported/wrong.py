"""What may lie where a command is given a path, and is not what it wants."""

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "garbage": b"\x89\xff\x00PAR1" * 50,
    "text": b"hello\n",
    "object.json": b'{"a": [1]}',
    "list.json": b"[1, 2]",
    "torn.json": b'{"a": [1',
}
