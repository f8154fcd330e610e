"""Frames in, frames out: what the results of a study say. No disk, no torch."""
