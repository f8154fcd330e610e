"""Do two objects stand to each other as the caption asks? Read from pixels by rule; values: see `_reader`."""

from lesion.scoring._reader import Read


class ReadRelation(Read):
    aspect = "relation"
