"""The command line's commands, the only code that prints; `workbench/__main__.py` lists them.

Each module has `add_arguments(parser)` and `run(options)`, which returns the exit status and lets
a WorkbenchError rise. Its docstring is the head of its `--help`.
"""
