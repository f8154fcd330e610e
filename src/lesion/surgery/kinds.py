"""The words of `layers.kind` and `layers.by`; what they mean is in `anatomy`, which imports torch."""

KINDS = (
    "cross_attention",
    "self_attention",
    "joint_attention",
    "text_to_image",
    "feed_forward",
    "block",
)
GRANULARITIES = ("attention", "transformer_block", "block", "stage", "head")
WITH_HEADS = ("cross_attention", "self_attention", "joint_attention")  # kinds that `by=head` can take apart
