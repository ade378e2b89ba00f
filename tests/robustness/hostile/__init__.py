"""Inputs that somebody made to do harm, or that a disk damaged, at every door of the tool.

`doors` makes them and brings them to the tool, `watch` sees what a case may not do, `cases` runs one and judges how it
ended, `supervise` runs many in a process of their own.
"""
