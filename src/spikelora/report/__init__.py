"""What do I see? The report of a run, its figures and tables, and the `spikelora` command.

The room imports all other rooms. Only the start of the command, `spikelora.__main__`, imports it.
"""
