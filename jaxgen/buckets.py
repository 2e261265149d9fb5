"""Sizes that programs are compiled for: few of them, so that calls of other sizes share their programs."""


def bucket(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`: at most half as much again."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def row_bucket(shards: int, rows: int) -> int:
    """The rows of a program for so many rows: a bucket on each of the devices that they are sharded over."""
    return bucket(-(-rows // shards)) * shards
