"""Compress sparse rows into the zlib stream of their dense form, without making the dense form.

Dense counts are nearly all zero bytes. A general compressor looks at every one of them; here, a run of zeros costs the
same whatever its length, so that packing takes time by non-zeros. The stream holds the non-zero bytes as literals and
the runs as a zero and copies of the byte before, in one block with its own Huffman codes.

Source of the format: RFC 1950 (zlib) and RFC 1951 (DEFLATE). Oracle: zlib, in ``tests/unit/kernels/test_deflate.py``.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

_ADLER = 65521
_END = 256  # the symbol that ends a block
_N_SYMBOLS = 286
_LONGEST = 258  # bytes of one copy
_MOST_BITS = 15
_FULL = 1 << 60  # a sum that is reduced before it overflows


def get_most_bytes(n_full: int, n_bytes: int) -> int:
    """Return a size that the stream of ``n_bytes`` bytes, at most ``n_full`` of them not zero, never exceeds.

    Each of these is a literal of at most 15 bits; the run before it has at most three literals and three copies of 21
    bits beside those of 258 bytes.
    """
    return (n_full + 1) * 16 + n_bytes // 80 + 1024


def get_most_tokens(n_full: int, n_bytes: int) -> int:
    """Return the number of tokens that ``n_bytes`` bytes, at most ``n_full`` of them not zero, never exceed."""
    return (n_full + 1) * 6 + n_bytes // 250


@kernel()
def deflate_rows(indptr, indices, data, n_genes, n_rows, itemsize, tokens, out):
    """Write CSR rows as the zlib stream of a dense, little-endian (n_rows, n_genes) block; return its bytes.

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,) sorted and distinct in each row, (nnz,) integers: checked rows; the rows from b to
        ``n_rows`` are zero.
    n_genes, n_rows, itemsize
        The shape of the block, and the bytes of one of its values, which must be able to hold the data.
    tokens
        (:func:`get_most_tokens`,) int16 scratch.
    out
        (:func:`get_most_bytes`,) uint8 output.

    Examples
    --------
    >>> import zlib
    >>> out, tokens = np.empty(get_most_bytes(2, 12), np.uint8), np.empty(get_most_tokens(2, 12), np.int16)
    >>> row = np.array([0, 1]), np.array([4], np.int32), np.array([7], np.int32)
    >>> n = deflate_rows(*row, 6, 1, 2, tokens, out)
    >>> np.frombuffer(zlib.decompress(out[:n].tobytes()), np.int16).tolist()
    [0, 0, 0, 0, 7, 0]
    """
    frequency = np.zeros(_N_SYMBOLS, np.int64)
    symbol = np.empty(_LONGEST + 1, np.int64)
    extra = np.empty(_LONGEST + 1, np.int64)
    for length in range(3, _LONGEST + 1):
        symbol[length], extra[length] = _name_length(length)
    n_tokens, check = _tokenise(indptr, indices, data, n_genes, n_rows, itemsize, symbol, tokens, frequency)
    frequency[_END] = 1
    lengths = _choose_lengths(frequency, _MOST_BITS)
    codes = _assign_codes(lengths)
    out[0], out[1] = 0x78, 0x5E
    stream = np.zeros(3, np.int64)  # bytes written, bits that wait, their number
    stream[0] = 2
    _put(1 | 2 << 1, 3, stream, out)  # the last block, with its own codes
    _put_header(lengths, stream, out)
    o, waiting, n_waiting = stream[0], stream[1], stream[2]  # in registers
    for k in range(n_tokens):
        token = np.int64(tokens[k])
        if token < _END:
            waiting |= codes[token] << n_waiting
            n_waiting += lengths[token]
        else:
            length = token - _END
            s = symbol[length]
            n = extra[length]
            waiting |= (codes[s] | ((length - 3) & ((1 << n) - 1)) << lengths[s]) << n_waiting
            n_waiting += lengths[s] + n + 1  # and the only distance, whose code is one zero bit
        o, waiting, n_waiting = _flush(o, waiting, n_waiting, out)
    stream[0], stream[1], stream[2] = o, waiting, n_waiting
    _put(codes[_END], lengths[_END], stream, out)
    _put(0, -stream[2] % 8, stream, out)
    o = stream[0]
    for k in range(4):
        out[o + k] = (check >> (24 - 8 * k)) & 255
    return o + 4


@kernel(inline=True)
def _put(word, n_bits, stream, out):
    """Append ``n_bits`` (at most 48) to the stream, the lowest first."""
    waiting = stream[1] | word << stream[2]
    stream[0], stream[1], stream[2] = _flush(stream[0], waiting, stream[2] + n_bits, out)


@kernel(inline=True)
def _flush(o, waiting, n_waiting, out):
    """Write all whole bytes that wait; return the position, and the bits that remain with their number."""
    while n_waiting >= 8:
        out[o] = waiting & 255
        waiting >>= 8
        n_waiting -= 8
        o += 1
    return o, waiting, n_waiting


@kernel(inline=True)
def _name_length(length):
    """Return (symbol, extra bits) of the length of a copy (RFC 1951, 3.2.5)."""
    if length == _LONGEST:
        return 285, 0
    x = length - 3
    n = 0
    while x >> (n + 3) > 0:
        n += 1
    return 257 + 4 * n + (x >> n), n


@kernel(inline=True)
def _put_zeros(run, symbol, tokens, t, frequency):
    """Append a run of zeros that follows another byte; return the number of tokens."""
    tokens[t] = 0
    t += 1
    left = run - 1
    n_literals = 1
    while left >= 3:
        length = min(left, _LONGEST)
        if 0 < left - length < 3:  # the rest would be too short to be copied
            length -= 3
        tokens[t] = _END + length
        t += 1
        left -= length
        frequency[symbol[length]] += 1
    while left > 0:
        tokens[t] = 0
        t += 1
        left -= 1
        n_literals += 1
    frequency[0] += n_literals
    return t


@kernel()
def _tokenise(indptr, indices, data, n_genes, n_rows, itemsize, symbol, tokens, frequency):
    """Return (number of tokens, Adler-32); a token is a byte, or 256 + the length of a copy."""
    t = 0
    at = np.int64(0)  # bytes of the block so far
    a = np.int64(1)
    b = np.int64(0)
    for i in range(len(indptr) - 1):
        for j in range(indptr[i], indptr[i + 1]):
            start = (i * n_genes + np.int64(indices[j])) * itemsize
            v = np.int64(data[j])
            for k in range(itemsize):
                byte = (v >> (8 * k)) & 255
                if byte == 0:
                    continue
                run = start + k - at
                if run > 0:
                    t = _put_zeros(run, symbol, tokens, t, frequency)
                    b += a * run
                tokens[t] = byte
                t += 1
                frequency[byte] += 1
                a += byte
                if a >= _ADLER:
                    a -= _ADLER
                b += a
                if b >= _FULL:
                    b %= _ADLER
                at = start + k + 1
    run = n_rows * n_genes * itemsize - at
    if run > 0:
        t = _put_zeros(run, symbol, tokens, t, frequency)
        b += a * run
    return t, (b % _ADLER) << 16 | a


@kernel()
def _choose_lengths(frequency, most):
    """Return the code length of each symbol, 0 if it does not occur: Huffman's, of at most ``most`` bits.

    At least two symbols must occur.
    """
    order = np.argsort(frequency, kind="mergesort")
    order = order[np.searchsorted(frequency[order], 1) :]
    n = len(order)
    weight = np.empty(2 * n - 1, np.int64)
    parent = np.zeros(2 * n - 1, np.int64)
    for k in range(n):
        weight[k] = frequency[order[k]]
    leaf = 0
    node = n
    for new in range(n, 2 * n - 1):  # both the leaves and the nodes are in rising order
        total = np.int64(0)
        for _ in range(2):
            if leaf < n and (node >= new or weight[leaf] <= weight[node]):
                least = leaf
                leaf += 1
            else:
                least = node
                node += 1
            total += weight[least]
            parent[least] = new
        weight[new] = total
    depth = np.zeros(2 * n - 1, np.int64)
    n_of = np.zeros(most + 1, np.int64)
    for k in range(2 * n - 3, -1, -1):
        depth[k] = depth[parent[k]] + 1
        if k < n:
            n_of[min(depth[k], most)] += 1
    # codes that were cut to ``most`` bits claim too much of the code space: a shorter leaf becomes a node for two
    total = np.int64(0)
    for d in range(1, most + 1):
        total += n_of[d] << (most - d)
    while total > 1 << most:
        d = most - 1
        while n_of[d] == 0:
            d -= 1
        n_of[d] -= 1
        n_of[d + 1] += 2
        n_of[most] -= 1
        total -= 1
    lengths = np.zeros(len(frequency), np.int64)
    k = 0
    for d in range(most, 0, -1):  # the rarest symbols get the longest codes
        for _ in range(n_of[d]):
            lengths[order[k]] = d
            k += 1
    return lengths


@kernel()
def _assign_codes(lengths):
    """Return the canonical code of each symbol, its bits reversed because the stream starts with the highest."""
    n_of = np.zeros(_MOST_BITS + 1, np.int64)
    for n in lengths:
        n_of[n] += n > 0
    following = np.zeros(_MOST_BITS + 2, np.int64)
    for d in range(1, _MOST_BITS + 1):
        following[d + 1] = (following[d] + n_of[d]) << 1
    codes = np.zeros(len(lengths), np.int64)
    for s in range(len(lengths)):
        code = following[lengths[s]]
        following[lengths[s]] += 1
        for _ in range(lengths[s]):
            codes[s] = codes[s] << 1 | code & 1
            code >>= 1
    return codes


@kernel()
def _put_header(lengths, stream, out):
    """Append the code lengths, themselves in a Huffman code in which runs of zeros are short (RFC 1951, 3.2.7)."""
    n_symbols = _N_SYMBOLS
    while lengths[n_symbols - 1] == 0:
        n_symbols -= 1
    items = np.empty((n_symbols + 1, 2), np.int64)  # (symbol, length of a run of zeros)
    n = 0
    k = 0
    while k < n_symbols:
        run = 0
        while k + run < n_symbols and run < 138 and lengths[k + run] == 0:
            run += 1
        if run >= 3:
            items[n, 0], items[n, 1] = (18 if run >= 11 else 17), run
            k += run
        else:
            items[n, 0], items[n, 1] = lengths[k], 0
            k += 1
        n += 1
    items[n, 0], items[n, 1] = 1, 0  # the only distance code has one bit
    n += 1
    frequency = np.zeros(19, np.int64)
    for k in range(n):
        frequency[items[k, 0]] += 1
    own = _choose_lengths(frequency, 7)
    codes = _assign_codes(own)
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    n_own = 19
    while own[order[n_own - 1]] == 0:
        n_own -= 1
    _put((n_symbols - 257) | 0 << 5 | (n_own - 4) << 10, 14, stream, out)
    for k in range(n_own):
        _put(own[order[k]], 3, stream, out)
    for k in range(n):
        s = items[k, 0]
        _put(codes[s], own[s], stream, out)
        if s == 17:
            _put(items[k, 1] - 3, 3, stream, out)
        elif s == 18:
            _put(items[k, 1] - 11, 7, stream, out)
