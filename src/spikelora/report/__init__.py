"""What do I see? The report of a run, its figures and tables, and the `spikelora` command.

It imports all other rooms. Nothing imports it but the command's start, `spikelora.__main__`, and the package's face,
which has model cards show the sparsity.
"""
