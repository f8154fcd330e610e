"""Does an image show just the colours that its caption asks for? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadColour(Read):
    aspect = "colour"
