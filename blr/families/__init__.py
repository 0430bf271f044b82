"""The families: every posterior of the book, one file per kind."""
