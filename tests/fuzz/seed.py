#!/usr/bin/env python3
"""Seeds for the fuzz targets, from the sessions recorded in tests/wire:  tests/fuzz/seed.py FOLDER

Writes FOLDER/wire, FOLDER/tcp, FOLDER/shm and FOLDER/store, an input per file. How an input is read is said in the
targets; the numbers below are theirs.
"""
import os
import struct
import sys

WIRE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "wire")
# The decoders of wire.c, in its order.
HELLO, MOVE, AGREE, BYE, FRAME, SHORT, MESSAGE, CALL, ERROR, INTRO, WORKER, STORE_HELLO, STORE, RECORDS, WRITERS = range(15)
BY_KIND = {1: HELLO, 2: MOVE, 3: MOVE, 4: AGREE, 5: MESSAGE, 9: BYE}
RAW, POLL = 1, 0                        # deeds of live.h and store.c


def tape(name):
    """[(direction, bytes)] of a recording."""
    with open(os.path.join(WIRE, name), "rb") as file:
        data = file.read()
    at, frames = 6, []
    while at < len(data):
        way, size = struct.unpack_from("<BI", data, at)
        at += 5
        frame = b""
        while len(frame) < size:
            piece, = struct.unpack_from("<I", data, at)
            n = piece & 0x7FFFFFFF
            if piece >> 31:
                frame += data[at + 4:at + 5] * n
                at += 5
            else:
                frame += data[at + 4:at + 4 + n]
                at += 4 + n
        frames.append((way, frame))
    return frames


def raw(data):
    """Deeds that say those bytes."""
    return b"".join(bytes([RAW, len(data[i:i + 127])]) + data[i:i + 127] for i in range(0, len(data), 127)) + bytes([POLL, 1])


def begin(role, end):
    """A live end after a good handshake; the third byte says whether a pipe is ordered."""
    return bytes([role | 8, end]) + (bytes(1) if role < 2 else b"")


