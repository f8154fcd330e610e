"""Has each of two objects its own colour and shape? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadBinding(Read):
    aspect = "binding"
