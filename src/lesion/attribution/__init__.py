"""Estimates of many lesions' effects from gradients of few images (docs/attribution.md)."""
