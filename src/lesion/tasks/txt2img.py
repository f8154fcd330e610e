"""Images of text alone."""

from __future__ import annotations

from lesion.tasks import Task

TASK = Task()
