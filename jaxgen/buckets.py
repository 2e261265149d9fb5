"""The few sizes that programs are compiled for, so that calls of similar sizes share programs."""


def bucket(size: int) -> int:
    """`size` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most 1.5 times as much."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def row_bucket(shards: int, rows: int) -> int:
    """`rows` rounded up, so that each of the devices that rows are sharded over has a bucket of them."""
    return bucket(-(-rows // shards)) * shards
