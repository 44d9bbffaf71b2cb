"""The verbs, one thin file each: parse the arguments, import what is heavy, call one function of the library."""
