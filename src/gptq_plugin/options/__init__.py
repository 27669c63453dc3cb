"""What the value of an option may be: kinds of values, regular expressions that a stranger wrote, and files.

Imports nothing of this package.
"""
