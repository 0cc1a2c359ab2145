"""When will a slot be asked again: learned on-line, from demand events alone. Pure."""
