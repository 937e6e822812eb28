"""What do I see? The report of a run, its figures and tables, and the `spikelora` command.

The room imports all other rooms but `serving`. It is imported by the start of the command, `spikelora.__main__`, and by
the package's `__init__`, so that model cards show the sparsity.
"""
