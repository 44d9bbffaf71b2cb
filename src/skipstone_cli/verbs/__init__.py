"""The verbs (subcommands), one thin file each: parse the arguments, import what is heavy, call one function."""
