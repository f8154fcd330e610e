"""Has the background the colour that the caption asks for? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadBackground(Read):
    aspect = "background"
