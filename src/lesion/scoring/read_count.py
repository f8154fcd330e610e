"""Does an image show as many objects as its caption asks for? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadCount(Read):
    aspect = "count"
