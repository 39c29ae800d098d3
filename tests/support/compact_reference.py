"""Decoders of the formats compact and sampled, from FORMAT.md §4 and §5 alone: slow, and trusting that the bytes are
valid."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

ESCAPE = 63
NEXT = [[0, 2], [2, 0], [1, 3], [3, 1]]


class Bits:
    """Bits from the lowest of each byte upwards."""

    def __init__(self, data: bytes) -> None:
        self.number = int.from_bytes(data, "little")
        self.read = 0

    def take(self, count: int) -> int:
        value = (self.number >> self.read) & ((1 << count) - 1)
        self.read += count
        return value


def _bucket(x: int) -> int:
    if x < 2:
        return x
    octave = x.bit_length() - 1
    return 2 * octave + (x >= 3 << (octave - 1) if octave else 0)


def _symbol(symbol: int, part_bits: int) -> tuple[int, int]:
    """The first number of a symbol, and its extra bits."""
    if symbol == ESCAPE:
        return 0, 24
    if symbol < 16:
        return symbol, 0
    octave, part = divmod(symbol - 16, 1 << part_bits)
    octave += 4
    return (1 << octave) + (part << (octave - part_bits)), octave - part_bits


class Table:
    """A code table: for each state the symbol, its bits and its base."""

    def __init__(self, frequencies: list[int]) -> None:
        symbols = [0] * 256
        slot = 0
        for symbol, frequency in enumerate(frequencies):
            for _ in range(frequency):
                symbols[slot] = symbol
                slot = (slot + 163) % 256
        numbers = list(frequencies)
        self.slots = []
        for symbol in symbols:
            y = numbers[symbol]
            numbers[symbol] += 1
            bits = 8 - (y.bit_length() - 1)
            self.slots.append((symbol, bits, (y << bits) - 256))


class Stream:
    """A stream of numbers."""

    def __init__(self, data: bytes) -> None:
        self.bits = Bits(data)
        self.state = self.bits.take(8)

    def number(self, table: Table, part_bits: int = 2) -> int:
        symbol, bits, base = table.slots[self.state]
        self.state = base + self.bits.take(bits)
        first, extra = _symbol(symbol, part_bits)
        return first + self.bits.take(extra)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read = 0

    def take(self, count: int) -> bytes:
        self.read += count
        return self.data[self.read - count : self.read]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def entries(self, length: int) -> list[int]:
        entries: list[int] = []
        while len(entries) < length:
            start = len(entries)
            low = self.number(1)
            bits = Bits(self.data[self.read :])
            following = 0
            while len(entries) < length and _bucket(len(entries) + 16) == _bucket(start + 16):
                high = 0
                while not bits.take(1):
                    high += 1
                following += (high << low) + bits.take(low)
                entries.append(following)
                following += 1
            self.take(-(-bits.read // 8))
        return entries

    def clusters(self, vocab: int) -> list[tuple[int, int, list[int]]]:
        """Of each cluster its two classes, and all ids by position."""
        order = self.entries(self.number(4))
        order += sorted(set(range(vocab)) - set(order))
        clusters = []
        for _ in range(self.number(2)):
            classes = self.number(1), self.number(1)
            ids = [order[place] for place in self.entries(self.number(2))]
            listed = set(ids)
            clusters.append((*classes, ids + [id for id in order if id not in listed]))
        return clusters

    def maps(self, count: int) -> list[list[int]]:
        return [[self.number(2) for _ in range(self.number(4))] for _ in range(count)]

    def tables(self) -> list[Table]:
        tables = []
        for _ in range(self.number(2)):
            frequencies = [self.number(2) for _ in range(self.number(1))]
            frequencies += [0] * (ESCAPE - len(frequencies))
            tables.append(Table([*frequencies, 256 - sum(frequencies)]))
        return tables


class Prior:
    """A prior, read."""

    def __init__(self, data: bytes) -> None:
        read = _Bytes(data)
        if read.take(8) != b"DKPRIOR1":
            raise ValueError("not a prior")
        self.config: dict[str, Any] = json.loads(read.take(read.number(4)))
        self.clusters = read.clusters(self.config["vocab_size"])
        count = read.number(2)
        self.levels = np.frombuffer(read.take(4 * count), "<f4")
        self.maps = read.maps(6)
        self.tables = read.tables()


def decode_compact(
    prior_bytes: bytes, document: bytes, rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids and log-probabilities, (rows, k), of a document that was written with a prior."""
    prior = Prior(prior_bytes)
    config = prior.config
    k, vocab = config["k"], config["vocab_size"]
    adaptive = config["threshold"] is not None or config["mass"] is not None
    cluster_map, shape_map, count_map, mass_map, gap_map, level_map = prior.maps
    positions_size, left_size = _bucket(vocab) + 1, _bucket(k) + 1

    if int.from_bytes(document[:4], "little") != xxhash.xxh3_64_intdigest(document[4:]) % 2**32:
        raise ValueError("not the checksum of the document")
    frame = _Bytes(document)
    frame.take(4)
    if frame.number(1) != 0 or frame.varint() != rows:
        raise ValueError("not a document of so many rows")
    lanes = 1 if rows < 32 else 4 if rows < 128 else 16
    lengths = [frame.varint() for _ in range(2 * lanes)]
    head = Stream(frame.take(lengths[0]))
    streams = [Stream(frame.take(length)) for length in lengths[1:]]
    streams.append(Stream(document[frame.read :]))

    heads = []
    for _ in range(rows):
        cluster = head.number(prior.tables[cluster_map[0]])
        shape = head.number(prior.tables[shape_map[prior.clusters[cluster][1]]])
        number = head.number(prior.tables[count_map[shape]])
        q = head.number(prior.tables[mass_map[shape]])
        heads.append((cluster, shape, number + 1 if adaptive else k - number, q))

    ids = np.zeros((rows, k), np.int64)
    logprobs = np.full((rows, k), -np.inf)
    dealt = sorted(range(rows), key=lambda row: (-heads[row][2], heads[row][1], row))
    for place, row in enumerate(dealt):
        ids_stream, values_stream = streams[place % lanes], streams[lanes + place % lanes]
        cluster, shape, count, q = heads[row]
        gap_class, _, order = prior.clusters[cluster]
        after, positions = 0, []
        for left in range(count, 0, -1):
            context = (gap_class * positions_size + _bucket(after)) * left_size + _bucket(left)
            positions.append(after + ids_stream.number(prior.tables[gap_map[context]], 1))
            after = positions[-1] + 1
        state, levels = 0, []
        for position in positions:
            half = state // 2
            context = (shape * 2 + half) * positions_size + _bucket(position + 1)
            number = values_stream.number(prior.tables[level_map[context]])
            levels.append(2 * number + half)
            state = NEXT[state][number % 2]
        near = sum(level >= max(levels) - 3 for level in levels)
        top = values_stream.bits.take((near - 1).bit_length()) if near > 1 else 0
        ranked = sorted(range(count), key=lambda i: (-levels[i], i))
        values = np.array([prior.levels[levels[i]] for i in ranked], np.float64)
        total = sum(max(1, round(2**48 * math.exp(value))) for value in values)
        stored = math.cos(math.pi * q / 768) ** 2
        shift = math.log(stored) + math.log(2**48) - math.log(total)
        ranked.insert(0, ranked.pop(top))
        ids[row] = order[positions[ranked[0]]]
        ids[row, :count] = [order[positions[i]] for i in ranked]
        logprobs[row, :count] = np.minimum(0, values + shift)
    if any(stream.state for stream in [head, *streams]):
        raise ValueError("a stream does not end in state 0")
    return ids, logprobs


