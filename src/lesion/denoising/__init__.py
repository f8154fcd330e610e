"""One denoising run as an object with events, and the tool it uses to take part in a pipeline's call."""
