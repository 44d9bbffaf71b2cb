"""One thin file a verb: parse the arguments, import what is heavy, call one function of the library."""
