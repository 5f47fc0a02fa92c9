"""The commands of `timm-ddnn`, a module each: arguments and printing. What a command does is in `timm_ddnn`.

A module has

    HELP: str                     one line, for `timm-ddnn --help`
    EXAMPLES: str                 command lines that run, for `timm-ddnn NAME --help`
    add_arguments(parser)         declares its arguments
    run(args)                     does it, prints, and returns what `--json` prints in the place of tables

and imports the standard library alone, what it needs besides inside `run`.
"""

# In the order of the work
NAMES = ('list', 'train', 'evaluate', 'predict', 'profile', 'choose', 'calibrate', 'extract', 'export', 'push')
