"""Where networks come from, one file per kind of source; each offers `load(request, identifier) -> Loaded`."""
