"""The commands of `timm-ddnn`, a module each, with a function each that Python code can call as well.

A module of this package has

    HELP: str                     one line, for `timm-ddnn --help`
    EXAMPLES: str                 command lines that run, for `timm-ddnn NAME --help`
    add_arguments(parser)         declares its arguments
    run(args)                     does it, prints, and returns what `--json` prints in the place of tables

and no logic besides: what a command does is in the modules of `timm_ddnn`, which know nothing of arguments and tables.
"""