class SampledPrior:
    """A prior of the format sampled, read."""

    def __init__(self, data: bytes) -> None:
        read = _Bytes(data)
        if read.take(8) != b"DKDRAWS1":
            raise ValueError("not a prior of draws")
        self.config: dict[str, Any] = json.loads(read.take(read.number(4)))
        self.clusters = read.clusters(self.config["vocab_size"])
        self.maps = read.maps(4)
        self.tables = read.tables()


def decode_sampled(
    prior_bytes: bytes, document: bytes, rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and counts of draws, (rows, k), of a document that was written with a prior (FORMAT.md §5)."""
    prior = SampledPrior(prior_bytes)
    draws, vocab = prior.config["draws"], prior.config["vocab_size"]
    k = min(draws, vocab)
    cluster_map, count_map, gap_map, excess_map = prior.maps
    positions_size, left_size = _bucket(vocab) + 1, _bucket(k) + 1
    if int.from_bytes(document[:4], "little") != xxhash.xxh3_64_intdigest(document[4:]) % 2**32:
        raise ValueError("not the checksum of the document")
    frame = _Bytes(document)
    frame.take(4)
    if frame.number(1) != 2 or frame.varint() != rows:
        raise ValueError("not a document of so many rows")
    stream = Stream(document[frame.read :])
    ids, counts = np.zeros((rows, k), np.int64), np.zeros((rows, k), np.int64)
    for row in range(rows):
        cluster = stream.number(prior.tables[cluster_map[0]])
        gap_class, count_class, order = prior.clusters[cluster]
        count = 1 + stream.number(prior.tables[count_map[count_class]])
        after, positions = 0, []
        for left in range(count, 0, -1):
            context = (gap_class * positions_size + _bucket(after)) * left_size + _bucket(left)
            positions.append(after + stream.number(prior.tables[gap_map[context]], 1))
            after = positions[-1] + 1
        beyond, drawn = draws - count, []
        for left, position in zip(range(count, 0, -1), positions, strict=True):
            more = beyond
            if beyond and left > 1:
                place = (_bucket(beyond) * left_size + _bucket(left)) * 16 + min(_bucket(position + 1), 15)
                more = stream.number(prior.tables[excess_map[place]])
            drawn.append(1 + more)
            beyond -= more
        ranked = sorted(range(count), key=lambda i: (-drawn[i], order[positions[i]]))
        ids[row] = order[positions[ranked[0]]]
        ids[row, :count] = [order[positions[i]] for i in ranked]
        counts[row, :count] = [drawn[i] for i in ranked]
    if stream.state:
        raise ValueError("the stream does not end in state 0")
    return ids, counts
