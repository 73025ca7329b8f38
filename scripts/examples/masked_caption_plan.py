"""A third reading of masking: patches are predicted with the masked caption, words with the whole image."""

from mamo.tasks.pretrain.views import FusedPass

PLAN = (
    FusedPass("visible", "masked", patches="fused_patches"),
    FusedPass("whole", "masked", words="fused_words"),
)
