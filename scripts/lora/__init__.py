"""The parts of `scripts/train_lora.py`: captioned images, the training itself, and a demonstration on toy scenes."""
