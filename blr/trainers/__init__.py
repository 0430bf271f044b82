"""Callbacks for trainers: each in its own module, which is imported only by those who use it."""