def main():
    for target in "wire", "tcp", "shm", "store":
        os.makedirs(os.path.join(sys.argv[1], target), exist_ok=True)
    count = 0

    def put(target, data, name=None):
        nonlocal count
        count += 1
        with open(os.path.join(sys.argv[1], target, name or "seed-%d" % count), "wb") as file:
            file.write(data[:4096])

    sessions = [name for name in sorted(os.listdir(WIRE)) if name.endswith((".bin", ".frames"))]
    for name in sessions:
        frames = tape(name)
        for way, frame in frames:
            kind = frame[4]
            put("wire", bytes([FRAME]) + frame[:8])
            if kind in BY_KIND:
                put("wire", bytes([BY_KIND[kind]]) + frame[8:])
            if kind == 5 and len(frame) >= 24:
                put("wire", bytes([SHORT]) + frame[:24])
                metadata, = struct.unpack_from("<I", frame, 8)
                prefix = frame[24:24 + frame[17]]
                if len(prefix) >= 24 and prefix[0] in (3, 5) and frame[12:16] == bytes(4):
                    body = frame[24 + len(prefix):24 + len(prefix) + metadata]
                    put("wire", bytes([ERROR if prefix[0] == 3 else INTRO]) + body)
                if len(prefix) >= 24:
                    put("wire", bytes([CALL]) + prefix)
        for role, way in (0, 0), (1, 1):
            session = b"".join(raw(frame) for at, frame in frames if at == way)
            for target in "tcp", "shm":
                put(target, bytes([2 if role == 0 and name.startswith("agent") else role, 0]) + session)
    hello = b"TPRP\1\0\0\0" + bytes(32) + bytes(16) + bytes(8)
    for count in 16, 17, 32, 33:         # as many of a thing as may be, and one more
        put("wire", bytes([HELLO]) + hello + struct.pack("<I", count) + bytes(13 * count),
            "hello-of-%d" % count)
        put("wire", bytes([AGREE]) + struct.pack("<II", 1, count) + bytes(13 * count), "agree-of-%d" % count)
    for count in 8, 9:
        put("wire", bytes([WORKER]) + bytes(12) + b"\1\0\0\0w" + struct.pack("<I", count) + bytes(4 * count), "worker-of-%d" % count)
    for role in range(4):                # a good handshake, and one of each deed
        for target in "tcp", "shm":
            deeds = b"".join(bytes([deed, 17 * deed & 255, 3, 1, 9, 0, 4, 2]) for deed in range(30))
            put(target, begin(role, 31) + deeds)
    hear, poll, polite = bytes([14]), bytes([POLL, 1]), bytes([24, 12])
    talk = (poll + hear) * 5 + b"".join(bytes([22, deed, 1, 60, 3]) + poll + hear for deed in range(8))
    for end in 0, 31:                    # a pipe that moves to shared memory, as either end; then both talk
        put("tcp", bytes([1 | 4, end, 0]) + poll + hear + bytes([2, 1]) + poll + bytes([19, 1]) + polite + talk)
        put("tcp", bytes([0 | 4, end, 0, 2, 0]) + poll + hear + bytes([19, 1, 24, 96, 0]) + poll + polite + bytes([3, 0])
            + talk)
        for role in range(4):            # a call or message of each kind, each deed of the user's, bulk, credit
            for target in "tcp", "shm":
                said = b"".join(bytes([4, 2 * k, 3, 1, 40, 0, 10, 1, 200, 9, 0, 6, 5 * k, k, 0, 80]) + poll + hear +
                                bytes([25, 200, 10, k & 3, 1, 22, k]) for k in range(8))
                put(target, begin(role, end) + said + talk)
    for role in range(4):                # both talk, and the stranger takes and gives what is asked for; or nothing
        for manners in bytes([24, 12]), bytes([24, 4]):
            for target in "tcp", "shm":
                much = b"".join(bytes([22, 0, 8 * (k & 1) + k % 8, 200 + 7 * k, 0]) + poll + hear for k in range(8))
                put(target, begin(role, 0) + manners + much + bytes([28, 250, 29, 28, 41, 28, 250]) + talk + much)
    # What was checked is written over at a moment after; and a chunk that is longer than what it is for.
    for moment in range(16):
        put("shm", begin(0, 0) + bytes([22, 0, 2, 28, 0, 26, 1, 1 | 4 * moment, 9, 64]) + poll, "moment-%d" % moment)
    for target in "tcp", "shm":
        put(target, begin(0, 0) + bytes([22, 0, 2, 4, 16, 1, 1, 0, 5, 1, 60, 1]) + poll + hear + bytes([8, 0, 0, 200, 0]) + poll +
            hear, "chunk-too-long")
    # Calls to each method, with tensors within and by bulk; and replies and errors to calls, likewise.
    serve, answer = bytes([24, 12]), bytes([24, 12])
    for k in range(4):
        serve += bytes([6, 16, 32 * k | 1, 5 + k, 2, 0, 0, 10, 100, 100]) + poll + hear
        serve += bytes([6, 16, 32 * k | 1, 9 + k, 1, 1, 0, 10, 1, 200, 1]) + poll + hear + bytes([25, 255]) + poll + hear
        answer += bytes([22, 0, 4 * (k & 1), 60]) + poll + hear
        answer += (bytes([6, 16, 2, 1 + 2 * k, 2, 0, 0, 10, 100, 100]) if k < 2 else
                   bytes([6, 16, 2, 1 + 2 * k, 1, 1, 0, 10, 1, 200, 1]) + poll + hear + bytes([25, 255])) + poll + hear
        answer += bytes([22, 0, 0, 60]) + poll + hear + bytes([6, 2, 3, 3 + 2 * k, 16, 5, 3]) + poll
    for target in "tcp", "shm":
        for end in 0, 1, 31:
            put(target, begin(2, end) + serve + bytes([22, 2, 22, 3, 22, 6]))
            put(target, begin(3, end) + answer + bytes([22, 4, 22, 5, 22, 6, 22, 0, 64, 60, 0, 1]))
    for name in sorted(os.listdir(WIRE)):
        if name.endswith(".tape"):
            segments = tape(name)
            for way in 0, 1:
                stream = b"".join(data for at, data in segments if at & 1 == way)
                put("wire", bytes([STORE_HELLO]) + stream[:16])
                put("wire", bytes([STORE]) + stream[16:])
                put("store", bytes([way]) + raw(stream))
        if name.endswith(".file"):
            with open(os.path.join(WIRE, name), "rb") as file:
                data = file.read()
            put("wire", bytes([RECORDS, 1]) + data[8:])
            put("wire", bytes([RECORDS, 0]) + data[8:])
            put("store", bytes([2]) + bytes([7, 0, 15, 3, len(data[8:])]) + data[8:])
    for role in range(4):
        put("store", bytes([role | 8]) + b"".join(bytes([deed, 31 * deed & 255, 5, 1, 0, 2]) for deed in range(20)))


if __name__ == "__main__":
    main()
