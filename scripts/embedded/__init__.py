"""The stages that train the embedded model; run by `scripts/train_embedded.py`."""
