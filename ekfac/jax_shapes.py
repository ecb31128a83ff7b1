"""The few shapes that batches of a JAX model are padded to, because every shape is compiled once."""


def padded_sequences(count: int, multiple_of: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …, and from there the next multiple."""
    power: int = 1 << max(0, count - 1).bit_length()
    found = power * 3 // 4 if count <= power * 3 // 4 and power >= 4 else power
    return -(-found // multiple_of) * multiple_of


def padded_positions(count: int, longest: int | None = None) -> int:
    """The next of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, …: four steps from a power of two to the next; not beyond what a model knows."""
    step: int = max(8, 1 << max(0, count.bit_length() - 3))
    found = -(-count // step) * step
    return max(count, min(found, longest or found))
