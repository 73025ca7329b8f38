"""The embedded world: scenes drawn on demand, with captions, questions and statements about them."""
