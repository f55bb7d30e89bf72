"""One module for each library: how it puts, gets, and creates rows.

Every function here is a context manager which opens what the library needs and gives the `Act`
that is timed. A module is imported in the child that runs it, so the others may be missing.
"""
