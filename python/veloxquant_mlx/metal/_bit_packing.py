"""Codes of 1 to 8 bits in 32-bit words, 32 // bits codes a word, least significant bits first.

    packed = turboquant_bit_pack(indices, bits=3)                             uint32, along the last axis
    turboquant_bit_unpack(packed, bits=3, original_length=indices.shape[-1])  int32

The published forms, told apart by b= or by three positional arguments, pack bytes and flatten:

    turboquant_bit_pack(indices, b=2) -> uint8 [N * b / 8]      turboquant_bit_unpack(packed, N, b) -> uint8 [N]
"""

from veloxquant_mlx import _ext


def turboquant_bit_pack(indices, bits=None, *, b=None):
    """indices: integers [..., n], each masked to `bits` bits (default 1) -> uint32 [..., ceil(n / (32 // bits))].
    A ragged end is filled with zeros."""
    if b is not None:
        if bits is not None:
            raise ValueError("[turboquant_bit_pack] bits: got b as well, wanted one of them")
        return _ext.pack_bytes(indices, b)
    return _ext.pack_words(indices, 1 if bits is None else bits)


def turboquant_bit_unpack(packed, *args, bits=None, original_length=None, N=None, b=None):  # noqa: N803
    """packed: uint32 [..., words] -> int32 [..., original_length] (default: all that the words hold)."""
    name = "turboquant_bit_unpack"
    if len(args) > 2:
        raise TypeError(f"{name}() takes at most 3 positional arguments")
    if len(args) == 2 or b is not None or N is not None:
        length, width = (args + (None, None))[:2]
        length, width = (N if length is None else length), (b if width is None else width)
        if length is None or width is None or bits is not None or original_length is not None:
            raise ValueError(f"[{name}] arguments: got a mixture, wanted (packed, N, b) or bits= and original_length=")
        return _ext.unpack_bytes(packed, length, width)
    if args and bits is not None:
        raise ValueError(f"[{name}] bits: got it twice, wanted it once")
    bits = args[0] if args else 1 if bits is None else bits
    if original_length is None:
        if bits not in range(1, 9):
            raise ValueError(f"[{name}] bits: got {bits!r}, wanted 1 to 8")
        original_length = packed.shape[-1] * (32 // bits)
    return _ext.unpack_words(packed, bits, original_length)
