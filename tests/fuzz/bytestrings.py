"""Mutations of strings of bytes."""

from __future__ import annotations

from random import Random

MARKED = (0, 1, 31, 32, 127, 128, 159, 160, 254, 255)


def mutated(data: bytes, rng: Random) -> bytes:
    """Some bits, bytes or pieces changed, added, removed, moved or cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not out:
            break
        at = rng.randrange(len(out))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(MARKED)
            case 2:
                out[at] = rng.randrange(256)
            case 3:
                del out[at : at + rng.randint(1, 8)]
            case 4:
                out[at:at] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(rng.randint(1, 8)))
            case 5:
                other = rng.randrange(len(out))
                out[at : at + 4], out[other : other + 4] = out[other : other + 4], out[at : at + 4]
            case _:
                del out[at if rng.random() < 0.5 else len(out) :]
    return bytes(out)
