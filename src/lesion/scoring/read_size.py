"""Do all objects have the size that the caption asks for? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadSize(Read):
    aspect = "size"
