"""The subcommands of `mamo`, one module each: its arguments and the call of the function that does the work.

Importing a module and printing its help imports no torch.
"""
