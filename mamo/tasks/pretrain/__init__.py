"""MAMO pre-training, which fine-tunes retrieval too."""
