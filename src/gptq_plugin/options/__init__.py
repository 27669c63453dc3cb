"""What the value of an option may be: kinds of values, and regular expressions that a stranger wrote.

Imports nothing of this package.
"""
