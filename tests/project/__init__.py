"""The repository itself: README, pages, docstrings, types, and the tests' own tools."""
