"""The embedded world: synthetic scenes rendered on demand, with captions, questions and statements."""
