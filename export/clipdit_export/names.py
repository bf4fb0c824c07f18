"""How sizes and loops are written in a bundle."""

from clipdit.sampling import SamplingTable


def name_of(size: tuple[int, int]) -> str:
    """(height, width) -> "128x128", height first, as in the manifest."""
    return f"{size[0]}x{size[1]}"


def size_of(name: str) -> tuple[int, int]:
    """The inverse of `name_of`."""
    height, width = name.split("x")
    return int(height), int(width)


def loop_name(table: SamplingTable, guidance: float) -> str:
    """Of the part that holds this loop: loop_euler4_1.5."""
    return f"loop_{table.solver}{table.steps}_{guidance:g}"
